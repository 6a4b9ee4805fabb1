"""Comparing runs: noise is no regression, a regression is, and exit code 7 says so."""

from pathlib import Path

import numpy as np
import pytest

from ard_serve.errors import DataError, QualityGateError, ResourceError, UsageError
from loadtests.compare import compare, judge, run
from loadtests.config import CompareConfig
from loadtests.metrics import accuracy, distribution
from loadtests.records import CellResult, RequestRecord, RunResult


def write_run(folder: Path, ttft_ms: float, seed: int, right: int = 16, requests: int = 16, **fields: object) -> Path:
    noise = np.random.default_rng(seed).normal(1, 0.03, requests)
    records = [
        RequestRecord(cell="1024x1", repeat=0, index=n, role="measured", outcome="ok", prompt_tokens=1024, output_tokens=11,
                      events=11, planned_s=0, sent_s=n, ttft_ms=ttft_ms * noise[n], e2e_ms=ttft_ms * noise[n] + 500,
                      expected=f"{100_000 + n}", correct=n < right)
        for n in range(requests)
    ]  # fmt: skip
    cell = CellResult(cell="1024x1", length=1024, concurrency=1, requests=requests, outcomes={"ok": requests},
                      ttft_ms=distribution(r.ttft_ms or 0 for r in records), accuracy=accuracy(records))  # fmt: skip
    result = RunResult(started_at="now", command="ard", settings={"output_tokens": 11, "arrival": "closed"}, server={},
                       machine={}, cells=[cell], requests=records)  # fmt: skip
    folder.mkdir()
    changed = result.model_copy(update=fields)
    (folder / "result.json").write_text(changed.model_dump_json(), encoding="utf-8")
    return folder


def config(base: Path, other: Path, **fields: object) -> CompareConfig:
    return CompareConfig.model_validate({"base": base, "other": other} | fields)


def test_two_runs_of_one_server_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = write_run(tmp_path / "a", 1000, 1), write_run(tmp_path / "b", 1000, 2)
    comparison = compare(config(base, other))
    assert {d.figure: d.verdict for d in comparison.differences} == {
        "TTFT": "same", "TPOT": "same", "E2E": "same", "right answers": "same"
    }  # fmt: skip
    assert run(config(base, other, out=tmp_path / "compared.json")) == 0
    assert "4 same" in capsys.readouterr().err
    assert "TTFT" in (tmp_path / "compared.json").read_text(encoding="utf-8")


def drifting(folder: Path, seed: int, visits: tuple[float, ...]) -> Path:
    """A run of which each visit to the cell found the machine at another speed."""
    write_run(folder, 1000, seed)
    result = RunResult.model_validate_json((folder / "result.json").read_bytes())
    each = len(result.requests) // len(visits)
    for n, one in enumerate(result.requests):
        one.repeat = min(n // each, len(visits) - 1)
        one.ttft_ms = (one.ttft_ms or 0) * visits[one.repeat]
    (folder / "result.json").write_text(result.model_dump_json(), encoding="utf-8")
    return folder


def test_what_a_machine_changes_between_visits_is_no_regression(tmp_path: Path) -> None:
    base, other = drifting(tmp_path / "a", 1, (1.0, 1.3, 1.0)), drifting(tmp_path / "b", 2, (1.3, 1.3, 1.0))
    comparison = compare(config(base, other))
    (ttft,) = (d for d in comparison.differences if d.figure == "TTFT")
    assert not comparison.visited_once
    assert ttft.ratio > 1.1
    assert ttft.verdict == "unclear"
    slow = drifting(tmp_path / "c", 3, (1.7, 1.8, 1.9))
    assert {d.verdict for d in compare(config(base, slow)).differences if d.figure == "TTFT"} == {"worse"}


def test_cells_that_were_visited_once_are_named_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once = write_run(tmp_path / "a", 1000, 1), write_run(tmp_path / "b", 1000, 2)
    assert run(config(*once)) == 0
    assert "visited only once: every cell; what" in capsys.readouterr().err
    twice = drifting(tmp_path / "c", 1, (1.0, 1.0)), drifting(tmp_path / "d", 2, (1.0, 1.0))
    assert run(config(*twice)) == 0
    assert "visited" not in capsys.readouterr().err


def test_a_slower_server_ends_with_seven_and_the_figure(tmp_path: Path) -> None:
    base, other = write_run(tmp_path / "a", 1000, 1), write_run(tmp_path / "b", 1300, 2)
    with pytest.raises(QualityGateError, match=r"first TTFT of 1024x1: 1\.\d+ s against [\d.]+ m?s, allowed 10%") as raised:
        run(config(base, other))
    assert raised.value.exit_code == 7
    assert run(config(other, base)) == 0
    assert run(config(base, other, allowed=0.5)) == 0


def test_lost_answers_are_a_regression_at_the_same_speed(tmp_path: Path) -> None:
    base, other = write_run(tmp_path / "a", 1000, 1), write_run(tmp_path / "b", 1000, 2, right=8)
    with pytest.raises(QualityGateError, match="right answers of 1024x1"):
        run(config(base, other))
    assert run(config(base, write_run(tmp_path / "c", 1000, 2, right=15))) == 0


def test_few_requests_settle_nothing(tmp_path: Path) -> None:
    base, other = write_run(tmp_path / "a", 1000, 1, requests=3), write_run(tmp_path / "b", 2000, 2, requests=3)
    latencies = [d for d in compare(config(base, other)).differences if d.figure == "TTFT"]
    assert [d.verdict for d in latencies] == ["unclear"]


def change(folder: Path, **fields: object) -> Path:
    """The records of a run, each with other fields."""
    result = RunResult.model_validate_json((folder / "result.json").read_bytes())
    result.requests = [one.model_copy(update=fields) for one in result.requests]
    (folder / "result.json").write_text(result.model_dump_json(), encoding="utf-8")
    return folder


def test_a_longer_silence_is_a_regression_though_the_mean_gap_is_not(tmp_path: Path) -> None:
    base = change(write_run(tmp_path / "a", 1000, 1), longest_gap_ms=50.0)
    with pytest.raises(QualityGateError, match=r"first longest gap of 1024x1: 400 ms against 50 ms"):
        run(config(base, change(write_run(tmp_path / "b", 1000, 2), longest_gap_ms=400.0)))
    assert run(config(base, write_run(tmp_path / "c", 1000, 2))) == 0, "results before it was recorded"


def test_open_loops_are_held_to_their_scheduled_latency(tmp_path: Path) -> None:
    cells = [CellResult(cell="1024x1", length=1024, rate=1.0, requests=16, outcomes={"ok": 16})]
    base, other = (write_run(tmp_path / name, 1000, seed, cells=cells) for seed, name in enumerate("ab"))
    for folder, late_s in ((base, 0), (other, 5)):
        result = RunResult.model_validate_json((folder / "result.json").read_bytes())
        for record in result.requests:
            record.planned_s = record.sent_s - late_s
        (folder / "result.json").write_text(result.model_dump_json(), encoding="utf-8")
    with pytest.raises(QualityGateError, match=r"first scheduled of 1024x1: 6\.\d+ s against 1\.\d+ s"):
        run(config(base, other))


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [(0, 1, "worse"), (1, 0, "better"), (2, 2, "same"), (2, 3, "unclear"), (1, 9, "worse"), (9, 1, "better")],
)
def test_failures_where_some_failed_before_must_be_beyond_chance(tmp_path: Path, before: int, after: int, verdict: str) -> None:
    folders = []
    for name, failed in (("a", before), ("b", after)):
        folders.append(write_run(tmp_path / name, 1000, 1))
        result = RunResult.model_validate_json((folders[-1] / "result.json").read_bytes())
        for record in result.requests[:failed]:
            record.outcome = "timeout"
        (folders[-1] / "result.json").write_text(result.model_dump_json(), encoding="utf-8")
    (found,) = [d for d in compare(config(*folders)).differences if d.figure == "failed requests"]
    assert found.verdict == verdict


def test_a_server_that_died_is_no_pass(tmp_path: Path) -> None:
    base, other = write_run(tmp_path / "a", 1000, 1), write_run(tmp_path / "b", 1000, 2, status="server_died")
    with pytest.raises(QualityGateError, match="its server died"):
        run(config(base, other))
    assert run(config(other, base)) == 0


def test_a_comparison_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    base = write_run(tmp_path / "a", 1000, 1)
    with pytest.raises(ResourceError, match=r"compared\.json: cannot be written"):
        run(config(base, base, out=tmp_path / "missing" / "compared.json"))


@pytest.mark.parametrize(
    ("ratio", "low", "high", "verdict"),
    [(1.3, 1.2, 1.4, "worse"), (1.3, 0.9, 1.8, "unclear"), (1.05, 1.02, 1.08, "same"), (0.7, 0.6, 0.8, "better"),
     (1.0, 0.8, 1.3, "unclear")],
)  # fmt: skip
def test_verdicts(ratio: float, low: float, high: float, verdict: str) -> None:
    assert judge(ratio, low, high, 0.1) == verdict


def test_runs_that_ask_different_things_do_not_compare(tmp_path: Path) -> None:
    base = write_run(tmp_path / "a", 1000, 1)
    other = write_run(tmp_path / "b", 1000, 2, settings={"output_tokens": 99, "arrival": "closed"})
    with pytest.raises(UsageError, match="output_tokens: 11 against 99"):
        compare(config(base, other))
    with pytest.raises(UsageError, match="seed: None against 5"):
        compare(
            config(base, write_run(tmp_path / "d", 1000, 2, settings={"output_tokens": 11, "arrival": "closed", "seed": 5}))
        )
    with pytest.raises(UsageError, match="no cell in common"):
        compare(config(base, write_run(tmp_path / "c", 1000, 2, cells=[])))


def test_runs_that_a_cache_answered_are_no_pass(tmp_path: Path) -> None:
    base, other = write_run(tmp_path / "a", 1000, 1), write_run(tmp_path / "b", 1000, 2)
    result = RunResult.model_validate_json((other / "result.json").read_bytes())
    result.cells[0].refused = "the prefix cache answered"
    (other / "result.json").write_text(result.model_dump_json(), encoding="utf-8")
    with pytest.raises(UsageError, match="every cell in common was refused: 1024x1"):
        run(config(base, other))


def test_what_is_no_result_is_named(tmp_path: Path) -> None:
    base = write_run(tmp_path / "a", 1000, 1)
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.json: not a result"):
        compare(config(base, tmp_path / "x.json"))
    with pytest.raises(DataError, match="cannot be read"):
        compare(config(base, tmp_path / "missing"))
