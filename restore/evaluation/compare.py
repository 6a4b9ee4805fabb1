"""Is one model better than another on the very same items: ratios and paired tests."""

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np

from restore.evaluation.config import NeedleTask
from restore.evaluation.results import Comparison, Evaluation, TaskScore

_BOOTSTRAP_DRAWS = 10_000


def mcnemar(before: Sequence[int], after: Sequence[int]) -> float:
    """Two-sided exact McNemar test over paired right (1) and wrong (0) answers: the p-value of "no difference"."""
    assert len(before) == len(after), "paired answers come from the same items"
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    gained = sum(a > b for b, a in zip(before, after, strict=True))
    disagree, fewer = lost + gained, min(lost, gained)
    log_tail = [
        math.lgamma(disagree + 1) - math.lgamma(k + 1) - math.lgamma(disagree - k + 1) - disagree * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in log_tail))


def paired_bootstrap(before: Sequence[float], after: Sequence[float], seed: int = 0) -> float:
    """Two-sided bootstrap p-value that the mean of the paired differences is zero."""
    differences = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    centred = differences - differences.mean()
    generator = np.random.default_rng(seed)
    means = centred[generator.integers(0, len(centred), (_BOOTSTRAP_DRAWS, len(centred)))].mean(axis=1)
    return float((1 + (np.abs(means) >= abs(differences.mean()) - 1e-12).sum()) / (1 + _BOOTSTRAP_DRAWS))


def task_p_value(before: TaskScore, after: TaskScore) -> float:
    """The p-value of "no difference" of two scores on the same items: McNemar's, or where items are shares a bootstrap's."""
    if {*before.correct, *after.correct} <= {0, 1}:
        return mcnemar(tuple(map(int, before.correct)), tuple(map(int, after.correct)))
    return paired_bootstrap(before.correct, after.correct)


def compare(reference: Evaluation, model: Evaluation) -> list[Comparison]:
    """Every figure both models have: tasks by McNemar; perplexity and retrieval by a paired bootstrap."""
    pairs = [(score, other) for score in reference.tasks if (other := model.task(score.name)) is not None]
    rows: list[tuple[str, float, float, float | None]] = [
        (score.name, score.value, other.value, task_p_value(score, other))
        for score, other in pairs
        if len(score.correct) == len(other.correct)
    ]
    if len(rows) > 1:
        before, after = sum(row[1] for row in rows) / len(rows), sum(row[2] for row in rows) / len(rows)
        rows.append(("mean of the short tasks", before, after, None))
    result = [_row(reference, model, *row) for row in rows]
    perplexities = {score.length: score for score in model.perplexity}
    for window in reference.perplexity:
        if (other_window := perplexities.get(window.length)) is not None:
            paired = len(window.window_nll) == len(other_window.window_nll) > 1
            p_value = paired_bootstrap(window.window_nll, other_window.window_nll) if paired else None
            result.append(_row(reference, model, f"perplexity at {window.length}", window.value, other_window.value, p_value))
    documents = {score.title: score for score in model.sliding}
    for score in reference.sliding:
        if (other_score := documents.get(score.title)) is not None:
            p_value = paired_bootstrap(score.nll, other_score.nll) if len(score.nll) == len(other_score.nll) > 1 else None
            result.append(_row(reference, model, score.title, score.value, other_score.value, p_value))
    for task, length in dict.fromkeys((needle.task, needle.length) for needle in reference.needles):
        before_samples, after_samples = reference.needle_samples(length, task), model.needle_samples(length, task)
        if len(before_samples) == len(after_samples) > 0:
            p_value = paired_bootstrap(before_samples, after_samples) if len(before_samples) > 1 else None
            means = reference.needle(length, task), model.needle(length, task)
            result.append(_row(reference, model, _name(task, length), *means, p_value))
    return result


def _name(task: str, length: int) -> str:
    return f"needles ({task}) at {length}" if task in get_args(NeedleTask) else f"{task} at {length}"


def _row(reference: Evaluation, model: Evaluation, what: str, before: float, after: float, p_value: float | None) -> Comparison:
    ratio = after / before if before > 0 else None
    return Comparison(
        reference=reference.name, model=model.name, what=what, before=before, after=after, ratio=ratio, p_value=p_value
    )
