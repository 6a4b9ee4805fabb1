"""The command line: fast help, one-line errors with their exit codes, nothing heavy imported too early."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ard_serve.cli import COMMANDS, main
from server.config import ServeConfig

ARD = [sys.executable, "-m", "ard_serve.cli"]
HELP_NEEDS = "import argparse, importlib.metadata, pydantic.fields, pydantic.types, yaml"
RESTORE = ["restore", "m", "--target-length", "9000", "--data", "d", "--out", "o"]


def _best_seconds(command: list[str]) -> float:
    """Wall-clock seconds of the fastest of five runs."""

    def seconds() -> float:
        started = time.monotonic()
        subprocess.run(command, capture_output=True, check=True)
        return time.monotonic() - started

    return min(seconds() for _ in range(5))


@pytest.mark.timing
@pytest.mark.parametrize("words", [(), *((name,) for name in COMMANDS), ("loadtest", "--predict"), ("loadtest", "--compare")])
def test_help_is_fast_and_loads_no_framework(words: tuple[str, ...]) -> None:
    """Bounded by what the libraries that a help text needs take on this machine, so that a slow one is no failure of ours."""
    command = [sys.executable, "-X", "importtime", "-m", "ard_serve.cli", *words, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in shown.stderr.splitlines() if "|" in line}
    assert loaded.isdisjoint({"torch", "numpy", "transformers", "vllm", "fastapi", "httpx", "matplotlib", "datasets"})
    assert "usage: ard" in shown.stdout
    assert _best_seconds([*ARD, *words, "--help"]) < 2 * _best_seconds([sys.executable, "-c", HELP_NEEDS])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "ard: unknown command 'nonsense'; commands: restore, eval, export, serve, loadtest, doctor"),
        (["restore", "m", "--targt-length", "5"], "ard restore: unrecognized arguments: --targt-length 5"),
        (["restore", "m", "--target-length", "9000", "--out", "o"], "ard restore: required, as a flag or in --config: data"),
        ([*RESTORE, "--rank", "0"], "ard restore: rank = '0': input should be greater than 0"),
        ([*RESTORE, "--recipe", "magic"], "ard restore: recipe = 'magic': input should be"),
        (["eval", "m", "--out", "o"], "ard eval: --data is required"),
        (["export", "nowhere"], "ard export: nowhere: not a restoration"),
    ],
)
def test_a_usage_error_is_one_line_and_code_2(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(says)
    assert error.count("\n") == 1


@pytest.mark.fault("R1")
def test_a_missing_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["restore", str(tmp_path / "gone"), "--target-length", "512", "--data", "x", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert f"{tmp_path / 'gone'}: no such folder" in capsys.readouterr().err


def test_interrupting_before_any_work_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("restore.doctor.run", interrupted)
    assert main(["doctor", "."]) == 130
    assert capsys.readouterr().err.endswith("ard doctor: interrupted\n")


def test_engine_flags_pass_through_after_two_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []

    def run(config: ServeConfig) -> int:
        seen.append(config.engine_args)
        return 0

    monkeypatch.setattr("server.app.run", run)
    assert main(["serve", "m", "--port", "1", "--", "--enforce-eager", "--help"]) == 0
    assert seen == [("--enforce-eager", "--help")]
