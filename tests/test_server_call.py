"""What a body's bytes say before anything is asked of an engine."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from server.call import COMPLETION, Call, CallLimits, parse
from server.errors import ApiError

LIMITS = CallLimits(
    window=100,
    measured=None,
    max_n=80,
    max_prompts=80,
    max_generated_tokens=100,
    default_max_tokens=10,
    max_logprobs=5,
    max_schema_bytes=100,
)


def parsed(prompt: Any, limits: CallLimits = LIMITS, **fields: Any) -> Call:
    body = {"prompt": prompt, "max_tokens": 1, **fields}
    return parse(json.dumps(body).encode(), COMPLETION, limits, frozenset(), "model")


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("text", (1, None)),
        (["one", "two"], (2, None)),
        ([1, 2, 3], (1, (3,))),
        ([[1, 2], [3]], (2, (2, 1))),
        ("[" * 1000, (1, None)),
        ([[1]] * 80, (80, (1,) * 80)),
    ],
    ids=["text", "texts", "ids", "lists of ids", "brackets in a text", "more lists than levels"],
)
def test_prompts_are_counted(prompt: Any, found: tuple[int, tuple[int, ...] | None]) -> None:
    call = parsed(prompt)
    assert (call.prompts, call.prompt_tokens) == found


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1, True], [1, 2.0], [1, "a"], [[1], [True]], [[1], "a"], [[[1]]], {"a": 1}, 5, [None]], ids=str
)
def test_a_prompt_of_another_shape_is_refused(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        parsed(prompt)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_the_prompts_of_a_request_are_bounded() -> None:
    assert parsed(["x"] * 80).prompts == 80
    with pytest.raises(ApiError, match=r"81 prompts .* the limit is 80; send fewer .* --max-prompts") as caught:
        parsed(["x"] * 81)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_tools_together_may_be_larger_than_one_schema_and_too_large_ones_are_told_what_to_do() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    assert parsed("x", tools=[tool] * 10)
    with pytest.raises(ApiError, match=r"the limit is 1600; send fewer or shorter ones, .* --max-schema-bytes") as caught:
        parsed("x", tools=[tool] * 40)
    assert caught.value.param == "tools"
    with pytest.raises(ApiError, match=r"the limit is 100; shorten it, .* --max-schema-bytes"):
        parsed("x", response_format={"a": "x" * 100})


@pytest.mark.timing
@pytest.mark.fault("S18")
@pytest.mark.parametrize(
    "regex", ["a{" + "1" * 16_000, "a{" + " " * 16_000, "a{1," * 4_000], ids=["digits", "spaces", "braces"]
)
def test_a_brace_that_never_closes_takes_no_time(regex: str) -> None:
    started = time.monotonic()
    parsed("x", replace(LIMITS, max_schema_bytes=16_384), structured_outputs={"regex": regex})
    assert time.monotonic() - started < 0.05


@pytest.mark.fault("S18")
@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("response_format", {"type": "json_object"}, True),
        ("response_format", {"type": "text"}, False),
        ("structured_outputs", {"regex": "a+"}, True),
        ("text", {"format": {"type": "json_schema", "schema": {}}, "verbosity": "low"}, True),
        ("text", {"format": {"type": "text"}}, False),
        ("text", {"verbosity": "low"}, False),
        ("tools", [{"type": "function"}], False),
    ],
    ids=str,
)
def test_an_answer_that_its_grammar_ends_cannot_ignore_its_end(name: str, value: Any, refused: bool) -> None:
    parsed("x", **{name: value})
    if not refused:
        parsed("x", ignore_eos=True, **{name: value})
        return
    with pytest.raises(ApiError, match="ignore_eos does not go with") as caught:
        parsed("x", ignore_eos=True, **{name: value})
    assert (caught.value.status, caught.value.param) == (400, "ignore_eos")
