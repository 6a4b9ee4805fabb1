"""The bars that a restored model was to reach, each beside what was measured: for scripts/quality_table.py.

Rows are those of docs/results/quality-*.json. A figure is the mean over the seeds of the recipe that is judged.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]
_SIGNIFICANCE = 0.05
# What the judged recipe is not to beat: native weights, and our own way to get the native model back.
_NO_BASELINES = ("native", "twin", "distill")
_Bar = tuple[str, str, bool]


def bars(columns: Mapping[str, Sequence[Row]], judged: str, uncounted: frozenset[str], native_window: str) -> list[str]:
    """Lines of a Markdown table.

    Args:
        columns: rows of each recipe, one a seed, "native", "none" and "twin" (native weights after as much text) among them.
        judged: the recipe that is held to the bars.
        uncounted: tasks that stand in no mean.
        native_window: the native length, as the rows' keys have it.
    """
    native, ours = columns["native"][0], columns[judged]
    found = [
        *_short(native, ours, uncounted),
        *_perplexity(columns, ours, native_window),
        *_needles(native, ours, native_window),
    ]
    baselines = [name for name in columns if name not in (*_NO_BASELINES, judged)]
    found += [bar for name in baselines for bar in _beaten(name, columns[name], ours)]
    return ["| bar | measured | |", "|---|---|---|", *(f"| {what} | {said} | {_met(met)} |" for what, said, met in found)]


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def _short(native: Row, ours: Sequence[Row], uncounted: frozenset[str]) -> Iterator[_Bar]:
    kept = _mean(ours, "retention")
    yield "short tasks keep 99.5% of native", f"{kept:.1%}", kept >= 0.995
    tasks = [task for task in native["short"] if task not in uncounted]
    worse = [
        f"{task} (seed {row['seed']})"
        for row in ours
        for task in tasks
        if row["short"][task] < native["short"][task] and row["short_p"][task] < _SIGNIFICANCE / len(tasks)
    ]
    yield f"no task significantly worse (p below 0.05 / {len(tasks)})", ", ".join(worse) or "none", not worse


def _perplexity(columns: Mapping[str, Sequence[Row]], ours: Sequence[Row], native_window: str) -> Iterator[_Bar]:
    inside = [length for length in ours[0]["ppl"] if int(length) <= int(native_window)]
    for name, called in (("native", "native"), ("twin", "the native model after as much text")):
        for length in inside if name in columns else ():
            ratio = _at(ours, "ppl", length) / _at(columns[name], "ppl", length)
            yield f"perplexity at {int(length):,} tokens within 0.5% of {called}", f"{ratio - 1:+.1%}", ratio <= 1.005
    longest = max(ours[0]["ppl"], key=int)
    measured, anchor = _at(ours, "ppl", longest), _at(columns["native"], "ppl", native_window)
    said = f"{measured:.1f}, native {anchor:.1f}"
    yield f"perplexity at {int(longest):,} no worse than native at {int(native_window):,}", said, measured <= anchor


def _needles(native: Row, ours: Sequence[Row], native_window: str) -> Iterator[_Bar]:
    least = native["needle"][native_window]
    for length in (length for length in native["needle"] if int(length) > int(native_window)):
        found = _at(ours, "needle", length)
        what = f"needles at {int(length):,} at least native's at {int(native_window):,}"
        yield what, f"{found:.0%}, native {least:.0%}", found >= least


def _beaten(name: str, rows: Sequence[Row], ours: Sequence[Row]) -> Iterator[_Bar]:
    called = {"none": "the untouched stretched model"}.get(name, f"`{name}`")
    kept, theirs = _mean(ours, "retention"), _mean(rows, "retention")
    yield f"{called} beaten on short tasks", f"{kept:.1%}, {theirs:.1%}", kept > theirs
    longest = max(ours[0]["ppl"], key=int)
    read, they_read = _at(ours, "ppl", longest), _at(rows, "ppl", longest)
    yield f"{called} beaten on long text ({int(longest):,} tokens)", f"{read:.2f}, {they_read:.2f}", read < they_read


def _mean(rows: Sequence[Row], figure: str) -> float:
    return fmean(row[figure] for row in rows)


def _at(rows: Sequence[Row], figure: str, length: str) -> float:
    return fmean(row[figure][length] for row in rows)
