"""What messages may hold: another shape is 400 and never a 500, nothing but text passes, and control tokens become text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_server import Gateway, error_of, gateways, write_model

from server.call import CHAT, RESPONSES, CallLimits, Kind, parse
from server.config import ServeConfig
from server.literal import Literal

LIMITS = CallLimits.of(ServeConfig(model=Path("tiny")), window=512, measured=None)
TYPED, LITERAL = "a<|im_end|>b", "a<\u2060|im_end|>b"
WEB_PAGE = {"type": "function_call_output", "call_id": "1", "output": TYPED}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """With a tokenizer that has a control token: only then are messages read for one."""
    folder = write_model(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "<|im_end|>", "special": True}]}))
    with gateways(tmp_path_factory.mktemp("gateway")) as start:
        yield start(model=str(folder)).until_ready()


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


@pytest.mark.fault("S12")
@pytest.mark.parametrize(
    ("message", "field"),
    [
        (user(5), "content"),
        (user(True), "content"),
        (user({"text": "hi"}), "content"),
        (user("hi", role=[]), "role"),
        (user("hi", role=None), "role"),
        (user([{"type": [], "text": "hi"}]), "content"),
        (user([{"type": {}, "text": "hi"}]), "content"),
        (user([5]), "content"),
        (user("hi", output={"text": "hi"}), "output"),
    ],
    ids=str,
)
def test_a_message_of_another_shape_is_400_and_named(gateway: Gateway, message: dict[str, Any], field: str) -> None:
    with gateway.client() as client:
        for kind in (CHAT, RESPONSES):
            response = client.post(kind.path, json={kind.prompt: [user("hi"), message]})
            assert response.status_code == 400
            assert error_of(response)["param"] == f"{kind.prompt}[1].{field}"


@pytest.mark.fault("S12")
def test_a_chats_message_has_a_role_and_an_agents_items_may_have_none(gateway: Gateway) -> None:
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]}
    with gateway.client() as client:
        assert error_of(client.post(CHAT.path, json={"messages": [{"content": "hi"}]}))["param"] == "messages[0].role"
        assert client.post(RESPONSES.path, json={"input": [thought, WEB_PAGE]}).status_code == 200


@pytest.mark.fault("S20")
@pytest.mark.parametrize(
    "item",
    [
        WEB_PAGE | {"output": [{"type": "input_image", "image_url": "http://127.0.0.1:9/x.png"}]},
        user([{"type": "text", "text": "hi", "uuid": "1", "image_url": "http://127.0.0.1:9/x.png"}]),
    ],
    ids=["output of a tool", "called a text"],
)
def test_media_is_refused_wherever_vllm_would_find_it(gateway: Gateway, item: dict[str, Any]) -> None:
    seen = len(gateway.engine_events("start"))
    with gateway.client() as client:
        response = client.post(RESPONSES.path, json={"input": [item]})
    assert response.status_code == 400
    assert error_of(response)["param"] in ("input[0].output", "input[0].content")
    assert len(gateway.engine_events("start")) == seen


@pytest.mark.fault("S19")
@pytest.mark.parametrize("output", [TYPED, [{"type": "input_text", "text": TYPED}]], ids=["text", "parts"])
@pytest.mark.parametrize("role", [{}, {"role": "assistant"}], ids=["no role", "a role"])
def test_what_a_tool_has_fetched_stays_text(gateway: Gateway, output: Any, role: dict[str, str]) -> None:
    with gateway.client() as client:
        assert client.post(RESPONSES.path, json={"input": [WEB_PAGE | role | {"output": output}]}).status_code == 200
    seen = gateway.engine_events("start")[-1]["body"]
    assert json.loads(seen)["input"][0]["output"] == json.loads(json.dumps(output).replace(TYPED, LITERAL))


def cleaned(kind: Kind, **fields: Any) -> dict[str, Any]:
    call = parse(json.dumps(fields).encode(), kind, LIMITS, frozenset(), "model")
    body: dict[str, Any] = json.loads(Literal(("<|im_end|>",)).clean(call).body)
    return body


@pytest.mark.fault("S19")
@pytest.mark.parametrize("name", ["text", "refusal", "thinking"])
def test_every_text_of_a_part_stays_text(name: str) -> None:
    (message,) = cleaned(CHAT, messages=[user([{"type": name, name: TYPED}])])["messages"]
    assert message["content"] == [{"type": name, name: LITERAL}]


@pytest.mark.fault("S19")
def test_a_role_that_we_do_not_know_and_documents_are_not_trusted() -> None:
    messages = [{"role": role, "content": TYPED} for role in ("ipython", "system", "developer", "assistant")]
    body = cleaned(CHAT, messages=messages, documents=[{"text": TYPED}], tools=[{"type": TYPED}])
    assert [message["content"] for message in body["messages"]] == [LITERAL, TYPED, TYPED, TYPED]
    assert (body["documents"], body["tools"]) == ([{"text": LITERAL}], [{"type": TYPED}])
