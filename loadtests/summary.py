"""From one cell's records and readings to its row in the result: the figures, what is refused and what is flagged."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from loadtests.config import LoadConfig
from loadtests.memory import peak_use
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
from loadtests.records import CellMemory, CellResult, RequestRecord
from loadtests.scenario import Cell
from loadtests.target import Target

Number = TypeVar("Number", int, float)
_LATE_MS = 100
# Engines that cache single tokens (SGLang, llama.cpp) reuse the BOS, and a word or two where random heads begin alike.
_CACHED_SHARE = 0.01


@dataclass
class Readings:
    """What was read beside one cell, over its repeats: counters summed, gauges at their peaks; None where not reported."""

    cached_tokens: int | None = None
    preemptions: int | None = None
    kv_use: float | None = None
    waiting: int | None = None
    server_rss_bytes: int | None = None
    gpu_bytes: int | None = None
    load_average: float = 0
    client_lag_ms: float = 0

    def add(self, other: "Readings") -> None:
        """Take in another repeat."""
        self.cached_tokens = _sum(self.cached_tokens, other.cached_tokens)
        self.preemptions = _sum(self.preemptions, other.preemptions)
        self.kv_use = _max(self.kv_use, other.kv_use)
        self.waiting = _max(self.waiting, other.waiting)
        self.server_rss_bytes = _max(self.server_rss_bytes, other.server_rss_bytes)
        self.gpu_bytes = _max(self.gpu_bytes, other.gpu_bytes)
        self.load_average = max(self.load_average, other.load_average)
        self.client_lag_ms = max(self.client_lag_ms, other.client_lag_ms)


@dataclass
class CellRun:
    """Everything one cell has collected so far."""

    cell: Cell
    records: list[RequestRecord] = field(default_factory=list)
    readings: Readings = field(default_factory=Readings)
    too_long: int = 0


def summarise(run: CellRun, config: LoadConfig, target: Target) -> CellResult:
    """The cell's result; records may be those of a run that was cut short."""
    cell, measured = run.cell, [record for record in run.records if record.role == "measured"]
    ok = [record for record in measured if record.outcome == "ok"]
    result = CellResult(
        cell=cell.name,
        length=cell.length,
        concurrency=cell.concurrency,
        rate=cell.rate,
        requests=len(measured),
        outcomes=dict(sorted(Counter(record.outcome for record in measured).items())),
        refused=_refusal(run),
        flags=_flags(run, measured, target),
        ttft_ms=distribution(record.ttft_ms for record in ok if record.ttft_ms is not None),
        itl_ms=distribution(gap for record in ok for gap in record.gaps_ms),
        tpot_ms=distribution(record.tpot_ms for record in ok if record.tpot_ms is not None),
        e2e_ms=distribution(record.e2e_ms for record in ok if record.e2e_ms is not None),
        scheduled_ms=distribution((record.end_s - record.planned_s) * 1000 for record in ok),
        late_ms=distribution(record.late_ms for record in measured),
        accuracy=accuracy(ok),
        accuracy_by_depth=by_depth(ok, config.depths),
        load_average=run.readings.load_average,
        client_lag_ms=run.readings.client_lag_ms,
    )
    if events := sum(record.events for record in ok):
        result.tokens_per_event = round(sum(record.output_tokens for record in ok) / events, 3)
    _add_rates(result, run, config)
    if ok and not result.window_s:
        result.flags.append("all requests had arrived before the first one ended: no throughput; use --requests-per-cell")
    _add_memory(result, run, target)
    return result


def _add_rates(result: CellResult, run: CellRun, config: LoadConfig) -> None:
    prompt = output = requests = window_s = 0.0
    tokens_by_second: list[float] = []
    good_by_second: list[float] = []
    for repeat in sorted({record.repeat for record in run.records}):
        records = [record for record in run.records if record.repeat == repeat]
        window = start_s, end_s = full_load_window(records, run.cell.concurrency is not None)
        more_prompt, more_output = tokens_within(records, *window)
        prompt, output, window_s = prompt + more_prompt, output + more_output, window_s + end_s - start_s
        requests += requests_within(records, *window)
        tokens_by_second += output_each_s(records, *window)
        good_by_second += good_each_s(records, config, *window)
    measured = [record for record in run.records if record.role == "measured"]
    # Of a cell that was interrupted before any request ended, the window is an accident.
    if window_s <= 0 or all(record.outcome == "cancelled" for record in measured):
        return
    result.window_s = round(window_s, 4)
    result.prompt_tokens_per_s = round(prompt / window_s, 2)
    result.output_tokens_per_s = round(output / window_s, 2)
    # Those beside the measured ones are not graded against the limits: the measured ones stand for them.
    ok = sum(record.outcome == "ok" for record in measured)
    good = sum(meets_limits(record, config) for record in measured)
    result.requests_per_s = round(requests / window_s, 4)
    result.output_tokens_each_s, result.good_requests_each_s = distribution(tokens_by_second), distribution(good_by_second)
    result.goodput_per_s = round(requests / window_s * good / ok, 4) if ok else 0.0


def _add_memory(result: CellResult, run: CellRun, target: Target) -> None:
    predicted = None
    if target.kv_tokens:
        repeats = {record.repeat for record in run.records}
        peaks = [
            peak_use([record for record in run.records if record.repeat == repeat], target.kv_tokens, target.block_tokens)
            for repeat in repeats
        ]
        predicted = max((peak for peak in peaks if peak is not None), default=None)
    readings = run.readings
    result.memory = CellMemory(
        predicted_kv=predicted,
        observed_kv=readings.kv_use,
        preemptions=readings.preemptions,
        waiting=readings.waiting,
        server_rss_bytes=readings.server_rss_bytes,
        gpu_bytes=readings.gpu_bytes,
    )


def _refusal(run: CellRun) -> str:
    """Why the cell's latencies are not to be believed: a cache answered a part of its prompts."""
    told = sum(record.cached_tokens or 0 for record in run.records)
    cached = max(run.readings.cached_tokens or 0, told)
    sent = sum(record.prompt_tokens for record in run.records)
    return f"the prefix cache answered {cached} of {sent} prompt tokens" if cached > _CACHED_SHARE * sent else ""


def _flags(run: CellRun, measured: Sequence[RequestRecord], target: Target) -> list[str]:
    flags = []
    if run.too_long:
        flags.append(
            f"{run.too_long} requests of the trace are longer than the window of {target.served_limit} and were left out"
        )
    wrong = [r for r in measured if r.reported_prompt_tokens is not None and r.reported_prompt_tokens != r.prompt_tokens]
    if wrong and target.exact:
        flags.append(
            f"the server counts {wrong[0].reported_prompt_tokens} prompt tokens where {wrong[0].prompt_tokens} were sent "
            f"({len(wrong)} of {len(measured)} requests)"
        )
    if late := sum(record.late_ms > _LATE_MS for record in measured):
        worst_s = max(record.late_ms for record in measured) / 1000
        flags.append(f"{late} of {len(measured)} requests were sent more than {_LATE_MS} ms late, the worst {worst_s:.1f} s")
    if (lag_ms := run.readings.client_lag_ms) > _LATE_MS:
        flags.append(
            f"this client itself was held up for {lag_ms:.0f} ms, so that its machine is short of processors; gaps and first "
            "tokens of that moment are its own"
        )
    if lost := sum(record.outcome != "ok" for record in measured):
        flags.append(f"{lost} of {len(measured)} requests failed and are in no latency")
    return flags


def _sum(a: int | None, b: int | None) -> int | None:
    return b if a is None else a + (b or 0)


def _max(a: Number | None, b: Number | None) -> Number | None:
    return b if a is None else a if b is None else max(a, b)
