import pytest

from server.pace import Pace

# Prompt tokens and seconds to the first token, alone: docs/results/server-long-h100.json and load-cpu.json. That of 500 tokens
# is what the plan for 1,000 was made from.
H100 = [(500, 0.077), (1000, 0.075), (8000, 0.186), (32_000, 0.607), (60_000, 1.075), (65_408, 1.095)]
CPU = [(1024, 0.81), (2048, 2.0), (4096, 5.54), (8192, 18.0)]


def first_s(pace: Pace, tokens: int) -> float:
    found, _ = pace.estimate_s(tokens, 8)
    assert found is not None
    return found


def test_nothing_is_promised_before_anything_was_measured() -> None:
    pace = Pace()
    assert pace.estimate_s(1000, 8) == (None, None)
    pace.saw_prefill(1000, 2.0)
    assert pace.estimate_s(1000, 8) == (2.0, None)
    pace.saw_gap(0.5)
    assert pace.estimate_s(1000, 8) == (2.0, 6.0)


@pytest.mark.parametrize("machine", [H100, CPU], ids=["h100", "cpu"])
def test_what_was_measured_is_what_is_estimated(machine: list[tuple[int, float]]) -> None:
    pace = Pace()
    for tokens, seconds in machine:
        pace.saw_prefill(tokens, seconds)
    for tokens, seconds in machine:
        assert first_s(pace, tokens) == pytest.approx(seconds, rel=0.1)


def test_the_longest_yet_is_estimated_from_shorter_ones() -> None:
    pace = Pace()
    for number, (tokens, seconds) in enumerate(H100):
        if number > 2:  # from two points on that are far enough apart
            assert first_s(pace, tokens) == pytest.approx(seconds, rel=0.1)
        pace.saw_prefill(tokens, seconds)


def test_short_prompts_do_not_slow_the_estimate_of_long_ones() -> None:
    pace = Pace()
    pace.saw_prefill(60_000, 1.0)
    for _ in range(100):
        pace.saw_prefill(20, 0.1)
    assert first_s(pace, 60_000) == pytest.approx(1.0)


def test_an_estimate_grows_with_the_prompt_and_never_below_what_the_shortest_took() -> None:
    pace = Pace()
    for tokens, seconds in [(1020, 0.9), (1030, 0.5), (4000, 2.0)]:
        pace.saw_prefill(tokens, seconds)
    found = [first_s(pace, tokens) for tokens in (1, 1020, 1500, 2000, 3000, 4000, 8000)]
    assert found == sorted(found)
    assert found[0] == 0.9


def test_a_single_length_seen_is_scaled_up_and_never_down() -> None:
    pace = Pace()
    pace.saw_prefill(1000, 1.0)
    assert first_s(pace, 100) == 1.0
    assert first_s(pace, 4000) == 4.0
