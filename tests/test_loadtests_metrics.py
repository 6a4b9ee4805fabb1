"""Figures against hand-made records whose truth is plain."""

import numpy as np
import pytest

from loadtests.address import Address
from loadtests.alarms import corruption_alarms, falling_p, mcnemar_p
from loadtests.config import LoadConfig
from loadtests.fits import what_fits
from loadtests.laws import fit_throughput, fit_ttft
from loadtests.metrics import (
    accuracy,
    by_depth,
    distribution,
    full_load_window,
    good_each_s,
    meets_limits,
    output_each_s,
    requests_within,
    tokens_within,
)
from loadtests.prompts import Words
from loadtests.records import Accuracy, CellResult, Distribution, RequestRecord
from loadtests.scenario import Cell
from loadtests.summary import CellRun, Readings, summarise
from loadtests.target import Target

TARGET = Target(Address("http", "127.0.0.1", 1, ""), "m", "/v1/completions", Words(), {})


def record(**fields: object) -> RequestRecord:
    usual = {"cell": "c", "repeat": 0, "index": 0, "role": "measured", "outcome": "ok", "prompt_tokens": 1000,
             "output_tokens": 11, "events": 11, "planned_s": 0.0, "sent_s": 0.0, "ttft_ms": 1000.0, "e2e_ms": 2000.0,
             "gaps_ms": [100.0] * 10}  # fmt: skip
    return RequestRecord.model_validate(usual | fields)


@pytest.mark.parametrize(("cached", "refused"), [(10, False), (11, True)])
def test_a_shared_bos_is_no_reason_to_refuse_a_cell(cached: int, refused: bool) -> None:
    run = CellRun(Cell(1000, 11, 1), [record()], Readings(cached_tokens=cached))
    assert bool(summarise(run, LoadConfig(url="http://127.0.0.1:1"), TARGET).refused) is refused


@pytest.mark.parametrize(("outcome", "good_per_s"), [("ok", 0.5), ("rejected", 0.0), ("cancelled", None)])
def test_rates_need_a_request_that_ended(outcome: str, good_per_s: float | None) -> None:
    run = CellRun(Cell(1000, 11, 1), [record(outcome=outcome)])
    assert summarise(run, LoadConfig(url="http://127.0.0.1:1"), TARGET).goodput_per_s == good_per_s


def test_percentiles_are_pooled_and_carry_n() -> None:
    found = distribution(range(1, 101))
    assert found == Distribution(n=100, mean=50.5, p50=50.5, p90=90.1, p99=99.01, max=100)
    assert distribution([]) is None


def test_tpot_leaves_out_the_first_token_and_needs_two() -> None:
    assert record().tpot_ms == 100
    assert record(output_tokens=1, events=1, gaps_ms=[], e2e_ms=1000.0).tpot_ms is None


def test_wilson_interval() -> None:
    # Wilson's interval of 8 in 10, as tabulated: 0.4902 to 0.9433.
    found = accuracy([record(correct=index < 8) for index in range(10)])
    assert found is not None
    assert [found.rate, found.low, found.high] == pytest.approx([0.8, 0.4902, 0.9433], abs=1e-3)
    assert accuracy([record()]) is None


def test_depths_are_kept_apart() -> None:
    found = by_depth([record(depth=0.1, correct=True), record(depth=0.95, correct=False)], 5)
    assert [one.rate if one else None for one in found] == [1.0, None, None, None, 0.0]


def test_throughput_counts_every_stream_within_full_load_only() -> None:
    records = [
        record(role="ramp", sent_s=0.0),
        record(role="measured", sent_s=2.0),
        record(role="fill", sent_s=3.0, outcome="cancelled", ttft_ms=None, e2e_ms=None, events=0, gaps_ms=[]),
    ]
    window = full_load_window(records, closed=True)
    assert window == (2.0, 4.0)
    prompt, output = tokens_within(records, *window)
    # The measured prompt whole; the cancelled one has had the usual second.
    assert prompt == pytest.approx(2000)
    assert output == pytest.approx(11)


def test_requests_beside_the_measured_ones_count_by_their_share_of_the_window() -> None:
    # Three at a time, four measured: the second wave ends with two that were started to keep the load, one cut off half-way.
    waves = [record(sent_s=at_s) for at_s in (0.0, 0.0, 0.0, 2.0)]
    beside = [record(role="fill", sent_s=2.0), record(role="fill", sent_s=3.0, outcome="cancelled", ttft_ms=None, e2e_ms=None)]
    window = full_load_window(waves + beside, closed=True)
    assert window == (0.0, 4.0)
    assert requests_within(waves + beside, *window) == pytest.approx(5.5)


def open_loop(every_s: float, e2e_ms: float, requests: int = 10) -> list[RequestRecord]:
    gaps_ms = [(e2e_ms - 100) / 10] * 10
    return [record(planned_s=at * every_s, sent_s=at * every_s, ttft_ms=100.0, e2e_ms=e2e_ms, gaps_ms=gaps_ms)
            for at in range(requests)]  # fmt: skip


def test_each_whole_second_of_the_window_counts_its_own_tokens_and_good_ends() -> None:
    # Tokens at 1.0, 1.1 ... 2.0 and half a second later; the window's last half second is no whole one.
    records = [record(), record(sent_s=0.5, correct=False), record(outcome="rejected", ttft_ms=None, e2e_ms=None)]
    assert output_each_s(records, 0.75, 3.25) == [8 + 3, 3 + 8]
    assert good_each_s(records, LoadConfig(url="http://127.0.0.1:1"), 0.75, 3.25) == [0, 1]
    assert output_each_s(records, 1, 1.5) == []


@pytest.mark.parametrize("e2e_ms", [500.0, 1000.0, 4500.0])
def test_open_loop_rates_are_those_of_the_arrivals_however_long_each_takes(e2e_ms: float) -> None:
    run = CellRun(Cell(1000, 11, rate=2.0), open_loop(0.5, e2e_ms, requests=40))
    found = summarise(run, LoadConfig(url="http://127.0.0.1:1"), TARGET)
    assert found.requests_per_s == pytest.approx(2, rel=0.03)
    assert found.output_tokens_per_s == pytest.approx(22, rel=0.03)


def test_open_loop_that_ends_before_its_first_answer_claims_no_throughput() -> None:
    found = summarise(CellRun(Cell(1000, 11, rate=2.0), open_loop(0.5, 9000.0)), LoadConfig(url="http://127.0.0.1:1"), TARGET)
    assert found.output_tokens_per_s is None
    assert any("use --requests-per-cell" in flag for flag in found.flags)


def test_tokens_of_packed_events_are_counted_as_the_server_counts_them() -> None:
    packed = record(output_tokens=22, events=11)
    assert list(tokens_within([packed], 0, 10)) == pytest.approx([1000, 22])


@pytest.mark.parametrize(
    ("fields", "good"),
    [({}, True), ({"ttft_ms": 1600.0}, False), ({"outcome": "no_done"}, False), ({"correct": False}, False),
     ({"correct": True}, True), ({"e2e_ms": 5000.0}, False)],
)  # fmt: skip
def test_good_requests_meet_every_limit(fields: dict[str, object], good: bool) -> None:
    config = LoadConfig(url="http://127.0.0.1:1", ttft_limit_ms=1500, itl_limit_ms=150)
    assert meets_limits(record(**fields), config) is good


def test_ttft_law_is_found_again() -> None:
    lengths = np.repeat([1024, 2048, 4096, 8192, 16384], 6).astype(float)
    truth = 50 + 0.2 * lengths + 2e-5 * lengths**2
    noisy = truth * (1 + 0.02 * np.random.default_rng(0).standard_normal(lengths.size))
    fit = fit_ttft(lengths.tolist(), noisy.tolist())
    assert fit is not None
    assert fit.b_ms == pytest.approx(0.2, rel=0.15)
    assert fit.c_ms == pytest.approx(2e-5, rel=0.1)
    assert fit.quadratic_from_tokens == pytest.approx(10_000, rel=0.25)
    for length, _, low, high in fit.curve:
        assert low < 50 + 0.2 * length + 2e-5 * length**2 < high


def test_ttft_law_has_no_negative_term() -> None:
    lengths = [1000.0, 2000.0, 4000.0, 8000.0]
    fit = fit_ttft(lengths, [100 * length**0.5 for length in lengths])
    assert fit is not None
    assert min(fit.a_ms, fit.b_ms, fit.c_ms) >= 0
    assert fit.quadratic_from_tokens is None
    assert fit_ttft([1000, 1000, 2000], [1, 1, 2]) is None


def test_throughput_limit_is_found_again() -> None:
    loads = [1, 2, 4, 8, 16]
    # A step of 10 ms, and 0.5 ms for each request in it: 2,000 tokens/s at most, half of that with 20 at once.
    noise = [1.01, 0.99, 1.0, 1.01, 0.99]
    fit = fit_throughput(1024, loads, [load / (0.010 + 0.0005 * load) * n for load, n in zip(loads, noise, strict=True)])
    assert fit is not None
    assert fit.low < 2000 < fit.high
    assert fit.half_at == pytest.approx(20, rel=0.2)
    assert fit_throughput(1024, [1, 2], [100, 150]) is None
    assert fit_throughput(1024, loads, [91.0 * load * n for load, n in zip(loads, noise, strict=True)]) is None, "no limit yet"


def cell(length: int, concurrency: int, ttft_ms: float = 100, rate: float = 1.0) -> CellResult:
    spread = Distribution(n=8, mean=ttft_ms, p50=ttft_ms, p90=ttft_ms, p99=ttft_ms, max=ttft_ms)
    graded = Accuracy(n=8, right=round(8 * rate), rate=rate, low=0, high=1)
    return CellResult(cell=f"{length}x{concurrency}", length=length, concurrency=concurrency, requests=8,
                      outcomes={"ok": 8}, ttft_ms=spread, accuracy=graded)  # fmt: skip


def test_what_fits_stops_at_the_first_load_that_does_not() -> None:
    config = LoadConfig(url="http://127.0.0.1:1", ttft_limit_ms=500, accuracy_limit=0.9)
    cells = [cell(1024, 1), cell(1024, 2), cell(1024, 4, ttft_ms=900), cell(1024, 8), cell(4096, 1), cell(4096, 2, rate=0.5),
             cell(8192, 1, ttft_ms=700)]  # fmt: skip
    assert what_fits(cells, config) == {
        "by_length": {"1024": 2, "4096": 1, "8192": 0}, "longest": 4096, "concurrency_at_longest": 1
    }  # fmt: skip
    assert what_fits(cells, LoadConfig(url="http://127.0.0.1:1")) is None


def answers(name: str, right: list[bool]) -> list[RequestRecord]:
    return [record(cell=name, expected=f"{100_000 + task}", correct=correct) for task, correct in enumerate(right)]


def test_alarm_pairs_the_answers_of_one_task() -> None:
    cells = [cell(1024, 1), cell(1024, 8)]
    alone, half = answers("1024x1", [True] * 12), answers("1024x8", [True] * 6 + [False] * 6)
    assert len(corruption_alarms(cells, alone + half)) == 1
    one_lost = answers("1024x8", [True] * 11 + [False])
    assert corruption_alarms(cells, alone + one_lost) == []
    # As many wrong answers, but the same ones: the model's limit, not the load's doing.
    assert corruption_alarms(cells, answers("1024x1", [True] * 6 + [False] * 6) + half) == []


def test_alarm_counts_the_tasks_that_only_load_asks() -> None:
    """Eight right alone, and half of sixteen wrong under load: four pairs are lost, which alone could be chance."""
    cells = [cell(1024, 1), cell(1024, 16)]
    records = answers("1024x1", [True] * 8) + answers("1024x16", [True, False] * 8)
    (alarm,) = corruption_alarms(cells, records)
    assert "8 of 8 at 1, 8 of 16 at 16" in alarm
    assert corruption_alarms(cells, answers("1024x1", [True, False] * 4) + answers("1024x16", [True, False] * 8)) == []


def test_falling_answers_against_counted_and_simulated_truth() -> None:
    # All of the eight wrong among the sixteen of the last load: one way in C(24, 8) / C(16, 8).
    assert falling_p([(8, 8), (8, 16)]) == pytest.approx(12_870 / 735_471)
    assert falling_p([(8, 16), (8, 8)]) == 1
    assert falling_p([(8, 8), (8, 8)]) == falling_p([(0, 8), (0, 8)]) == falling_p([]) == 1
    # Many answers: by the normal approximation, against shuffled ones.
    counts, draw = [(90, 100), (88, 100), (82, 100)], np.random.default_rng(0)
    scores = np.repeat([0, 1, 2], 100)
    sums = np.array([scores[draw.permutation(300)[:40]].sum() for _ in range(20_000)])
    assert falling_p(counts) == pytest.approx(float((sums >= 12 + 2 * 18).mean()), abs=0.01)


def test_mcnemar() -> None:
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(6, 0) == 1 / 64
    assert mcnemar_p(5, 1) == pytest.approx(7 / 64)
