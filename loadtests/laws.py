"""Laws behind the figures: time to first token against length, throughput against concurrency, with 95% bands."""

from collections.abc import Sequence

import numpy as np

from loadtests.records import Record

_CURVE_POINTS = 48
# Student's two-sided 95% quantiles for 1 to 10 degrees of freedom; few requests make wide bands.
_T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


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


class ThroughputFit(Record):
    """A step that serves C requests takes a + b C, so that tokens per second rise towards `limit_tokens_per_s` = 1 / b.

    `half_at` is the concurrency that reaches half of it; `low` and `high` are the limit's 95% interval.
    """

    length: int
    cells: int
    limit_tokens_per_s: float
    low: float
    high: float
    half_at: float


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
    half = _t_95(len(y) - len(powers)) * np.sqrt(np.einsum("ij,jk,ik->i", basis, covariance, basis))
    terms = {power: float(value) / scale**power for power, value in zip(powers, solution, strict=True)}
    b, c = terms.get(1, 0.0), terms.get(2, 0.0)
    rows = zip(at.round(1).tolist(), mean.tolist(), (mean - half).tolist(), (mean + half).tolist(), strict=True)
    return TtftFit(
        a_ms=terms.get(0, 0.0), b_ms=b, c_ms=c, concurrency=concurrency, requests=len(y),
        quadratic_from_tokens=b / c if c else None, curve=[tuple(round(v, 3) for v in row) for row in rows],
    )  # fmt: skip


def fit_throughput(length: int, concurrencies: Sequence[float], tokens_per_s: Sequence[float]) -> ThroughputFit | None:
    """Least squares on relative errors; None for fewer than three loads, or where no limit shows yet."""
    if len(concurrencies) < 3 or min(tokens_per_s) <= 0:
        return None
    load, step_s = np.asarray(concurrencies, dtype=float), np.asarray(concurrencies) / np.asarray(tokens_per_s)
    design = np.stack([np.ones_like(load), load], axis=1) / step_s[:, None]
    (a, b), *_ = np.linalg.lstsq(design, np.ones_like(load), rcond=None)
    residual = design @ np.array([a, b]) - 1
    variance = float(residual @ residual) / (len(load) - 2)
    half = _t_95(len(load) - 2) * float(np.sqrt(variance * np.linalg.inv(design.T @ design)[1, 1]))
    if b <= half:
        return None
    return ThroughputFit(
        length=length, cells=len(load), limit_tokens_per_s=float(1 / b), low=float(1 / (b + half)), high=float(1 / (b - half)),
        half_at=max(0.0, float(a / b)),
    )  # fmt: skip


def _t_95(freedom: int) -> float:
    return _T_95[freedom - 1] if 0 < freedom <= len(_T_95) else 1.96 + 2.5 / max(freedom, 1)
