"""What the figures mean: TTFT against length as a law, what fits the limits, and answers that go wrong under load."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from loadtests.config import LoadConfig
from loadtests.records import CellResult, Record, RequestRecord, RunResult

_ALARM_P = 0.02
_CURVE_POINTS = 48


class TtftFit(Record):
    """TTFT in ms as a + b L + c L^2 over prompt tokens L, with 95% bands of the mean.

    `quadratic_from_tokens` is where c L^2 passes b L: beyond it attention costs more than everything else.
    `curve` holds (length, ttft, low, high).
    """

    a_ms: float
    b_ms: float
    c_ms: float
    concurrency: int | None
    requests: int
    quadratic_from_tokens: float | None
    curve: list[tuple[float, float, float, float]]


def add_fits(result: RunResult, config: LoadConfig) -> None:
    """Fill `fits` and `alarms` of a result from its cells and records."""
    believed = [cell for cell in result.cells if not cell.refused]
    fit = _fit_at_lowest_load(believed, result.requests)
    result.fits = {"ttft": fit.model_dump() if fit else None, "limits": what_fits(believed, config)}
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


def fit_ttft(lengths: Sequence[float], ttft_ms: Sequence[float], concurrency: int | None = None) -> TtftFit | None:
    """Least squares on relative errors with non-negative terms; None for fewer than three distinct lengths.

    Relative, because a TTFT of ten seconds scatters by more than one of fifty milliseconds.
    """
    if len(set(lengths)) < 3:
        return None
    x, y = np.asarray(lengths, dtype=float), np.asarray(ttft_ms, dtype=float)
    scale = x.max()
    powers = [0, 1, 2]
    while True:
        design = np.stack([(x / scale) ** power for power in powers], axis=1) / y[:, None]
        solution = np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0]
        if (solution >= 0).all() or len(powers) == 1:
            break
        powers.remove(powers[int(solution.argmin())])
    residual = design @ solution - 1
    variance = float(residual @ residual) / max(1, len(y) - len(powers))
    covariance = variance * np.linalg.pinv(design.T @ design)
    at = np.linspace(x.min(), scale, _CURVE_POINTS)
    basis = np.stack([(at / scale) ** power for power in powers], axis=1)
    mean = basis @ solution
    half = 1.96 * np.sqrt(np.einsum("ij,jk,ik->i", basis, covariance, basis))
    terms = {power: float(value) / scale**power for power, value in zip(powers, solution, strict=True)}
    b, c = terms.get(1, 0.0), terms.get(2, 0.0)
    rows = zip(at.round(1).tolist(), mean.tolist(), (mean - half).tolist(), (mean + half).tolist(), strict=True)
    return TtftFit(
        a_ms=terms.get(0, 0.0), b_ms=b, c_ms=c, concurrency=concurrency, requests=len(y),
        quadratic_from_tokens=b / c if c else None, curve=[tuple(round(v, 3) for v in row) for row in rows],
    )  # fmt: skip


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


def corruption_alarms(cells: Sequence[CellResult], records: Sequence[RequestRecord]) -> list[str]:
    """Tasks answered right at the lowest concurrency and wrong at a higher one, more often than chance explains.

    The same tasks are asked at each concurrency (only their random heads differ), so that the answers pair up:
    McNemar's exact test, one-sided, for each length.
    """
    alarms = []
    for length in sorted({cell.length for cell in cells if cell.concurrency is not None}):
        row = sorted((c for c in cells if c.length == length and c.concurrency), key=lambda cell: cell.concurrency or 0)
        alone = _answers(row[0], records)
        for cell in row[1:]:
            loaded = _answers(cell, records)
            lost = sum(alone[task] and not loaded[task] for task in alone.keys() & loaded.keys())
            won = sum(loaded[task] and not alone[task] for task in alone.keys() & loaded.keys())
            p = mcnemar_p(lost, won)
            if p < _ALARM_P:
                alarms.append(
                    f"{length} tokens: {lost} answers right at concurrency {row[0].concurrency} are wrong at "
                    f"{cell.concurrency} ({won} the other way, p = {p:.2g}); the sign of corrupted prefill"
                )
    return alarms


def mcnemar_p(lost: int, won: int) -> float:
    """Chance of at least `lost` losses among the answers that changed, were both ways equally likely."""
    changed = lost + won
    return sum(math.comb(changed, k) for k in range(lost, changed + 1)) / float(2**changed)


def _answers(cell: CellResult, records: Sequence[RequestRecord]) -> dict[str, bool]:
    """Answer of each task, known by the number it hides."""
    return {
        record.expected: record.correct
        for record in records
        if record.cell == cell.cell and record.role == "measured" and record.correct is not None
    }
