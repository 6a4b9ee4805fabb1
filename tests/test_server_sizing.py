"""How a request's tokens are counted: exactly where the engine can be asked, by its bytes where it cannot."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_server import Gateway, gateways, wait_for

from server.call import CHAT, COMPLETION, RESPONSES, CallLimits, Kind, parse
from server.config import ServeConfig
from server.sizing import count, fit

LIMITS = CallLimits.of(ServeConfig(model=Path("tiny")), window=512, measured=None)
MESSAGES = [
    {"role": "user", "content": [{"type": "input_text", "text": "u" * 100}]},
    {
        "type": "message",
        "id": "1",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "a" * 40}],
    },
    {"role": "user", "content": "v" * 60},
]
CALLED = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateways(tmp_path_factory.mktemp("gateway")) as start:
        yield start().until_ready()


@pytest.mark.parametrize(("more", "prompt_tokens"), [([], 240), ([CALLED], 504)], ids=["messages", "a tool's call among them"])
def test_a_list_of_messages_is_counted_and_other_items_go_by_their_bytes(
    gateway: Gateway, more: list[Any], prompt_tokens: int
) -> None:
    """The scripted engine counts characters, with parts' braces; a thousand bytes more are in a field that is no prompt."""
    body = {"input": MESSAGES + more, "instructions": "s" * 10, "max_output_tokens": 8, "user": json.dumps({"pad": "x" * 1000})}
    with gateway.client() as client:
        answer = client.post("/v1/responses", json=body)
    assert answer.status_code == 200
    said = f'"request_id": "{answer.headers["x-request-id"]}"'
    wait_for(lambda: said in gateway.stderr + gateway.stdout)
    (line,) = [line for line in (gateway.stderr + gateway.stdout).splitlines() if said in line]
    assert f'"prompt_tokens": {prompt_tokens},' in line


def asked(**fields: Any) -> list[Any]:
    """What /tokenize is asked for a Responses request."""
    questions = []

    async def ask(method: str, path: str, question: Any, request_id: str) -> tuple[int, Any]:
        questions.append(question)
        return 200, {"count": 1}

    call = parse(json.dumps(fields).encode(), RESPONSES, LIMITS, frozenset(), "model")
    asyncio.run(count(call, LIMITS, 0, ask, "1"))
    return questions


def test_a_responses_request_is_asked_for_as_the_chat_that_vllm_makes_of_it() -> None:
    (question,) = asked(
        input=MESSAGES, instructions="be brief", tools=[{"type": "function", **FUNCTION}], chat_template_kwargs={"a": 1}
    )
    assert question == {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "u" * 100}]},
            {"role": "assistant", "content": "a" * 40},
            MESSAGES[2],
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "chat_template_kwargs": {"a": 1},
    }
    assert asked(input="hello")[0]["messages"] == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "fields",
    [
        {"input": [*MESSAGES, CALLED]},
        {"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]},
        {"input": [{"role": "assistant", "content": "begun", "status": "incomplete"}]},
        {"input": [{"role": "user", "content": None}]},
        {"input": [{"role": "user", "content": ["x"]}]},
        {"input": "x", "tools": [{"type": "custom", "name": "f"}]},
        {"input": "x", "tools": 5},
    ],
    ids=str,
)
def test_what_is_more_than_a_chat_is_not_asked_for(fields: dict[str, Any]) -> None:
    assert asked(**fields) == []


@pytest.mark.parametrize(("kind", "said"), [(COMPLETION, {}), (COMPLETION, {"max_tokens": None}), (CHAT, {}), (CHAT, {"n": 8})])
def test_the_engine_is_told_the_answers_length_that_was_reserved(kind: Kind, said: dict[str, Any]) -> None:
    """To vLLM null is the rest of the window, and what a client does not say must not pass a limit either."""
    limits = CallLimits.of(ServeConfig(model=Path("tiny"), max_generated_tokens=100), window=512, measured=None)
    prompt = [1, 2] if kind is COMPLETION else [{"role": "user", "content": "a"}]
    sized = fit(
        parse(json.dumps({kind.prompt: prompt, **said}).encode(), kind, limits, frozenset(), "tiny"), limits, (2,), None
    )
    assert json.loads(sized.payload)[kind.max_tokens[0]] == sized.max_tokens
    assert sized.max_tokens * said.get("n", 1) <= 100
