"""The measurement that decides whether the gateway costs 1%: it finds a loss that is there, and says when it cannot tell."""

import math
import random

import pytest
from bench_server_throughput import Block, Work, findings
from helpers_paired import loss, median_interval


def pairs(loss_percent: float, noise: float, count: int, seed: int = 0) -> list[tuple[float, float]]:
    """Seconds of both sides on a machine that drifts by a third meanwhile."""
    random.seed(seed)
    made = []
    for number in range(count):
        machine = 2 * (1 + 0.3 * math.sin(number / 5))
        first, second = (machine * math.exp(random.gauss(0, noise)) for _ in range(2))
        made.append((first, second / (1 - loss_percent / 100)))
    return made


def test_a_loss_is_found_below_a_drift_that_is_much_larger() -> None:
    found = loss(pairs(2.0, 0.004, 60), 1.0)
    assert found["verdict"] == "missed"
    assert found["loss_percent"]["mean"] == pytest.approx(2.0, abs=0.25)
    assert loss(pairs(0.2, 0.004, 60), 1.0)["verdict"] == "met"


def test_noise_that_hides_the_limit_is_no_success() -> None:
    assert loss(pairs(0.8, 0.05, 20), 1.0)["verdict"] == "undecided"


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = [found["low"] <= 1.0 <= found["high"] for seed in range(400) for found in [_found(seed)]]
    assert 0.92 <= sum(held) / len(held) <= 0.98


def _found(seed: int) -> dict[str, float]:
    return dict(loss(pairs(1.0, 0.01, 12, seed), 1.0)["loss_percent"])


def test_an_outlier_does_not_widen_the_medians_interval() -> None:
    values = [float(number) for number in range(30)]
    assert median_interval([*values[:-1], 1e6]) == median_interval(values)
    assert median_interval(values) == (14.5, 9.0, 20.0)


def test_the_control_compares_neighbours_of_one_side() -> None:
    straight = [Block(seconds, 10, 100) for seconds in (1.0, 1.0, 1.1, 1.1, 1.0, 1.0)]
    through = [Block(seconds, 12, 100) for seconds in (1.5, 1.6, 1.5, 1.6, 1.5, 1.6)]
    found = findings(straight, through, Work(64, 1, 8, 0.1, 0.01))
    assert found["control"]["pairs"] == 5
    assert found["throughput"]["verdict"] == "missed"
    assert found["ttft_added_ms"]["mean"] == 2
    # B B, A A, B B, A A, B B: seconds of the gateway 1.5 1.6 three times, straight 1.0 1.1 and 1.1 1.0.
    assert found["control"]["loss_percent"]["mean"] == pytest.approx(100 * (1 - (1.5 / 1.6) ** (3 / 5)), abs=0.01)
