"""Two runs side by side: is the second worse, by more than noise and more than is allowed? Exit code 7 tells a CI."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ard_serve import console
from ard_serve.errors import QualityGateError, UsageError
from loadtests.alarms import falling_p, mcnemar_p
from loadtests.config import CompareConfig
from loadtests.output import read_result, write_text
from loadtests.records import CellResult, Record, RequestRecord, RunResult
from loadtests.units import short_ms

Verdict = Literal["worse", "better", "same", "unclear"]
_RESAMPLES = 4000
_FEWEST = 4
# Two runs of one server on an H100, each cell visited once: 16 of 36 latencies apart beyond their intervals.
_ONE_VISIT = "what a machine changes between two visits is in no interval there, measure both again with --repeats 3"
# The tasks follow from the seed and the depths: of other tasks no answers pair up, and nothing lost would be seen.
_SAME_SETTINGS = ("output_tokens", "arrival", "needle", "needle_keys", "seed", "depths")
_LATENCIES: dict[str, Callable[[RequestRecord], float | None]] = {
    "TTFT": lambda record: record.ttft_ms,
    "TPOT": lambda record: record.tpot_ms,
    "E2E": lambda record: record.e2e_ms,
    "longest gap": lambda record: record.longest_gap_ms,
}
_SCHEDULED = "scheduled"  # planned arrival to last token, the headline of an open loop; in a closed one it is E2E again


class Difference(Record):
    """One figure of one cell: `ratio` is other / base of the medians with its interval; above 1 is slower."""

    cell: str
    figure: str
    base: float
    other: float
    ratio: float
    low: float
    high: float
    verdict: Verdict


class Comparison(Record):
    """All figures of all shared cells; `visited_once` are those to which either run came for one repeat only."""

    base: str
    other: str
    differences: list[Difference]
    only_in_one: list[str]
    refused: list[str]
    visited_once: list[str]
    died: bool = False


def run(config: CompareConfig) -> int:
    """Print the comparison; returns 0.

    Raises:
        QualityGateError: something is worse; names it.
    """
    comparison = compare(config)
    console.print_table(
        f"{comparison.other} against {comparison.base}",
        ("cell", "figure", "base", "other", "ratio", "interval", "verdict"),
        [
            (d.cell, d.figure, _shown(d, d.base), _shown(d, d.other), f"{d.ratio:.3f}", f"{d.low:.3f}–{d.high:.3f}", d.verdict)
            for d in comparison.differences
        ],
    )
    counted = Counter(difference.verdict for difference in comparison.differences)
    told = [", ".join(f"{count} {verdict}" for verdict, count in counted.most_common())]
    told += [f"refused: {', '.join(comparison.refused)}"] if comparison.refused else []
    told += [f"in one run only: {', '.join(comparison.only_in_one)}"] if comparison.only_in_one else []
    told += [f"visited only once: {_listed(comparison)}; {_ONE_VISIT}"] if comparison.visited_once else []
    console.err.print("; ".join(told), highlight=False, soft_wrap=True)
    if config.out:
        write_text(config.out, comparison.model_dump_json(indent=1))
    if worse := [d for d in comparison.differences if d.verdict == "worse"]:
        first = max(worse, key=lambda d: d.ratio)
        raise QualityGateError(
            f"{len(worse)} of {len(comparison.differences)} figures are worse, first {first.figure} of {first.cell}: "
            f"{_shown(first, first.other)} against {_shown(first, first.base)}, allowed {config.allowed:.0%}"
        )
    if comparison.died:
        raise QualityGateError(f"{comparison.other}: its server died, which that of {comparison.base} did not")
    return 0


def _listed(comparison: Comparison) -> str:
    """The cells that were visited once, by name where others were not."""
    cells = {difference.cell for difference in comparison.differences}
    return ", ".join(comparison.visited_once) if cells - {*comparison.visited_once} else "every cell"


def _shown(difference: Difference, value: float) -> str:
    return short_ms(value) if difference.figure in (*_LATENCIES, _SCHEDULED) else f"{value:.0%}"


def compare(config: CompareConfig) -> Comparison:
    """Judge every cell that both runs have.

    Raises:
        DataError: a file is not a result.
        UsageError: the runs asked different things, or share no cell that can be believed.
    """
    base, other = read_result(config.base), read_result(config.other)
    for name in _SAME_SETTINGS:
        if base.settings.get(name) != other.settings.get(name):
            raise UsageError(
                f"{name}: {base.settings.get(name)} against {other.settings.get(name)}; runs that ask different things do not "
                "compare, run one again with the other's settings"
            )
    mine, yours = ({cell.cell: cell for cell in result.cells} for result in (base, other))
    shared = [name for name in mine if name in yours]
    if not shared:
        raise UsageError(f"no cell in common: {', '.join(mine)} against {', '.join(yours)}; run the same grid")
    refused = [name for name in shared if mine[name].refused or yours[name].refused]
    if len(refused) == len(shared):
        raise UsageError(f"every cell in common was refused: {', '.join(refused)}; run again without the prefix cache")
    differences = [
        difference
        for name in shared
        if name not in refused
        for difference in _cell(mine[name], yours[name], _measured(base, name), _measured(other, name), config)
    ]
    once = [name for name in shared if name not in refused and min(_visits(base, name), _visits(other, name)) < 2]
    return Comparison(base=str(config.base), other=str(config.other), differences=differences,
                      only_in_one=sorted(mine.keys() ^ yours.keys()), refused=refused,
                      died=other.status == "server_died" != base.status, visited_once=once)  # fmt: skip


def _measured(result: RunResult, cell: str) -> list[RequestRecord]:
    return [record for record in result.requests if record.cell == cell and record.role == "measured"]


def _visits(result: RunResult, cell: str) -> int:
    return len({record.repeat for record in _measured(result, cell)})


def _cell(
    mine: CellResult, yours: CellResult, base: list[RequestRecord], other: list[RequestRecord], config: CompareConfig
) -> list[Difference]:
    found = []
    figures = _LATENCIES if mine.concurrency is not None else {_SCHEDULED: _scheduled_ms, **_LATENCIES}
    for figure, pick in figures.items():
        before, after = _values(base, pick), _values(other, pick)
        if before and after:
            found.append(_latency(mine.cell, figure, before, after, config))
    lost, won = _answers(base, other)
    if mine.accuracy and yours.accuracy:
        verdict: Verdict = (
            "worse" if mcnemar_p(lost, won) < config.accuracy_p else "better" if mcnemar_p(won, lost) < config.accuracy_p
            else "same" if lost == won else "unclear"
        )  # fmt: skip
        # As a ratio of wrong answers a perfect base would divide by zero: the share of right ones is inverted instead.
        ratio = (mine.accuracy.rate or 1) / max(yours.accuracy.rate, 1e-9) if mine.accuracy.rate else 1.0
        found.append(Difference(cell=mine.cell, figure="right answers", base=mine.accuracy.rate, other=yours.accuracy.rate,
                                ratio=ratio, low=ratio, high=ratio, verdict=verdict))  # fmt: skip
    failed = [sum(record.outcome != "ok" for record in records) / max(1, len(records)) for records in (base, other)]
    if any(failed):
        verdict = _failures(base, other, config)
        ratio = (1 - failed[0]) / max(1 - failed[1], 1e-9)
        found.append(Difference(cell=mine.cell, figure="failed requests", base=failed[0], other=failed[1], ratio=ratio,
                                low=ratio, high=ratio, verdict=verdict))  # fmt: skip
    return found


def _failures(base: Sequence[RequestRecord], other: Sequence[RequestRecord], config: CompareConfig) -> Verdict:
    """Where nothing failed before, one failure is worse; where some did, more must be beyond chance (Fisher's exact test)."""
    before, after = ([record.outcome == "ok" for record in records] for records in (base, other))
    if all(before) != all(after):
        return "worse" if all(before) else "better"
    if sum(before) * len(after) == sum(after) * len(before):
        return "same"
    counts = [(sum(one), len(one)) for one in (before, after)]
    rose, fell = falling_p(counts), falling_p(counts[::-1])
    return "worse" if rose < config.accuracy_p else "better" if fell < config.accuracy_p else "unclear"


def _scheduled_ms(record: RequestRecord) -> float | None:
    return None if record.e2e_ms is None else 1000 * (record.end_s - record.planned_s)


def _values(records: Sequence[RequestRecord], pick: Callable[[RequestRecord], float | None]) -> list[list[float]]:
    """A figure of each request that ended well, a list for each visit to the cell."""
    visits: dict[int, list[float]] = {}
    for record in records:
        if record.outcome == "ok" and (value := pick(record)) is not None:
            visits.setdefault(record.repeat, []).append(value)
    return list(visits.values())


def _latency(cell: str, figure: str, before: list[list[float]], after: list[list[float]], config: CompareConfig) -> Difference:
    """Bootstrap of the ratio of medians (Efron 1979), seeded; fewer than four requests a side settle nothing."""
    draw = np.random.default_rng(0)
    ratios = _medians(draw, after) / _medians(draw, before)
    tail = (1 - config.confidence) / 2
    low, high = (float(edge) for edge in np.quantile(ratios, (tail, 1 - tail)))
    base, other = (float(np.median(np.concatenate(visits))) for visits in (before, after))
    enough = min(sum(map(len, visits)) for visits in (before, after)) >= _FEWEST
    verdict = judge(other / base, low, high, config.allowed) if enough else "unclear"
    return Difference(cell=cell, figure=figure, base=base, other=other, ratio=other / base, low=low, high=high, verdict=verdict)


def _medians(draw: np.random.Generator, visits: list[list[float]]) -> NDArray[np.float64]:
    """Medians of what might have been measured: other visits first, then other requests of each.

    Requests of one visit are alike in what the machine did meanwhile, so that drawing among all of them would take its drift
    for the server's.
    """
    sizes = np.array([len(visit) for visit in visits])
    padded = np.full((len(visits), sizes.max()), np.nan)
    for row, visit in zip(padded, visits, strict=True):
        row[: len(visit)] = visit
    chosen = draw.integers(0, len(visits), (_RESAMPLES, len(visits)))
    picked = draw.integers(0, sizes[chosen][..., None], (*chosen.shape, padded.shape[1]))
    values = padded[chosen[..., None], picked]
    values[np.arange(padded.shape[1]) >= sizes[chosen][..., None]] = np.nan
    flat = values.reshape(_RESAMPLES, -1)
    return np.asarray(np.nanmedian(flat, axis=1) if np.isnan(flat).any() else np.median(flat, axis=1))


def judge(ratio: float, low: float, high: float, allowed: float) -> Verdict:
    """Worse or better only if the median moved by more than is allowed and the interval leaves out no change at all."""
    if ratio > 1 + allowed and low > 1:
        return "worse"
    if ratio < 1 / (1 + allowed) and high < 1:
        return "better"
    return "same" if low >= 1 / (1 + allowed) and high <= 1 + allowed else "unclear"


def _answers(base: Sequence[RequestRecord], other: Sequence[RequestRecord]) -> tuple[int, int]:
    """(lost, won) answers among the tasks that both runs asked."""
    before, after = (
        {record.expected: record.correct for record in records if record.correct is not None} for records in (base, other)
    )
    both = before.keys() & after.keys()
    lost = sum(bool(before[task]) and not after[task] for task in both)
    return lost, sum(bool(after[task]) and not before[task] for task in both)
