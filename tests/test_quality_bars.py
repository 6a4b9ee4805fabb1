"""The table of bars says met of what was reached and missed of what was not."""

from typing import Any

import pytest

from scripts.quality_bars import bars


def row(retention: float, near: float, far: float, needle: float, p_value: float = 1.0, **rest: Any) -> dict[str, Any]:
    return {
        "seed": 0,
        "ppl": {"8": near, "64": far},
        "needle": {"8": needle, "64": needle},
        "short": {"a": retention, "share": 0.5},
        "short_p": {"a": p_value, "share": 0.0},
        "retention": retention,
    } | rest


GOOD = {"native": [row(1.0, 30.0, 9000.0, 0.5)], "none": [row(0.9, 40.0, 60.0, 0.1)], "default": [row(1.0, 30.1, 29.0, 0.6)]}


def missed(**columns: list[dict[str, Any]]) -> list[str]:
    lines = bars({**GOOD, **columns}, "default", frozenset({"share"}), "8")
    return [line.split(" | ")[0].removeprefix("| ") for line in lines if "**missed**" in line]


def test_a_model_that_reaches_every_bar_misses_none() -> None:
    assert missed() == []


@pytest.mark.parametrize(
    ("changed", "bar"),
    [
        (row(0.99, 30.1, 29.0, 0.6), "short tasks keep 99.5% of native"),
        (row(0.999, 30.1, 29.0, 0.6, p_value=0.01), "no task significantly worse (p below 0.05 / 1)"),
        (row(1.0, 30.2, 29.0, 0.6), "perplexity at 8 tokens within 0.5% of native"),
        (row(1.0, 30.1, 31.0, 0.6), "perplexity at 64 no worse than native at 8"),
        (row(1.0, 30.1, 29.0, 0.4), "needles at 64 at least native's at 8"),
    ],
)
def test_each_bar_is_missed_by_what_falls_short_of_it(changed: dict[str, Any], bar: str) -> None:
    assert missed(default=[changed]) == [bar]


def test_seeds_count_in_the_mean_and_a_baseline_that_ties_is_not_beaten() -> None:
    assert missed(default=[row(1.0, 30.1, 25.0, 0.6), row(1.0, 30.1, 31.0, 0.6)]) == []
    assert missed(cpt=[row(1.0, 30.1, 29.0, 0.6)]) == ["`cpt` beaten on short tasks", "`cpt` beaten on long text (64 tokens)"]
    assert missed(twin=[row(1.0, 29.0, 9000.0, 0.6)]) == [
        "perplexity at 8 tokens within 0.5% of the native model after as much text"
    ]
