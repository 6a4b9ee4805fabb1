"""Answers that get worse under load: the sign of a corrupted prefill, told from chance and from the model's own limit."""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import NormalDist

from loadtests.records import CellResult, RequestRecord

_ALARM_P = 0.02
_EXACT_ANSWERS = 200


def corruption_alarms(cells: Sequence[CellResult], records: Sequence[RequestRecord]) -> list[str]:
    """Lengths whose answers get worse with concurrency by more than chance explains; one alarm for each.

    First the tasks that were asked at the lowest concurrency too (only their random heads differ), so that the answers pair
    up: McNemar's exact test, one-sided. Then all answers, since under load more tasks are asked than alone: an exact test
    for a falling trend.
    """
    alarms = []
    for length in sorted({cell.length for cell in cells if cell.concurrency is not None}):
        row = sorted((c for c in cells if c.length == length and c.concurrency), key=lambda cell: cell.concurrency or 0)
        answers = [_answers(cell, records) for cell in row]
        told = _lost_pairs(row, answers) or _falling(row, answers)
        alarms += [f"{length} tokens: {told}; the sign of corrupted prefill"] if told else []
    return alarms


def _lost_pairs(row: Sequence[CellResult], answers: Sequence[dict[str, bool]]) -> str:
    for cell, loaded in zip(row[1:], answers[1:], strict=True):
        both = answers[0].keys() & loaded.keys()
        lost = sum(answers[0][task] and not loaded[task] for task in both)
        won = sum(loaded[task] and not answers[0][task] for task in both)
        if (p := mcnemar_p(lost, won)) < _ALARM_P:
            return (
                f"{lost} answers right at concurrency {row[0].concurrency} are wrong at {cell.concurrency} "
                f"({won} the other way, p = {p:.2g})"
            )
    return ""


def _falling(row: Sequence[CellResult], answers: Sequence[dict[str, bool]]) -> str:
    counts = [(sum(found.values()), len(found)) for found in answers]
    if (p := falling_p(counts)) >= _ALARM_P:
        return ""
    told = ", ".join(f"{right} of {n} at {cell.concurrency}" for cell, (right, n) in zip(row, counts, strict=True))
    return f"right answers fall with concurrency, {told} (p = {p:.2g})"


def mcnemar_p(lost: int, won: int) -> float:
    """Chance of at least `lost` losses among the answers that changed, were both ways equally likely."""
    changed = lost + won
    return sum(math.comb(changed, k) for k in range(lost, changed + 1)) / float(2**changed)


def falling_p(counts: Sequence[tuple[int, int]]) -> float:
    """Chance that wrong answers lie at least as far up in `counts`, (right, asked) by rising load, as they do.

    Cochran's and Armitage's test for a trend with the steps as scores, one-sided: exact for few answers, from all ways of
    drawing as many wrong ones among those that were asked; by the normal approximation for many.
    """
    asked = [n for _, n in counts]
    wrong = [n - right for right, n in counts]
    seen = sum(score * number for score, number in enumerate(wrong))
    if sum(wrong) in (0, sum(asked)):
        return 1.0
    if sum(asked) > _EXACT_ANSWERS:
        return _falling_p_of_many(asked, sum(wrong), seen)
    # Ways of having drawn so many wrong answers with such a sum of scores, load by load.
    ways = {(0, 0): 1}
    for score, here in enumerate(asked):
        further: dict[tuple[int, int], int] = defaultdict(int)
        for (drawn, total), number in ways.items():
            for more in range(min(here, sum(wrong) - drawn) + 1):
                further[drawn + more, total + score * more] += number * math.comb(here, more)
        ways = further
    as_far = sum(number for (drawn, total), number in ways.items() if drawn == sum(wrong) and total >= seen)
    return as_far / math.comb(sum(asked), sum(wrong))


def _falling_p_of_many(asked: Sequence[int], wrong: int, seen: int) -> float:
    n = sum(asked)
    mean = sum(score * here for score, here in enumerate(asked)) / n
    spread = sum((score - mean) ** 2 * here for score, here in enumerate(asked)) / n
    deviation = math.sqrt(spread * wrong * (n - wrong) / (n - 1))
    return 1 - NormalDist(wrong * mean, deviation).cdf(seen - 0.5) if deviation else 1.0


def _answers(cell: CellResult, records: Sequence[RequestRecord]) -> dict[str, bool]:
    """Answer of each task, known by the number it hides."""
    return {
        record.expected: record.correct
        for record in records
        if record.cell == cell.cell and record.role == "measured" and record.correct is not None
    }
