"""Is a restored model good enough to be published, and up to which length: limits held against what was measured."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from ard_serve.errors import UsageError
from restore.evaluation.compare import paired_p_value, paired_tasks
from restore.evaluation.config import GateConfig
from restore.evaluation.results import Evaluation, EvaluationReport, TaskScore, mean_stderr

# A retention below its limit by less than this many standard errors may be chance.
_STANDARD_ERRORS = 2.0
_NAMED_FAILURES = 3


@dataclass(frozen=True)
class Check:
    """One figure, as it is told, held to its limit: the least or the most that it may be."""

    what: str
    measured: str
    limit: str
    met: bool
    kind: Literal["least", "most"] = "least"

    def __str__(self) -> str:
        return f"{self.what} = {self.measured}, limit {self.limit}"


@dataclass(frozen=True)
class Verdict:
    """Every figure that has a limit, and the length that the restored model can be served at."""

    checks: tuple[Check, ...]
    served_limit: int | None

    @property
    def failures(self) -> tuple[str, ...]:
        """The limits that are missed, each with value and limit."""
        return tuple(str(check) for check in self.checks if not check.met)


def judge(found: EvaluationReport, limits: GateConfig, native_window: int) -> Verdict:
    """Hold the restored model of a report to its limits; what was not measured is not judged.

    Raises:
        UsageError: the report has no native or no restored model.
    """
    models = {model.name: model for model in found.models}
    if missing := {"native", "restored"} - models.keys():
        raise UsageError(f"the evaluation has no model named {' and '.join(sorted(missing))}; run `ard eval` on this export")
    native, restored = models["native"], models["restored"]
    lengths = sorted({*restored.scores.perplexity, *restored.scores.needle})
    long = {length: list(_long(native, restored, length, limits, native_window)) for length in lengths}
    checks = [*_short(native, restored, limits)]
    checks += [check for length in lengths if length <= (limits.length or length) for check in long[length]]
    # A length counts when its text was read; one that cannot be held to a native figure supports no promise.
    judged = any(length <= native_window for length in native.scores.perplexity)
    held = takewhile(lambda length: judged and all(check.met for check in long[length]), lengths)
    return Verdict(tuple(checks), max((length for length in held if length in restored.scores.perplexity), default=None))


def _short(native: Evaluation, restored: Evaluation, limits: GateConfig) -> Iterator[Check]:
    pairs = paired_tasks(native, restored)
    before, after = (sum(task.value for task in side) for side in (zip(*pairs, strict=True) if pairs else ((), ())))
    if before > 0:
        spread = math.sqrt(sum(_difference_stderr(*pair) ** 2 for pair in pairs))
        met = after + _STANDARD_ERRORS * spread >= limits.retention * before
        measured = f"{after / before:.3f} ± {spread / before:.3f}"
        yield Check("mean short-task retention", measured, f"{limits.retention:g}", met)
    for task, other in pairs:
        p_value = paired_p_value(task.correct, other.correct)
        # All tasks together may raise a false alarm as often as one alone would.
        least = limits.significance / len(pairs)
        met = other.value >= task.value or p_value >= least
        moved = f"{p_value:.2g} ({task.value:.3f} to {other.value:.3f})"
        yield Check(f"{task.name}, p of a difference", moved, f"{least:.2g}", met)


def _long(native: Evaluation, restored: Evaluation, length: int, limits: GateConfig, native_window: int) -> Iterator[Check]:
    perplexity = restored.scores.perplexity.get(length)
    anchor = _inside(native.scores.perplexity, length, native_window)
    if perplexity is not None and anchor is not None:
        most = (1 + limits.perplexity) * anchor
        # A perplexity that is no number is within no limit.
        yield Check(f"perplexity at {length}", f"{perplexity:.2f}", f"{most:.2f}", perplexity <= most, "most")
    needle = restored.scores.needle.get(length)
    anchor = _inside(native.scores.needle, length, native_window)
    if needle is not None and anchor is not None:
        least = limits.needle * anchor
        yield Check(f"needles found at {length}", f"{needle:.0%}", f"{least:.0%}", needle >= least)


def _inside(scores: dict[int, float], length: int, native_window: int) -> float | None:
    """The native score at this length, or at the longest one inside the native window when the length is beyond it."""
    inside = [measured for measured in scores if measured <= native_window]
    return scores[length if length in inside else max(inside)] if inside else None


def _difference_stderr(task: TaskScore, other: TaskScore) -> float:
    """Standard error of the difference of two scores on the same items."""
    return mean_stderr(tuple(b - a for a, b in zip(task.correct, other.correct, strict=True))) or 0.0


def refusal(failures: Sequence[str], out: Path) -> str:
    """One line for whoever must be told that the run in `out` is not published."""
    more = f" and {len(failures) - _NAMED_FAILURES} more" if len(failures) > _NAMED_FAILURES else ""
    return (
        f"not published, worse than its limits: {'; '.join(failures[:_NAMED_FAILURES])}{more}; see {out / 'report.html'}. "
        f"Train on more tokens or lower the limits (gate), or publish it as it is: "
        f"ard export {out} --force"
    )
