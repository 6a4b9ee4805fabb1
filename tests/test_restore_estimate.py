"""The estimate of time: measured shares of a GPU's rate where there are any, and what real runs took beside it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ard_serve.cli import main
from restore import bench_evaluation, devices
from restore.bench_cases import SHAPES, Case
from restore.devices import GPUS
from restore.fit import measuring
from restore.flops import Counter
from restore.forecast import forecast
from restore.model import Kept
from restore.plan import plan_steps
from restore.speed import Speeds

RESULTS = Path(__file__).parent.parent / "docs" / "results"
H100, A100 = GPUS["H100"], GPUS["A100"]
MIXED = Case("7b", 4096, {"rank": 128, "steps": 10})


def results(folder: Path, device: str, *rows: dict[str, Any]) -> None:
    same = {"shape": "7b", "hidden_size": 4096, "processes": 1, "recipe": "default", "trainable": "lora", "dtype": "bf16"}
    made = [same | {"quantize": None} | row for row in rows]
    runs = [{"machine": {"device": device}, "rows": made}]
    (folder / f"engine-{device.split()[1]}.json").write_text(json.dumps({"runs": runs}))


def seconds(folder: Path, case: Case = MIXED, gpu: devices.Gpu = H100) -> float:
    return Speeds(folder).training(gpu, case.base, case.config, plan_steps(case.config, case.rope)).seconds


def test_each_kind_of_window_takes_its_time_at_the_rate_that_was_measured_for_it(tmp_path: Path) -> None:
    results(
        tmp_path,
        "NVIDIA H100 80GB HBM3",
        {"window": 4096, "long_window": 0, "recipe": "linearard", "tflops": 1.0},
        {"window": 4096, "long_window": 0, "recompute": "all", "tflops": 1.0},
        {"window": 4096, "long_window": 0, "tflops": 400.0},
        {"window": 0, "long_window": 32_768, "tflops": 500.0},
        # Neither the first two rows nor these are like the run: another recipe, every layer recomputed,
        # other windows, another width, several GPUs, another trainer, a case that did not fit.
        {"window": 32_768, "long_window": 0, "tflops": 1.0},
        {"window": 4096, "long_window": 0, "hidden_size": 576, "tflops": 1.0},
        {"window": 4096, "long_window": 0, "processes": 2, "tflops": 1.0},
        {"window": 4096, "long_window": 0, "engine": "LinearARD", "tflops": 1.0},
        {"window": 4096, "long_window": 32_768, "hidden_size": 576, "tflops": 1.0},
        {"window": 4096, "long_window": 0, "quantize": "4bit", "tflops": 1.0},
        {"window": 4096, "long_window": 0, "error": "out of memory"},
    )
    counter = Counter(MIXED.base, MIXED.config)
    plan = plan_steps(MIXED.config, MIXED.rope)
    assert (plan.window, plan.long_window) == (4096, 32_768)
    distilled, read = counter.distilling(plan).counted, counter.reading(plan).counted
    assert seconds(tmp_path) == pytest.approx(distilled / 400e12 + read / 500e12)
    said = Speeds(tmp_path).training(H100, MIXED.base, MIXED.config, plan)
    assert said.sources == (
        "measured with 7b and 4,096 tokens (engine-H100.json)",
        "measured with 7b and 32,768 tokens (engine-H100.json)",
    )
    assert said.of_rate(H100) == pytest.approx((distilled + read) / seconds(tmp_path) / 989.4e12)


def test_another_gpu_lends_its_share_where_the_named_one_was_not_measured(tmp_path: Path) -> None:
    rows = [
        {"window": 4096, "long_window": 0, "tflops": 0.5 * 989.4},
        {"window": 0, "long_window": 32_768, "tflops": 0.5 * 989.4},
    ]
    results(tmp_path, "NVIDIA H100 80GB HBM3", *rows)
    assert seconds(tmp_path, gpu=A100) == pytest.approx(seconds(tmp_path) * 989.4 / 312)
    share = Speeds(tmp_path).share(A100, 4096, MIXED.config, 4096, distils=True)
    assert share.source == "measured on H100 with 7b and 4,096 tokens (engine-H100.json)"
    results(tmp_path, "NVIDIA A100-SXM4-80GB", {"window": 4096, "long_window": 0, "tflops": 0.25 * 312})
    assert Speeds(tmp_path).share(A100, 4096, MIXED.config, 4096, distils=True).value == pytest.approx(0.25)


def test_a_run_that_recomputes_every_layer_is_told_by_rows_that_did(tmp_path: Path) -> None:
    """Counted work alone is in a rate, so that a step which repeats its layers is a slower one, and told apart."""
    rows = [
        {"window": 0, "long_window": 32_768, "recompute": "auto", "tflops": 0.6 * 989.4},
        {"window": 0, "long_window": 32_768, "recompute": "all", "tflops": 0.4 * 989.4},
    ]
    for made in (rows, rows[::-1]):
        results(tmp_path, "NVIDIA H100 80GB HBM3", *made)
        for recompute, value in (("auto", 0.6), ("all", 0.4)):
            case = Case("7b", 4096, {"rank": 128, "steps": 10, "recompute": recompute})
            share = Speeds(tmp_path).share(H100, 4096, case.config, 32_768, distils=False)
            assert share.value == pytest.approx(value)


def test_a_step_of_both_kinds_of_windows_tells_more_than_windows_alone(tmp_path: Path) -> None:
    rows = [
        {"window": 4096, "long_window": 0, "tflops": 0.5 * 989.4},
        {"window": 0, "long_window": 32_768, "tflops": 0.5 * 989.4},
        {"window": 4096, "long_window": 32_768, "tflops": 0.4 * 989.4},
    ]
    results(tmp_path, "NVIDIA H100 80GB HBM3", *rows[:2])
    alone = seconds(tmp_path)
    results(tmp_path, "NVIDIA H100 80GB HBM3", *rows)
    assert seconds(tmp_path) == pytest.approx(alone * 0.5 / 0.4)
    rows[2] |= {"hidden_size": 576}
    results(tmp_path, "NVIDIA H100 80GB HBM3", *rows)
    assert seconds(tmp_path) == pytest.approx(alone), "a model seven times as narrow tells nothing of it"


def test_without_a_measurement_the_share_is_assumed_and_called_so(tmp_path: Path) -> None:
    share = Speeds(tmp_path).share(H100, 4096, MIXED.config, 4096, distils=True)
    assert (share.value, share.source) == (0.3, "assumed")


def test_the_table_says_what_fits_and_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["7b"] | {"max_position_embeddings": 4096}))
    words = ["restore", str(tmp_path), "--target-length", "32768", "--estimate", "--long-window", "24576", "--steps", "10"]
    assert main(words) == 0
    rows = capsys.readouterr().out.split("training on one ")
    small, large = (next(" ".join(row.split()) for row in rows if row.startswith(name)) for name in ("RTX 4090", "H100"))
    assert "does not fit" in small
    assert "4bit would fit" in small.replace("│ │ ", "")
    assert " min " in large
    assert main([*words, "--gpu", "rtx"]) == 0
    said = capsys.readouterr().out
    assert said.count("training on one") == 1
    assert "--long-window 12288" in " ".join(said.split())


def test_the_table_says_what_a_run_took_of_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (measured, *_) = [row for *_, row in MEASURED if (row["shape"], row["recipe"], row["quantize"]) == ("7b", "default", None)]
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["7b"] | {"max_position_embeddings": 4096}))
    assert main(["restore", str(tmp_path), "--target-length", "32768", "--estimate", "--gpu", "H100"]) == 0
    said = capsys.readouterr().out
    row = " ".join(said[said.index("memory taken of one H100") :].replace("│", " ").split())
    assert "32 (to distil) and 11 (long" in row, "a wrapped row"
    found = re.search(r"([\d.]+) GiB", row)
    assert found
    assert float(found[1]) == pytest.approx(measured["peak_gib"], rel=0.1)


def test_a_gpu_is_found_by_what_people_call_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert devices.lookup("rtx-4090") == devices.lookup("4090") == GPUS["RTX 4090"]
    assert devices.lookup("h100") == H100
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["tiny"] | {"max_position_embeddings": 128}))
    for wrong in ("B200", "H", "-"):
        assert main(["restore", str(tmp_path), "--target-length", "512", "--estimate", f"--gpu={wrong}"]) == 2
        assert "not known; one of H100, H200" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("supported", "dtype", "device"), [(True, "bf16", "cpu"), (False, "fp32", "cpu"), (False, "bf16", "cuda")]
)
def test_a_dtype_that_is_fast_is_nothing_to_warn_of(
    supported: bool, dtype: str, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    devices.warn_if_slow(dtype, device)
    assert not caplog.text


def test_a_cpu_that_is_slow_in_bf16_says_so_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    devices.warn_if_slow("bf16", "cpu")
    assert "dtype = bf16: this CPU takes many times as long" in caplog.text
    assert "--dtype fp32" in caplog.text


MEASURED = [(path, run, row) for path in sorted(RESULTS.glob("engine-*.json")) for run in json.loads(path.read_text())["runs"]
            for row in run["rows"] if "seconds" in row and "engine" not in row and row["processes"] == 1]  # fmt: skip


# The longest windows of every shape, and steps of both kinds of windows; the others are for `make test-slow`.
QUICK = [row for *_, row in MEASURED if 32_768 in (row["window"], row["long_window"]) or row["recipe"] == "linearard"]


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_estimates_agree_with_what_was_measured_within_a_tenth(quick: bool) -> None:
    """Memory of every row, and time: a row's own rate is the most alike, so that time checks the arithmetic and the choice.

    One step of `distill` alone reads few texts, of lengths that are drawn, so that its arithmetic is not the mean's.
    """
    rows = [found for found in MEASURED if (found[2] in QUICK) == quick]
    assert rows
    for path, run, row in rows:
        name = f"{path.name}: {row['shape']}, {row['recipe']}, {row['window']} and {row['long_window']} tokens"
        settings = {name: row[name] for name in ("recipe", "rank", "dtype", "trainable", "quantize")}
        settings["targets"] = tuple(f"{letter}_proj" for letter in row["targets"])
        settings |= {"steps": 1, "batch_tokens": row["step_tokens"], "recompute": row.get("recompute", "auto")} | (
            {"long_window": row["long_window"]} if row["long_window"] else {}
        )
        case = Case(row["shape"], row["window"] or row["long_window"], settings)
        needed = forecast(case.base, case.rope, case.config, Kept(*row["kept"], *row.get("kept_attention", ())))
        assert needed.peak_bytes / 2**30 == pytest.approx(row["peak_gib"], rel=0.1), name
        gpu = devices.by_name(run["machine"]["device"])
        if gpu and row["recipe"] != "distill":
            assert seconds(RESULTS, case, gpu) == pytest.approx(row["seconds"], rel=0.1), name


def test_what_measuring_takes_is_told_within_a_tenth_and_never_too_low() -> None:
    (run,) = json.loads((RESULTS / "evaluation-memory-h200.json").read_text())["runs"]
    for row in run["rows"]:
        base = SHAPES[row["shape"]] | {"max_position_embeddings": 32_768}
        told = measuring(base, int(row["weights_gib"] * 2**30), bench_evaluation.settings(row["what"], row["length"]))
        assert row["peak_gib"] <= told.peak_bytes / 2**30 <= 1.1 * row["peak_gib"], row
