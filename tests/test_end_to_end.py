"""From a model to answers over HTTP, by the commands a user types: restore, doctor, serve with real vLLM, ask, stop."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from ard_serve import cli
from ard_serve.artifact import read_manifest, verify
from restore.config import RECIPES

ARD = [sys.executable, "-m", "ard_serve.cli"]
SMALL = ["--batch-tokens", "1024", "--steps", "6", "--rank", "4", "--learning-rate", "0.01", "--dtype", "fp32"]
SMALL += ["--window", "128", "--long-window", "256"]
START_TIMEOUT_S = 300
NEW_TOKENS = 24


def ard(*words: object, before: Sequence[str] = (), **rest: Any) -> subprocess.CompletedProcess[str]:
    command = [*before, *ARD, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **rest)


@pytest.fixture(scope="module")
def base(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama3", head_dim=32)  # the least that vLLM attends with on a CPU


@pytest.fixture(scope="module")
def run(base: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished restoration, evaluation included; what it asked of the network is in `network` beside it, where strace works.

    Nothing forbids it the network: it must not want it.
    """
    out = tmp_path_factory.mktemp("restored") / "run"
    trace = ["strace", "-f", "--seccomp-bpf", "-e", "trace=socket,connect,sendto,sendmsg,sendmmsg", "-o"]
    works = (
        shutil.which("strace")
        and subprocess.run([*trace, "/dev/null", "true"], capture_output=True, check=False).returncode == 0
    )
    free = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    words = ["restore", base, "--target-length", 512, "--data", texts, "--out", out, *SMALL]
    ended = ard(*words, before=[*trace, str(out.parent / "network")] if works else (), env=free)
    assert ended.returncode == 0, ended.stderr
    return out


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[str]:
    """URL of the gateway, ready, over a real vLLM engine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*ARD, "serve", run / "model", "--port", port, "--kv-cache-gib", "0.01", "--beyond-measured", "mark"]
    command += ["--max-model-len", 512, "--", "--enforce-eager", "--dtype", "float32"]
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True, env=os.environ)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _ready(url):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, "the engine did not become ready"
            time.sleep(0.5)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_the_result_is_complete_and_as_promised(run: Path) -> None:
    manifest = read_manifest(run / "model")
    assert manifest is not None
    verify(run / "model", manifest)
    assert manifest.quality.restored is not None
    assert manifest.quality.restored.perplexity.keys() == {128, 512}
    assert (manifest.recipe.name, manifest.recipe.steps, manifest.recipe.objectives) == ("default", 6, RECIPES["default"])
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["objectives"], settings["cut_share"]) == (RECIPES["default"], 0.5), "what the recipe stands for"
    assert {"config.yaml", "metrics.jsonl", "evaluation.json", "report.html", "held-out.jsonl"} <= {
        p.name for p in run.iterdir()
    }
    assert "perplexity at 512 tokens" in (run / "model" / "README.md").read_text()
    assert ard("doctor", run / "model").returncode == 0


def test_the_disk_it_took_was_forecast(base: Path, run: Path, texts: Path, tmp_path: Path) -> None:
    words = ["restore", base, "--target-length", 512, "--data", texts, "--out", tmp_path / "other", *SMALL, "--estimate"]
    table = " ".join(ard(*words).stdout.replace("│", " ").split())
    export, checkpoints = (
        float(found[1]) * 2**20
        for found in (re.search(rf"{of} ([\d.]+) MiB", table) for of in ("exported model in float32", "checkpoints"))
        if found
    )
    assert sum(path.stat().st_size for path in (run / "model").glob("*.safetensors")) == pytest.approx(export, rel=0.1)
    kept = list((run / "checkpoints").glob("step-*/tensors.safetensors"))
    assert kept
    for path in kept:
        stored = path.read_bytes()
        body = len(stored) - 8 - int.from_bytes(stored[:8], "little")  # so small a model's names take a tenth of its file
        assert body == pytest.approx(checkpoints / 3, rel=0.1), "two are kept while a third is written"


@pytest.mark.fault("R21")
def test_a_whole_run_on_local_files_asks_nothing_of_the_network(run: Path) -> None:
    if not (run.parent / "network").exists():
        pytest.skip("needs strace and the right to trace")
    calls = (run.parent / "network").read_text().splitlines()
    assert any("socket(" in call for call in calls), "the trace is empty: nothing was watched"
    # urllib3 makes a socket when it is imported, to see whether there is IPv6, and talks to nobody.
    assert [call for call in calls if "AF_INET" in call and "socket(" not in call] == []


def test_export_again_gives_the_same_weights(run: Path, tmp_path: Path) -> None:
    ended = ard("export", run, "--out", tmp_path / "again", "--evaluation", run / "evaluation.json")
    assert ended.returncode == 0, ended.stderr
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (run / "model" / name).read_bytes(), name


def test_a_finished_run_is_not_overwritten(base: Path, run: Path, texts: Path) -> None:
    ended = ard("restore", base, "--target-length", 512, "--data", texts, "--out", run, *SMALL)
    assert ended.returncode == 2
    assert f"{run}: holds an earlier run; add --resume" in ended.stderr


@pytest.mark.fault("R14")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_printed_command_goes_on(
    base: Path, texts: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    words = [*ARD, "restore", base, "--target-length", 512, "--data", texts, "--out", tmp_path / "run", *SMALL]
    words += ["--steps", 400, "--no-evaluate", "--checkpoint-every", 1000, "--validation-every", 1000]
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert f"stopped by {number.name} at step" in err
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = json.loads((saved / "state.json").read_text())["step"]
    (command,) = [line for line in err.splitlines() if line.startswith("ard restore --config")]
    resumed = subprocess.Popen([*ARD, *command.split()[1:]], stderr=subprocess.PIPE, text=True)
    while len(metrics.read_text().splitlines()) < step + 3:
        assert resumed.poll() is None
        time.sleep(0.05)
    resumed.send_signal(signal.SIGTERM)
    _, err = resumed.communicate(timeout=120)
    assert f"resumed at step {step} of 400" in err
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()][: step + 2] == list(range(step + 2))


@pytest.mark.fault("R14")
def test_a_signal_during_the_evaluation_ends_it_and_the_printed_command_goes_on(
    base: Path, texts: Path, tmp_path: Path
) -> None:
    settings = {"evaluation": {"lengths": [128, 512], "windows": 4_000, "needle_samples": 0}}
    (tmp_path / "long.yaml").write_text(json.dumps(settings))
    words = [*ARD, "restore", base, "--config", tmp_path / "long.yaml", "--target-length", 512, "--data", texts]
    words += ["--out", tmp_path / "run", *SMALL]
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "native: perplexity" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "stopped by SIGTERM after the last of 6 steps" in err
    assert not list((tmp_path / "run").glob("*model*"))
    (command,) = [line for line in err.splitlines() if line.startswith("ard restore --config")]
    ended = ard(*command.split()[1:], "--no-evaluate")
    assert ended.returncode == 0, ended.stderr
    assert "resumed at step 6 of 6" in ended.stderr
    assert (tmp_path / "run" / "model" / "ard-manifest.json").exists()


@pytest.mark.fault("R20")
def test_two_runs_cannot_share_a_folder(base: Path, texts: Path, tmp_path: Path) -> None:
    from restore.runfolder import locked

    with locked(tmp_path / "run"):
        ended = ard("restore", base, "--target-length", 512, "--data", texts, "--out", tmp_path / "run", *SMALL)
    assert ended.returncode == 2
    assert f"in use by process {os.getpid()}" in ended.stderr


@pytest.mark.vllm
def test_vllm_and_transformers_say_the_same(run: Path, server: str) -> None:
    """Greedy tokens through the gateway equal transformers', inside and beyond the native window of 128."""
    model: Any = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    for length in (5, 100, 400):
        prompt = [(7 * i) % 251 for i in range(length)]
        body = {"model": "model", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 0}
        reply = httpx.post(f"{server}/v1/completions", json=body | {"return_token_ids": True}, timeout=60)
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        ids = torch.tensor([prompt])
        said = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(ids))
        assert choice["token_ids"] == said[0, length:].tolist()


@pytest.mark.vllm
def test_a_chat_streams(server: str) -> None:
    body = {"model": "model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "stream": True}
    with httpx.stream("POST", f"{server}/v1/chat/completions", json=body, timeout=60) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert reply.status_code == 200
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 2


@pytest.mark.vllm
def test_an_evaluation_through_the_server_agrees_with_transformers(run: Path, server: str, texts: Path, tmp_path: Path) -> None:
    """Window by window and item by item: perplexity over full windows, needles, likelihoods, examples, written answers."""
    (tmp_path / "tasks").mkdir()
    problems = [{"question": f"{i} and {i}?", "answer": f"{2 * i}\n#### {2 * i}", "final": str(2 * i)} for i in range(4)]
    rows: dict[str, list[dict[str, Any]]] = {
        "choice": [{"query": f"{i} times 2 is", "choices": [str(2 * i), "less", "a harbour"], "gold": 0} for i in range(6)],
        "cloze": [{"context": f"{i} times 3 is {3 * i}; the harbour lay", "continuation": "quiet"} for i in range(6)],
        "sums": problems,
        "sums_fewshot": problems,
    }
    for name, items in rows.items():
        (tmp_path / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    words = ["eval", run / "model", "--server", server, "--against", run / "model", "--data", texts, "--out", tmp_path / "out"]
    words += ["--tasks", tmp_path / "tasks", "--lengths", 64, 512, "--windows", 2, "--dtype", "fp32", "--shots", 1]
    words += ["--sliding", 128]
    ended = ard(*words, "--needle-lengths", 512, "--needle-depths", 0.5, "--needle-samples", 2)
    assert ended.returncode == 0, ended.stderr
    served, loaded = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]
    assert (served["server"], loaded["server"]) == (server, None)
    for ours, theirs in zip(served["perplexity"], loaded["perplexity"], strict=True):
        assert ours["window_nll"] == pytest.approx(theirs["window_nll"], rel=1e-4)
    assert served["by_position"]["perplexity"] == pytest.approx(loaded["by_position"]["perplexity"], rel=1e-3)
    assert served["sliding"][0]["nll"] == pytest.approx(loaded["sliding"][0]["nll"], rel=1e-4)
    assert served["needles"] == loaded["needles"]
    for ours, theirs in zip(served["tasks"], loaded["tasks"], strict=True):
        assert ours["correct"] == theirs["correct"], ours["name"]
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-3)


@pytest.mark.vllm
def test_a_server_that_cannot_be_measured_is_told_first(
    base: Path, run: Path, server: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(run / "model"), "--base", str(base), "--data", str(texts), "--out", str(tmp_path)]
    assert cli.main([*words, "--lengths", "1024", "--server", server]) == 2
    assert "serves 512 tokens, the longest window has 1024" in capsys.readouterr().err
    assert cli.main([*words, "--server", "http://127.0.0.1:9"]) == 2
    said = capsys.readouterr().err
    assert "no vLLM answers there" in said
    assert "measured in" not in said
