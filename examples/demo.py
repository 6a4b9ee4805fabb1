"""`make demo`: restore a real small model on this machine, evaluate it, export it, serve it, ask it, load-test it.

Each step is an `ard` command that is printed before it runs; a step whose result is there is not run again.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from rich.console import Console
from rich.table import Table

from restore import devices

BIN = Path(sys.executable).parent
HERE = Path(__file__).parent
DEMO = Path("demo")
MODEL, RUN, EVALUATION, LOAD = DEMO / "SmolLM2-135M-Instruct", DEMO / "run", DEMO / "evaluation", DEMO / "load"
PORT = 8017
URL = f"http://127.0.0.1:{PORT}"
QUESTION = "In one sentence: what is a lighthouse for?"
READY_TIMEOUT_S = 300
# SmolLM2's 8192-token prompts fit, and vLLM on the CPU starts four times faster without compiling.
SERVE = ("--port", str(PORT), "--", "--enforce-eager", "--max-num-seqs", "8")

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    started = time.monotonic()
    os.chdir(HERE.parent)
    DEMO.mkdir(exist_ok=True)
    step("a real model as a Hugging Face folder", MODEL / "tokenizer.json", [sys.executable, "examples/smollm2.py", MODEL])
    resume = ["--resume"] if any(RUN.glob("checkpoints/step-*")) else []
    # On a CPU without bf16 products these are fp32's, here and in vLLM, which would take minutes for a prompt.
    slow = not devices.is_fast("bf16", "cuda" if torch.cuda.is_available() else "cpu")
    dtype, engine_dtype = (["--dtype", "fp32"], ["--dtype", "float32"]) if slow else ([], [])
    restore = ["restore", MODEL, "--config", "examples/demo.yaml", "--out", RUN, "--no-evaluate", *dtype, *resume]
    step("stretch 8,192 tokens to 32,768 and restore", RUN / "model" / "ard-manifest.json", ard(*restore))
    evaluate = ["eval", RUN / "model", "--config", "examples/demo-eval.yaml", "--base", MODEL, "--out", EVALUATION, *dtype]
    step("native, stretched and restored on a held-out book", EVALUATION / "evaluation.json", ard(*evaluate))
    export = ["export", RUN, "--evaluation", EVALUATION / "evaluation.json", "--out", DEMO / "exported"]
    step("export with the scores in its model card", DEMO / "exported" / "ard-manifest.json", ard(*export))
    with served(DEMO / "exported", engine_dtype):
        answer = ask(QUESTION)
        load = ["loadtest", URL, "--model-dir", DEMO / "exported", "--config", "examples/demo-load.yaml", "--out", LOAD]
        step("load test", LOAD / "report.html", ard(*load))
    summary(answer, time.monotonic() - started)


def ard(*arguments: object) -> list[object]:
    return [BIN / "ard", *arguments]


def step(title: str, result: Path, command: list[object]) -> None:
    """Run a command unless its result is there already."""
    console.rule(f"[bold]{title}", align="left")
    if result.exists():
        console.print(f"there already: {result}")
        return
    words = [str(word) for word in command]
    console.print("$ " + " ".join(words), style="cyan")
    code = subprocess.run(words, check=False).returncode
    if code != 0:
        sys.exit(code)


@contextmanager
def served(model: Path, engine_args: list[str]) -> Iterator[None]:
    """The gateway and its vLLM engine, for as long as the block lasts."""
    command = [str(word) for word in ard("serve", model, *SERVE, *engine_args)]
    console.rule("[bold]serve with vLLM", align="left")
    console.print("$ " + " ".join(command), style="cyan")
    log = (DEMO / "serve.log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until_ready(server)
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        log.close()


def wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    with console.status("vLLM starts (about half a minute)"):
        while time.monotonic() < deadline:
            if server.poll() is not None:
                sys.exit(f"the server ended with code {server.returncode}; see {DEMO / 'serve.log'}")
            try:
                if httpx.get(f"{URL}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
    sys.exit(f"the server was not ready within {READY_TIMEOUT_S} s; see {DEMO / 'serve.log'}")


def ask(question: str) -> str:
    model = httpx.get(f"{URL}/v1/models").json()["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 60, "temperature": 0}
    reply = httpx.post(f"{URL}/v1/chat/completions", json=body, timeout=120)
    reply.raise_for_status()
    return str(reply.json()["choices"][0]["message"]["content"]).strip()


def summary(answer: str, seconds: float) -> None:
    report = json.loads((EVALUATION / "evaluation.json").read_text())
    models = {model["name"]: model for model in report["models"]}
    console.rule("[bold]result", align="left")
    table = Table(
        title="SmolLM2-135M-Instruct, 8,192 tokens stretched to 32,768: held-out book and LAMBADA, lower is better",
        title_justify="left",
    )
    for column in ("measure", "native", "stretched, untouched", "restored"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, cells in rows(models):
        table.add_row(name, *cells)
    console.print(table)
    console.print(f"Q: {QUESTION}\nA: {answer}\n")
    for path in (EVALUATION / "report.html", LOAD / "report.html"):
        console.print(f"report: {path.resolve()}")
    console.print(f"done in {seconds / 60:.1f} minutes")


def rows(models: dict[str, dict]) -> Iterator[tuple[str, list[str]]]:  # type: ignore[type-arg]
    order = [models[name] for name in ("native", "stretched", "restored")]
    for index, score in enumerate(order[0]["perplexity"]):
        nll = [model["perplexity"][index]["window_nll"] for model in order]
        yield f"perplexity at {score['length']:,} tokens", [f"{math.exp(sum(n) / len(n)):.2f}" for n in nll]
    for index, score in enumerate(order[0]["tasks"]):
        metrics = [model["tasks"][index]["metrics"] for model in order]
        yield (
            f"{score['name']}, perplexity of the last word, {len(score['correct'])} items",
            [f"{m['perplexity']:.2f}" for m in metrics],
        )


if __name__ == "__main__":
    main()
