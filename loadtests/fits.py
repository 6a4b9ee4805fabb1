"""What the figures mean: their laws, and what fits the limits."""

from collections.abc import Sequence
from typing import Any

from loadtests.alarms import corruption_alarms
from loadtests.config import LoadConfig
from loadtests.laws import ThroughputFit, TtftFit, fit_throughput, fit_ttft
from loadtests.records import CellResult, RequestRecord, RunResult


def add_fits(result: RunResult, config: LoadConfig) -> None:
    """Fill `fits` and `alarms` of a result from its cells and records."""
    believed = [cell for cell in result.cells if not cell.refused]
    fit = _fit_at_lowest_load(believed, result.requests)
    result.fits = {
        "ttft": fit.model_dump() if fit else None,
        "throughput": [one.model_dump() for one in _throughput_by_length(believed)],
        "limits": what_fits(believed, config),
    }
    result.alarms = [f"{cell.cell}: {cell.refused}; its figures are refused" for cell in result.cells if cell.refused]
    result.alarms += corruption_alarms(believed, result.requests)


def _fit_at_lowest_load(cells: Sequence[CellResult], records: Sequence[RequestRecord]) -> TtftFit | None:
    """The law of the unloaded server: queueing at higher concurrency is not the length's doing."""
    loads = [cell.concurrency for cell in cells if cell.concurrency is not None]
    if not loads:
        return None
    names = {cell.cell for cell in cells if cell.concurrency == min(loads)}
    points = [
        (record.prompt_tokens, record.ttft_ms)
        for record in records
        if record.cell in names and record.role == "measured" and record.outcome == "ok" and record.ttft_ms
    ]
    return fit_ttft([length for length, _ in points], [ms for _, ms in points], min(loads))


def _throughput_by_length(cells: Sequence[CellResult]) -> list[ThroughputFit]:
    fits = []
    for length in sorted({cell.length for cell in cells}):
        row = [(c.concurrency, c.output_tokens_per_s) for c in cells if c.length == length]
        points = [(concurrency, rate) for concurrency, rate in row if concurrency and rate]
        if fit := fit_throughput(length, [load for load, _ in points], [rate for _, rate in points]):
            fits.append(fit)
    return fits


def what_fits(cells: Sequence[CellResult], config: LoadConfig) -> dict[str, Any] | None:
    """For each length the largest concurrency up to which every cell meets the limits; None without limits."""
    if config.ttft_limit_ms is None and config.itl_limit_ms is None and config.accuracy_limit is None:
        return None
    by_length: dict[int, int] = {}
    for cell in sorted(cells, key=lambda cell: (cell.length, cell.concurrency or 0)):
        if cell.concurrency is None:
            continue
        reached = by_length.setdefault(cell.length, 0)
        smaller = [c.concurrency for c in cells if c.length == cell.length and (c.concurrency or 0) < cell.concurrency]
        if _within_limits(cell, config) and reached == max((c or 0 for c in smaller), default=0):
            by_length[cell.length] = cell.concurrency
    fitting = [length for length, concurrency in by_length.items() if concurrency]
    best = max(fitting, default=None)
    return {
        "by_length": {str(length): concurrency for length, concurrency in by_length.items()},
        "longest": best,
        "concurrency_at_longest": by_length[best] if best is not None else None,
    }


def _within_limits(cell: CellResult, config: LoadConfig) -> bool:
    """Nine requests of ten must keep the latency limits, and none may fail."""
    if cell.ttft_ms is None or set(cell.outcomes) != {"ok"}:
        return False
    ttft = config.ttft_limit_ms is None or cell.ttft_ms.p90 <= config.ttft_limit_ms
    itl = config.itl_limit_ms is None or cell.tpot_ms is None or cell.tpot_ms.p90 <= config.itl_limit_ms
    right = config.accuracy_limit is None or (cell.accuracy is not None and cell.accuracy.rate >= config.accuracy_limit)
    return ttft and itl and right
