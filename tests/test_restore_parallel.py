"""Two processes train as one does: the same losses and weights, one set of files, one end for both."""

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ard_serve.cli import main
from restore import metrics
from restore.parallel import World

# fp32 on the CPU: only the order of the sums differs.
TOLERANCE = 2e-5


def restore(model: Path, texts: Path, out: Path, steps: int = 4) -> list[str]:
    words = ["restore", str(model), "--data", str(texts), "--out", str(out), "--target-length", "512", "--steps", str(steps)]
    words += ["--window", "64", "--long-window", "128", "--batch-tokens", "384", "--rank", "4", "--warmup-steps", "1"]
    words += ["--validation-share", "0.3", "--validation-windows", "3", "--validation-every", "2", "--learning-rate", "0.01"]
    return [*words, "--dtype", "fp32", "--device", "cpu", "--no-evaluate"]


def on_two(words: list[str]) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ard_serve.cli",
        *words,
    ]


def test_two_processes_give_the_losses_and_weights_of_one(
    make_checkpoint: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    model = make_checkpoint("qwen3")
    assert main(restore(model, texts, tmp_path / "one")) == 0
    run = subprocess.run(on_two(restore(model, texts, tmp_path / "two")), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("restored model:") == 1
    one, two = (metrics.read(tmp_path / name) for name in ("one", "two"))
    assert [row["step"] for row in two] == [0, 1, 2, 3, 4]
    for alone, shared in zip(one, two, strict=True):
        for name in ("loss", "attention", "logits", "lm", "grad_norm"):
            assert shared.get(name, 0) == pytest.approx(alone.get(name, 0), rel=TOLERANCE), name
        assert shared.get("layer_kl", []) == pytest.approx(alone.get("layer_kl", []), rel=TOLERANCE)
        assert shared.get("validation", {}).get("loss", 0) == pytest.approx(
            alone.get("validation", {}).get("loss", 0), rel=TOLERANCE
        )
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        assert float((weight - weights[1][name]).abs().max()) < 1e-4, name


def test_a_signal_stops_both_with_one_checkpoint(make_checkpoint: Callable[..., Path], texts: Path, tmp_path: Path) -> None:
    command = on_two(restore(make_checkpoint("llama3"), texts, tmp_path, steps=100_000))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 120
        while not any("loss" in row for row in metrics.read(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    assert said.count("stopped by SIGTERM at step") == 1
    steps = metrics.read(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / f"step-{steps:06d}" / "state.json").exists()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_windows_are_shared_out_once_and_evenly(size: int) -> None:
    tokens = [32_768, *[8192] * 7]
    shares = [World(rank, size).share(tokens) for rank in range(size)]
    assert sorted(window for share in shares for window in share) == list(range(8))
    loads = [sum(tokens[window] for window in share) for share in shares]
    assert max(loads) <= max(32_768, math.ceil(sum(tokens) / size) + 8192)
