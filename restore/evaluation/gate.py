"""Is a restored model good enough to be published, and up to which length: limits held against what was measured."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from ard_serve.errors import UsageError
from restore.evaluation.compare import task_p_value
from restore.evaluation.config import GateConfig
from restore.evaluation.results import Evaluation, EvaluationReport, TaskScore, mean_stderr

# A retention below its limit by less than this many standard errors may be chance.
_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Verdict:
    """The limits that the restored model misses, each with value and limit, and the length it can be served at."""

    failures: tuple[str, ...]
    served_limit: int | None


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
    broken = {length: list(_long_failures(native, restored, length, limits, native_window)) for length in lengths}
    failures = [*_short_failures(native, restored, limits)]
    failures += [failure for length in lengths if length <= (limits.length or length) for failure in broken[length]]
    # A length counts when its text was read; one that cannot be held to a native figure supports no promise.
    judged = any(length <= native_window for length in native.scores.perplexity)
    held = takewhile(lambda length: judged and not broken[length], lengths)
    return Verdict(tuple(failures), max((length for length in held if length in restored.scores.perplexity), default=None))


def _short_failures(native: Evaluation, restored: Evaluation, limits: GateConfig) -> Iterator[str]:
    pairs = [(task, other) for task in native.tasks if (other := restored.task(task.name)) and _paired(task, other)]
    before, after = (sum(task.value for task in side) for side in (zip(*pairs, strict=True) if pairs else ((), ())))
    if before > 0:
        spread = math.sqrt(sum(_difference_stderr(*pair) ** 2 for pair in pairs))
        if after + _STANDARD_ERRORS * spread < limits.retention * before:
            yield f"mean short-task retention {after / before:.3f} ± {spread / before:.3f}, limit {limits.retention:g}"
    for task, other in pairs:
        p_value = task_p_value(task, other)
        # All tasks together may raise a false alarm as often as one alone would.
        if other.value < task.value and p_value < (least := limits.significance / len(pairs)):
            yield f"{task.name} {task.value:.3f} to {other.value:.3f}, p = {p_value:.2g}, limit {least:.2g}"


def _long_failures(
    native: Evaluation, restored: Evaluation, length: int, limits: GateConfig, native_window: int
) -> Iterator[str]:
    perplexity = restored.scores.perplexity.get(length)
    anchor = _inside(native.scores.perplexity, length, native_window)
    # "Not within", for a perplexity that is no number is above every limit.
    if perplexity is not None and anchor is not None and not perplexity <= (most := (1 + limits.perplexity) * anchor):
        yield f"perplexity at {length} = {perplexity:.2f}, limit {most:.2f}"
    needle = restored.scores.needle.get(length)
    anchor = _inside(native.scores.needle, length, native_window)
    if needle is not None and anchor is not None and needle < (least := limits.needle * anchor):
        yield f"needles found at {length} = {needle:.0%}, limit {least:.0%}"


def _inside(scores: dict[int, float], length: int, native_window: int) -> float | None:
    """The native score at this length, or at the longest one inside the native window when the length is beyond it."""
    inside = [measured for measured in scores if measured <= native_window]
    return scores[length if length in inside else max(inside)] if inside else None


def _paired(task: TaskScore, other: TaskScore) -> bool:
    return len(task.correct) == len(other.correct)


def _difference_stderr(task: TaskScore, other: TaskScore) -> float:
    """Standard error of the difference of two scores on the same items."""
    return mean_stderr(tuple(b - a for a, b in zip(task.correct, other.correct, strict=True))) or 0.0
