"""What a body's bytes say before anything is asked of an engine."""

import json
from typing import Any

import pytest

from server.call import COMPLETION, Call, CallLimits, parse
from server.errors import ApiError

LIMITS = CallLimits(
    window=100, measured=None, max_n=2, max_generated_tokens=100, default_max_tokens=10, max_logprobs=5, max_schema_bytes=100
)


def parsed(prompt: Any) -> Call:
    return parse(json.dumps({"prompt": prompt, "max_tokens": 1}).encode(), COMPLETION, LIMITS, frozenset(), "model")


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
