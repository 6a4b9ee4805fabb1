"""Whether one of two sides is slower, from pairs of blocks that did the same work one after the other.

What drifts in an engine, a clock or a neighbour's work, is nearly the same within a pair and cancels; alternating which side
goes first takes out what is left of a steady drift. The bar and the time are set beforehand, not by how it looks.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

_LEVEL = 0.95


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of independent values and the ends of its 95% confidence interval by Student's t."""
    low, high = stats.ttest_1samp(values, 0).confidence_interval(_LEVEL)
    return statistics.fmean(values), float(low), float(high)


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and an interval of at least 95% that supposes nothing of how the values are spread; outliers do not widen it."""
    low, high = stats.quantile_test(values, p=0.5).confidence_interval(_LEVEL)
    return statistics.median(values), float(low), float(high)


def loss(seconds: Sequence[tuple[float, float]], limit_percent: float) -> dict[str, Any]:
    """Throughput that the second side loses, in per cent, from the seconds that both took for each pair's block of work.

    `verdict` compares the interval of the mean with the limit: met, missed, or undecided where the limit lies inside.
    """
    logs = [math.log(second / first) for first, second in seconds]

    def percent(triple: tuple[float, float, float]) -> list[float]:
        return [round(100 * (1 - math.exp(-value)), 3) for value in triple]

    mean, low, high = percent(interval(logs))
    middle, middle_low, middle_high = percent(median_interval(logs))
    verdict = "met" if high <= limit_percent else "missed" if low > limit_percent else "undecided"
    return {
        "pairs": len(logs),
        "loss_percent": {"mean": mean, "low": low, "high": high},
        "loss_percent_median": {"median": middle, "low": middle_low, "high": middle_high},
        "spread_of_a_pair_percent": round(100 * statistics.stdev(logs), 2),
        "limit_percent": limit_percent,
        "verdict": verdict,
    }
