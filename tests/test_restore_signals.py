"""A restoration that is told to stop, or that finds another in its folder: by its exit code and the command it prints."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_ard import ARD, SMALL, ard

from restore.runfolder import locked


@pytest.fixture(scope="module")
def base(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama3")


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
    settings = {"evaluation": {"lengths": [128, 512], "windows": 1_000, "needle_samples": 0}}
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
    with locked(tmp_path / "run"):
        ended = ard("restore", base, "--target-length", 512, "--data", texts, "--out", tmp_path / "run", *SMALL)
    assert ended.returncode == 2
    assert f"in use by process {os.getpid()}" in ended.stderr
