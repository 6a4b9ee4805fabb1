"""Is one model better than another on the very same items: ratios and paired tests."""

import math
from collections.abc import Sequence
from functools import partial
from typing import get_args

import numpy as np

from restore.evaluation.config import NeedleTask
from restore.evaluation.results import Comparison, Evaluation, TaskScore

# Up to so many differing pairs every pattern of signs is tried, beyond them random ones.
_EXACT_PAIRS, _DRAWS, _DRAWS_AT_ONCE = 13, 10_000, 500
# A task is above guessing where the reference is by so many of its standard errors.
_STANDARD_ERRORS = 2.0
MEAN = "mean of the short tasks"
BEYOND_GUESSING = "short tasks beyond guessing"


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


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value that paired differences lie around zero: how often they sum to as much with signs drawn anew.

    Exact up to 13 pairs that differ, and of any number of windows or prompts no more often wrong than it says, unlike a
    bootstrap of few; so the least that n pairs can give is 2 / 2^n.
    """
    values = np.array([difference for difference in differences if difference], dtype=float)
    count, reached = len(values), abs(values.sum()) * (1 - 1e-9)
    if count <= _EXACT_PAIRS:
        signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        return float((np.abs(signs @ values) >= reached).mean())
    generator = np.random.default_rng(seed)
    as_much = 0
    for _ in range(_DRAWS // _DRAWS_AT_ONCE):
        signs = 1 - 2 * generator.integers(0, 2, (_DRAWS_AT_ONCE, count), dtype=np.int8)
        as_much += int((np.abs(signs @ values) >= reached).sum())
    return (1 + as_much) / (1 + _DRAWS)


def paired_p_value(before: Sequence[float], after: Sequence[float]) -> float:
    """The p-value of "no difference" of two models on the same items: McNemar's where each is right or wrong."""
    if {*before, *after} <= {0, 1}:
        return mcnemar(tuple(map(int, before)), tuple(map(int, after)))
    return sign_flip([b - a for a, b in zip(before, after, strict=True)])


def paired_tasks(reference: Evaluation, model: Evaluation) -> list[tuple[TaskScore, TaskScore]]:
    """The short tasks that both models have with the same items, those left out that a mean does not count."""
    pairs = [(score, model.task(score.name)) for score in reference.tasks if score.counts]
    return [(score, other) for score, other in pairs if other is not None and len(score.correct) == len(other.correct)]


def beyond_guessing(pairs: Sequence[tuple[TaskScore, TaskScore]]) -> list[tuple[TaskScore, TaskScore]]:
    """Those tasks that the reference does better than guessing: only there is something that a model can lose."""
    return [
        (score, other)
        for score, other in pairs
        if score.chance is not None and score.value > score.chance + _STANDARD_ERRORS * (score.stderr or 0.0)
    ]


def compare(reference: Evaluation, model: Evaluation) -> list[Comparison]:
    """Every figure both models have, with a paired test of each over the items, windows or prompts that they share."""
    row = partial(_row, reference.name, model.name)
    tasks = [(score, other) for score in reference.tasks if (other := model.task(score.name)) is not None]
    result = [row(a.name, a.value, b.value, a.correct, b.correct) for a, b in tasks if len(a.correct) == len(b.correct)]
    pairs = paired_tasks(reference, model)
    if len(pairs) > 1:
        result.append(_mean(reference.name, model.name, MEAN, pairs))
    if len(able := beyond_guessing(pairs)) > 1:
        result.append(_mean(reference.name, model.name, BEYOND_GUESSING, able, guessed=True))
    windows = {score.length: score for score in model.perplexity}
    result += [
        row(f"perplexity at {a.length}", a.value, b.value, a.window_nll, b.window_nll)
        for a in reference.perplexity
        if (b := windows.get(a.length)) is not None
    ]
    documents = {score.title: score for score in model.sliding}
    result += [
        row(c.title, c.value, d.value, c.nll, d.nll) for c in reference.sliding if (d := documents.get(c.title)) is not None
    ]
    for task, length in dict.fromkeys((needle.task, needle.length) for needle in reference.needles):
        before, after = reference.needle_samples(length, task), model.needle_samples(length, task)
        if len(before) == len(after) > 0:
            means = reference.needle(length, task), model.needle(length, task)
            result.append(row(_name(task, length), *means, before, after))
    return result


def _mean(
    reference: str, model: str, what: str, pairs: Sequence[tuple[TaskScore, TaskScore]], guessed: bool = False
) -> Comparison:
    """Every task with the same weight, however many items it has; `guessed`: what guessing scores is taken off both."""
    off = sum(before.chance or 0.0 for before, _ in pairs) / len(pairs) if guessed else 0.0
    means = [sum(task.value for task in side) / len(pairs) - off for side in zip(*pairs, strict=True)]
    weighed = [
        (b - a) / len(before.correct) for before, after in pairs for a, b in zip(before.correct, after.correct, strict=True)
    ]
    return _comparison(reference, model, what, means[0], means[1], sign_flip(weighed), len(weighed))


def _name(task: str, length: int) -> str:
    return f"needles ({task}) at {length}" if task in get_args(NeedleTask) else f"{task} at {length}"


def _row(
    reference: str, model: str, what: str, before: float, after: float, items: Sequence[float], others: Sequence[float]
) -> Comparison:
    """One figure; without a p-value where there is no pair, or one alone."""
    p_value = paired_p_value(items, others) if len(items) == len(others) > 1 else None
    return _comparison(reference, model, what, before, after, p_value, len(items))


def _comparison(
    reference: str, model: str, what: str, before: float, after: float, p_value: float | None, pairs: int
) -> Comparison:
    ratio = after / before if before > 0 else None
    return Comparison(
        reference=reference, model=model, what=what, before=before, after=after, ratio=ratio, p_value=p_value, pairs=pairs
    )
