"""Paired tests give textbook values, and figures of two models are compared item by item."""

import numpy as np
import pytest

from ard_serve.artifact import Scores
from restore.evaluation.compare import BEYOND_GUESSING, MEAN, compare, mcnemar, sign_flip
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


def test_signs_that_flip_see_a_shift_and_not_noise() -> None:
    assert sign_flip([0.5 + 0.01 * (i % 3) for i in range(20)]) < 0.001
    assert sign_flip([(-1) ** i for i in range(20)]) > 0.5
    assert sign_flip([0.0] * 20) == 1.0
    assert sign_flip([0.1] * 4) == 2 / 16, "exact, and four pairs cannot say more"
    assert sign_flip([3.0, 1.0, -1.0]) == 6 / 8, "all but 3 - 1 - 1 and its mirror sum to as much"


@pytest.mark.parametrize("pairs", [2, 4, 8, 40])
def test_where_nothing_differs_a_small_p_value_is_as_rare_as_it_says(pairs: int) -> None:
    """A bootstrap of so few windows does not keep to its level."""
    generator = np.random.default_rng(0)
    p_values = np.array([sign_flip(generator.standard_t(4, pairs).tolist()) for _ in range(400)])
    for level in (0.05, 0.01):
        assert (p_values < level).mean() <= level + 2 * (level / 400) ** 0.5


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
    # Two items of four lost and one of two won weigh the same: of the 8 patterns of signs 6 sum to as much as nothing or more.
    assert rows["mean of the short tasks"].p_value == 1.0
    assert [rows["perplexity at 8"].p_value, rows["perplexity at 8"].pairs, rows["perplexity at 8"].too_few] == [0.5, 2, True]
    assert rows["perplexity at 8"].ratio == pytest.approx(1.10517, rel=1e-4)
    assert set(rows) == {"a", "b", "mean of the short tasks", "perplexity at 8"}


def test_needles_are_compared_prompt_by_prompt() -> None:
    found, lost = (
        Evaluation(name=name, needles=tuple(NeedleScore(task="single", length=8, depth=d, samples=samples) for d in (0.0, 1.0)))
        for name, samples in (("native", (1.0,) * 5), ("restored", (0.0, 1.0, 0.0, 0.0, 0.0)))
    )
    (row,) = compare(found, lost)
    assert (row.what, row.before, row.after) == ("needles (single) at 8", 1.0, 0.2)
    assert row.p_value == mcnemar([1] * 8, [0] * 8)


def scored(name: str, right: int, chance: float | None) -> TaskScore:
    return task(name, *([1] * right + [0] * (100 - right))).model_copy(update={"chance": chance})


def test_the_mean_counts_answers_and_beyond_guessing_only_what_can_be_lost() -> None:
    share = TaskScore(name="mc2", metric="mc2", metrics={}, correct=(0.4,) * 100)
    before = (scored("able", 80, 0.25), scored("cloze", 30, 0.0), scored("guess", 50, 0.5), scored("unknown", 90, None), share)
    after = (
        scored("able", 58, 0.25),
        scored("cloze", 30, 0.0),
        scored("guess", 60, 0.5),
        scored("unknown", 90, None),
        share.model_copy(update={"correct": (0.9,) * 100}),
    )
    native, other = Evaluation(name="native", tasks=before), Evaluation(name="other", tasks=after)
    rows = {row.what: row for row in compare(native, other)}
    assert other.short_mean == pytest.approx((0.58 + 0.30 + 0.60 + 0.90) / 4)
    assert rows[MEAN].after == pytest.approx(other.short_mean)
    assert rows["mc2"].after == pytest.approx(0.9), "told, and not counted"
    assert [rows[BEYOND_GUESSING].before, rows[BEYOND_GUESSING].after] == pytest.approx([0.425, 0.315])
    lost, hidden = rows[BEYOND_GUESSING].p_value, rows[MEAN].p_value
    assert lost is not None
    assert hidden is not None
    assert lost < 0.001 < 0.05 < hidden, "what guessing won hides it in the mean"


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
