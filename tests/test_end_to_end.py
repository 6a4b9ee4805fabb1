"""From a model to answers over HTTP, by the commands a user types: restore, doctor, serve with real vLLM, ask, stop."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from helpers_ard import ARD, SMALL, ard
from transformers import AutoModelForCausalLM

from ard_serve import cli
from ard_serve.artifact import read_manifest, verify
from restore.config import RECIPES

START_TIMEOUT_S = 300
NEW_TOKENS = 24


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


def test_the_disk_it_took_was_forecast(
    base: Path, run: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["restore", base, "--target-length", 512, "--data", texts, "--out", tmp_path / "other", *SMALL, "--estimate"]
    assert cli.main([str(word) for word in words]) == 0
    table = " ".join(capsys.readouterr().out.replace("│", " ").split())
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
    words = ["export", run, "--out", tmp_path / "again", "--evaluation", run / "evaluation.json"]
    assert cli.main([str(word) for word in words]) == 0
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (run / "model" / name).read_bytes(), name


def test_a_finished_run_is_not_overwritten(base: Path, run: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["restore", base, "--target-length", 512, "--data", texts, "--out", run, *SMALL]
    assert cli.main([str(word) for word in words]) == 2
    assert f"{run}: holds an earlier run; add --resume" in capsys.readouterr().err


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
