"""The bench of training steps: real steps of the trainer, one file that runs are added to, several processes against one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from restore import bench
from restore.bench_cases import SHAPES, Case
from restore.bench_reference import case as reference_case
from restore.bench_reference import measure as measure_reference
from restore.bench_results import Results
from restore.flops import Counter
from restore.plan import plan_steps

CPU = torch.device("cpu")


def runs(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["runs"]
    return found


def test_a_run_measures_real_steps_and_is_added_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, table = tmp_path / "engine.json", tmp_path / "profile.txt"
    words = ["bench", "--cpu", "--out", str(out), "--shapes", "tiny", "--windows", "64", "--steps", "1", "--commit", "c0ffee"]
    settings = ["--set", "rank=4", "batch_tokens=256", "dtype=fp32"]
    monkeypatch.setattr(sys, "argv", [*words, "--recipes", "default", "cpt", *settings, "--profile", str(table)])
    bench.main()
    monkeypatch.setattr(sys, "argv", [*words, "--recipes", "linearard", "--warmup", "0", *settings, "quantize=4bit"])
    bench.main()
    first, second = runs(out)
    assert (first["commit"], len(first["rows"]), len(second["rows"])) == ("c0ffee", 2, 1)
    assert {"date", "command", "machine"} <= first.keys()
    mixed, read = first["rows"]
    assert [row["quantize"] for row in (mixed, read, *second["rows"])] == [None, None, "4bit"]
    assert second["rows"][0]["forecast_gib"] > 0
    assert (mixed["window"], mixed["long_window"], mixed["step_tokens"]) == (64, 512, 1024)
    assert (read["window"], read["long_window"], read["rank"]) == (0, 64, 4)
    config = Case("tiny", 64, {"recipe": "default", "rank": 4, "batch_tokens": 256}).config
    plan, counter = plan_steps(config, config.plan_rope(Case("tiny", 64, {}).base)), Counter(SHAPES["tiny"], config)
    assert plan.long_every == 4
    # Half of the windows are cut in two.
    counted = counter.read(512) + counter.distilled(64) * 4 + counter.distilled(32) * 8
    assert mixed["tflops"] * mixed["seconds"] * 1e12 == pytest.approx(counted.counted, rel=2e-3)
    assert mixed["tflops_with_recomputation"] * mixed["seconds"] * 1e12 == pytest.approx(counted.executed, rel=2e-3)
    assert mixed["of_matmul"] == pytest.approx(mixed["tflops"] / mixed["matmul_tflops"], rel=2e-3)
    assert mixed["forecast_gib"] > read["forecast_gib"] > 0
    assert mixed["parts_s"].keys() == {"teacher", "forward", "backward", "optimizer"}
    assert read["parts_s"]["teacher"] < mixed["parts_s"]["teacher"], "nobody teaches where text alone is read"
    assert table.read_text().count("Self CPU") >= 2


def test_a_case_that_does_not_fit_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")

    out = tmp_path / "engine.json"
    monkeypatch.setattr(bench, "build_trainer", too_much)
    monkeypatch.setattr(sys, "argv", ["bench", "--cpu", "--out", str(out), "--shapes", "tiny", "--windows", "64", "128"])
    bench.main()
    assert [row["error"] for row in runs(out)[0]["rows"]] == ["CUDA out of memory. Tried to allocate 1 GiB"] * 4


def test_several_processes_are_held_against_the_newest_run_of_one(tmp_path: Path) -> None:
    out = tmp_path / "engine.json"
    case = Case("tiny", 64, {"rank": 4})
    for seconds in (9.0, 4.0):
        Results(out, "c", CPU).append(case.describe(1) | {"seconds": seconds})
    two = Results(out, "c", CPU)
    two.append(case.describe(2) | {"seconds": 2.5})
    two.append(Case("tiny", 128, {"rank": 4}).describe(2) | {"seconds": 2.5})
    rows = runs(out)[-1]["rows"]
    assert rows[0]["scaling"] == pytest.approx(4.0 / 2.5 / 2)
    assert "scaling" not in rows[1], "one process did not run it"


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["off", "on"])
def test_two_processes_share_a_step(tmp_path: Path, shard: str) -> None:
    out = tmp_path / "engine.json"
    words = ["--cpu", "--out", str(out), "--shapes", "tiny", "--windows", "64", "--recipes", "distill", "--steps", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "restore.bench", *words, "--set", "rank=4", "batch_tokens=256", f"shard={shard}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    (row,) = runs(out)[0]["rows"]
    assert (row["processes"], row["step_tokens"], row["shard"]) == (2, 256, shard == "on")
    assert row["tokens_per_s"] > 0


def test_the_references_step_is_run_by_our_trainer_too_and_what_it_lacks_is_said(tmp_path: Path) -> None:
    same = reference_case("7b", 4096).describe(1)
    assert (same["recipe"], same["rank"], same["targets"], same["step_tokens"]) == ("linearard", 1024, ["q", "k", "v"], 8192)
    row = measure_reference(tmp_path, "tiny", 64, 1, 1)
    assert row["engine"] == "LinearARD"
    assert "No module named 'train'" in row["error"]
