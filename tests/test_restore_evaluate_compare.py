"""Paired tests give textbook values, and figures of two models are compared item by item."""

import pytest

from ard_serve.artifact import Scores
from restore.evaluation.compare import compare, mcnemar, paired_bootstrap
from restore.evaluation.config import EvalConfig
from restore.evaluation.results import Evaluation, NeedleScore, PerplexityScore, TaskScore


def task(name: str, *correct: int) -> TaskScore:
    return TaskScore(name=name, metric="acc", metrics={"acc": sum(correct) / len(correct)}, correct=correct)


def test_mcnemar_is_the_exact_binomial_test_of_the_disagreements() -> None:
    assert mcnemar([1] * 10, [0] * 10) == pytest.approx(2 / 1024)
    assert mcnemar([1] * 9 + [0], [0] * 9 + [1]) == pytest.approx(2 * 11 / 1024)
    assert mcnemar([1, 0, 1, 0], [0, 1, 0, 1]) == 1.0
    assert mcnemar([1, 1, 0], [1, 1, 0]) == 1.0
    assert mcnemar([1] * 5000, [0] * 5000) == pytest.approx(0.0, abs=1e-300)


def test_the_bootstrap_sees_a_shift_and_not_noise() -> None:
    base = [0.1 * i for i in range(20)]
    assert paired_bootstrap(base, [value + 0.5 + 0.01 * (i % 3) for i, value in enumerate(base)]) < 0.001
    assert paired_bootstrap(base, [value + (-1) ** i for i, value in enumerate(base)]) > 0.5
    assert paired_bootstrap(base, base) == 1.0


def test_a_comparison_pairs_the_items_of_two_models() -> None:
    native = Evaluation(
        name="native",
        tasks=(task("a", 1, 1, 1, 0), task("b", 1, 0)),
        perplexity=(PerplexityScore(length=8, window_nll=(1.0, 2.0)),),
    )
    other = Evaluation(
        name="other",
        tasks=(task("b", 1, 1), task("a", 0, 0, 1, 0)),
        perplexity=(PerplexityScore(length=8, window_nll=(1.1, 2.1)), PerplexityScore(length=16, window_nll=(1.0,))),
    )
    rows = {row.what: row for row in compare(native, other)}
    assert (rows["a"].before, rows["a"].after) == (0.75, 0.25)
    assert rows["a"].ratio == pytest.approx(1 / 3)
    assert rows["a"].p_value == pytest.approx(0.5)
    assert rows["mean of the short tasks"].before == pytest.approx(0.625)
    assert rows["mean of the short tasks"].ratio == pytest.approx(1.0)
    assert rows["perplexity at 8"].ratio == pytest.approx(1.10517, rel=1e-4)
    assert set(rows) == {"a", "b", "mean of the short tasks", "perplexity at 8"}


def test_needles_are_compared_prompt_by_prompt() -> None:
    found, lost = (
        Evaluation(name=name, needles=tuple(NeedleScore(task="single", length=8, depth=d, samples=samples) for d in (0.0, 1.0)))
        for name, samples in (("native", (1.0,) * 5), ("restored", (0.0, 1.0, 0.0, 0.0, 0.0)))
    )
    (row,) = compare(found, lost)
    assert (row.what, row.before, row.after) == ("needles (single) at 8", 1.0, 0.2)
    assert row.p_value is not None
    assert row.p_value < 0.01


def test_the_scores_of_a_manifest_are_means_over_depths() -> None:
    found = Evaluation(
        name="x",
        perplexity=(PerplexityScore(length=8, window_nll=(0.0, 0.0)),),
        needles=(
            NeedleScore(task="single", length=8, depth=0.0, samples=(1.0, 1.0)),
            NeedleScore(task="single", length=8, depth=1.0, samples=(0.0, 1.0)),
            NeedleScore(task="multi_key", length=8, depth=1.0, samples=(0.0, 0.0)),
        ),
        tasks=(task("a", 1, 0, 0, 0),),
    )
    assert found.scores == Scores(perplexity={8: 1.0}, needle={8: 0.75}, tasks={"a": 0.25})
    assert found.tasks[0].stderr == pytest.approx(0.25)


def test_lengths_that_are_not_stated_double_up_to_the_target() -> None:
    assert EvalConfig(data=("x",)).for_target(5000).lengths == (1024, 2048, 4096, 5000)
    with_window = EvalConfig(data=("x",)).for_target(2048, native_window=300)
    assert (with_window.lengths, with_window.needle_lengths) == ((300, 1024, 2048), (1024, 2048))
    stated = EvalConfig(data=("x",), lengths=(64,), needle_lengths=(32,)).for_target(5000)
    assert (stated.lengths, stated.needle_lengths) == ((64,), (32,))
