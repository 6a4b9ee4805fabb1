"""From raw records to figures: percentiles pooled over requests, throughput at full load, goodput, accuracy.

Definitions are those of docs/loadtests.md. Percentiles are never averaged; a failed request never counts as latency.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from loadtests.config import LoadConfig
from loadtests.records import Accuracy, Distribution, RequestRecord

_Z_95 = 1.959964


def distribution(values: Iterable[float]) -> Distribution | None:
    """Percentiles by linear interpolation, or None for no values."""
    data = np.fromiter(values, dtype=float)
    if data.size == 0:
        return None
    p50, p90, p99 = np.percentile(data, (50, 90, 99))
    figures = {"mean": data.mean(), "p50": p50, "p90": p90, "p99": p99, "max": data.max()}
    return Distribution(n=data.size, **{name: round(float(value), 4) for name, value in figures.items()})


def accuracy(records: Iterable[RequestRecord]) -> Accuracy | None:
    """Right answers among the graded ones, with Wilson's 95% interval (Wilson 1927), or None when none is graded."""
    graded = [record.correct for record in records if record.correct is not None]
    if not graded:
        return None
    n, right = len(graded), sum(graded)
    rate, z2 = right / n, _Z_95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z_95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return Accuracy(n=n, right=right, rate=rate, low=round(max(0, centre - half), 4), high=round(min(1, centre + half), 4))


def by_depth(records: Sequence[RequestRecord], depths: int) -> list[Accuracy | None]:
    """Accuracy in each stratum of depth, from the start of the prompt to its end."""
    strata: list[list[RequestRecord]] = [[] for _ in range(depths)]
    for record in records:
        if record.depth is not None:
            strata[min(depths - 1, int(record.depth * depths))].append(record)
    return [accuracy(stratum) for stratum in strata]


def meets_limits(record: RequestRecord, config: LoadConfig) -> bool:
    """Whether a request is good: it succeeded within every limit and, where it was graded, answered right."""
    if record.outcome != "ok" or record.correct is False:
        return False
    if config.ttft_limit_ms is not None and (record.ttft_ms or math.inf) > config.ttft_limit_ms:
        return False
    return config.itl_limit_ms is None or (record.tpot_ms or 0) <= config.itl_limit_ms


def full_load_window(records: Sequence[RequestRecord], closed: bool) -> tuple[float, float]:
    """When the load was at its target: (start, end) in seconds of the run; an empty window where it never was.

    Closed loop: from the first measured request's writing to the last one's last token. Open loop: from the first end of a
    request, since those that arrive before it find the server emptier than it will be, and the second arrival at the
    earliest, to one mean interval after the last planned arrival; the drain is left out.
    """
    measured = [record for record in records if record.role == "measured"]
    if not measured:
        return 0, 0
    if closed:
        return min(record.sent_s for record in measured), max(record.end_s for record in measured)
    planned = sorted(record.planned_s for record in measured)
    ends = [record.end_s for record in measured if record.outcome == "ok"]
    if len(planned) < 2 or not ends:
        return 0, 0
    end_s = planned[-1] + (planned[-1] - planned[0]) / (len(planned) - 1)
    return min(end_s, max(min(ends), planned[1])), end_s


def requests_within(records: Sequence[RequestRecord], start_s: float, end_s: float) -> float:
    """Requests that the server worked off between two instants, whoever started them, each by the share of its time inside.

    A cancelled request is taken to need the median time of the others.
    """
    ok = [record for record in records if record.outcome == "ok" and record.e2e_ms]
    usual_s = float(np.median([record.end_s - record.sent_s for record in ok])) if ok else 0
    done = 0.0
    for record in records:
        if record.outcome not in ("ok", "cancelled"):
            continue
        took_s = usual_s if record.outcome == "cancelled" else record.end_s - record.sent_s
        inside_s = min(end_s, record.sent_s + took_s) - max(start_s, record.sent_s)
        if took_s > 0 and inside_s > 0:
            done += inside_s / took_s
    return done


def tokens_within(records: Sequence[RequestRecord], start_s: float, end_s: float) -> tuple[float, float]:
    """(prompt, output) tokens that the server worked off between two instants, whichever requests they belong to.

    A prompt's tokens are spread evenly over the time to its first token; a request cancelled before that is taken to
    need the median time of the others.
    """
    ok = [record for record in records if record.ttft_ms is not None]
    usual_ms = float(np.median([record.ttft_ms or 0 for record in ok])) if ok else 0
    total_events = sum(record.events for record in ok if record.outcome == "ok")
    usual_tokens = sum(record.output_tokens for record in ok if record.outcome == "ok") / total_events if total_events else 1
    prompt = output = 0.0
    for record in records:
        if record.outcome not in ("ok", "cancelled"):
            continue
        prefill_s = (usual_ms if record.ttft_ms is None else record.ttft_ms) / 1000
        inside_s = min(end_s, record.sent_s + prefill_s) - max(start_s, record.sent_s)
        if prefill_s > 0 and inside_s > 0:
            prompt += record.prompt_tokens * inside_s / prefill_s
        per_event = record.output_tokens / record.events if record.outcome == "ok" else usual_tokens
        output += per_event * sum(start_s < at_s <= end_s for at_s in token_times_s(record))
    return prompt, output


def output_each_s(records: Sequence[RequestRecord], start_s: float, end_s: float) -> list[float]:
    """Output tokens of each whole second between two instants, whichever requests they belong to."""
    tokens = [
        (at_s, record.output_tokens / record.events if record.outcome == "ok" else 1.0)
        for record in records
        if record.outcome in ("ok", "cancelled")
        for at_s in token_times_s(record)
    ]
    return _each_s(tokens, start_s, end_s)


def good_each_s(records: Sequence[RequestRecord], config: LoadConfig, start_s: float, end_s: float) -> list[float]:
    """Good requests that ended in each whole second between two instants."""
    return _each_s([(record.end_s, 1.0) for record in records if meets_limits(record, config)], start_s, end_s)


def _each_s(amounts: Iterable[tuple[float, float]], start_s: float, end_s: float) -> list[float]:
    sums = [0.0] * int(end_s - start_s)
    for at_s, amount in amounts:
        if 0 <= (second := math.floor(at_s - start_s)) < len(sums):
            sums[second] += amount
    return sums


def token_times_s(record: RequestRecord) -> list[float]:
    """The instants of a request's token-bearing events, in seconds of the run."""
    if record.ttft_ms is None:
        return []
    first_s = record.sent_s + record.ttft_ms / 1000
    return [first_s + offset_ms / 1000 for offset_ms in itertools.accumulate(record.gaps_ms, initial=0.0)]
