"""How much of the window a call takes, told before it costs a prefill, and the body that goes to the engine."""

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from server.call import CHAT, COMPLETION, RESPONSES, Call, CallLimits
from server.connection import UpstreamError
from server.errors import ApiError, bad_request

# Asks an engine: method, path, JSON, request id -> status, JSON.
Ask = Callable[[str, str, Any, str], Awaitable[tuple[int, Any]]]

# A byte-level tokenizer makes at most one token of a byte, so a short body is bounded well enough without counting.
_COUNT_FROM_BYTES = 1024


@dataclass(frozen=True)
class Sized:
    """A call with its lengths in tokens, one prompt length for each prompt, and its body for the engine.

    `beyond_measured` says that its last token may lie further than quality was measured.
    """

    prompt_tokens: tuple[int, ...]
    max_tokens: int
    payload: bytes
    beyond_measured: bool


async def count(call: Call, limits: CallLimits, exact_from: int, ask: Ask, request_id: str) -> tuple[int, ...]:
    """Length of each prompt, or a bound where prompt and answer end before `exact_from` tokens all the same.

    Raises:
        ApiError: the engine cannot read the prompt.
        UpstreamError: the engine did not count.
    """
    prompt_tokens = call.prompt_tokens or (len(call.body),) * call.prompts
    longest = max(prompt_tokens)
    is_tight = longest + (call.max_tokens or limits.default_max_tokens) > exact_from
    if call.prompt_tokens is None and (is_tight or longest > _COUNT_FROM_BYTES):
        return await _count(call, limits.window, ask, request_id)
    return prompt_tokens


def fit(call: Call, limits: CallLimits, prompt_tokens: tuple[int, ...], salt: str | None) -> Sized:
    """Choose max_tokens where the client did not, and complete the body.

    Raises:
        ApiError: 400 with the prompt's length and the window's, if they do not go together.
    """
    longest = max(prompt_tokens)
    if longest + (call.max_tokens or 1) > limits.window:
        raise _too_long(call, longest, limits.window)
    most = limits.max_generated_tokens // (call.n * call.prompts)
    max_tokens = call.max_tokens or min(limits.default_max_tokens, limits.window - longest, most)
    return Sized(prompt_tokens, max_tokens, _payload(call, max_tokens, salt), longest + max_tokens > limits.measured_window)


def _too_long(call: Call, prompt_tokens: int, window: int) -> ApiError:
    counts = f"the prompt has {prompt_tokens} tokens, the window {window}"
    asked = call.max_tokens or 1
    if prompt_tokens >= window:
        remedy = f"shorten it by at least {prompt_tokens + asked - window} tokens"
    else:
        remedy = f"{call.max_tokens_name} = {asked} does not fit, {window - prompt_tokens} would"
    return bad_request(f"{counts}; {remedy}", call.kind.prompt, "context_length_exceeded")


async def _count(call: Call, window: int, ask: Ask, request_id: str) -> tuple[int, ...]:
    counts = []
    for question in _questions(call):
        status, answer = await ask("POST", "/tokenize", question, request_id)
        if status >= 500:
            raise UpstreamError(f"/tokenize answered {status}")
        if status != 200:
            raise ApiError(status, _message_of(answer), "invalid_prompt", call.kind.prompt)
        counts.append(int(answer["count"]))
    return tuple(counts) or (min(len(call.body), window - (call.max_tokens or 1)),)


def _questions(call: Call) -> list[dict[str, Any]]:
    """Bodies for /tokenize; none where a Responses input or its tools are more than a chat's."""
    prompt, fields = call.fields[call.kind.prompt], call.fields
    if call.kind is COMPLETION:
        texts = [prompt] if isinstance(prompt, str) else prompt
        special = {"add_special_tokens": fields.get("add_special_tokens", True)}
        return [{"prompt": text, **special} for text in texts]
    if call.kind is CHAT:
        names = ("add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template_kwargs", "tools")
        return [{"messages": prompt, **{name: fields[name] for name in names if fields.get(name) is not None}}]
    items = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    system = [{"role": "system", "content": fields["instructions"]}] if fields.get("instructions") else []
    messages, tools = [_chat_message(item) for item in items], fields.get("tools") or []
    functions = [_chat_tool(tool) for tool in tools] if isinstance(tools, list) else [None]
    if None in messages or None in functions:
        return []
    kwargs = fields.get("chat_template_kwargs")
    return [{"messages": [*system, *messages], "tools": functions or None, "chat_template_kwargs": kwargs}]


def _chat_message(item: dict[str, Any]) -> dict[str, Any] | None:
    """A Responses item as vLLM renders it; None where it is more than a finished message of texts.

    /tokenize knows no tool calls, outputs and reasoning of that form, and vLLM's own way to make messages of them changes.
    """
    role, content = item.get("role"), item.get("content")
    if role is None or item.get("type") not in (None, "message") or item.get("status") not in (None, "completed"):
        return None
    if isinstance(content, str):
        return {"role": role, "content": content}
    texts = [part.get("text") if isinstance(part, dict) else None for part in content or ()]
    if not texts or not all(isinstance(text, str) for text in texts):
        return None
    if role == "assistant":
        return {"role": role, "content": texts[0]}  # vLLM leaves the others out
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}  # /tokenize refuses input_text


def _chat_tool(tool: Any) -> dict[str, Any] | None:
    """A function as a chat has it; None for tools of other types, some of which vLLM rewrites and some leaves out."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return None
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _message_of(answer: Any) -> str:
    try:
        return str(answer["error"]["message"])
    except (KeyError, TypeError):
        return str(answer)[:500]


def _payload(call: Call, max_tokens: int, salt: str | None) -> bytes:
    """The client's bytes with the fields that we add; they go in front, since copying is cheaper than encoding again."""
    added: dict[str, Any] = {}
    if all(call.fields.get(name) is None for name in call.kind.max_tokens):  # null is the whole window to vLLM
        added[call.kind.max_tokens[0]] = max_tokens
    if salt:
        own = call.fields.get("cache_salt")
        added["cache_salt"] = hashlib.sha256(f"{salt}:{own}".encode()).hexdigest() if own else salt
    if call.kind is RESPONSES and call.fields.get("store") is None:
        added["store"] = False  # stored answers could be read by anybody who guesses the id
    if not added:
        return call.body
    if call.fields.keys() & added.keys():
        return json.dumps(call.fields | added).encode()
    return json.dumps(added)[:-1].encode() + b"," + call.body[call.body.index(b"{") + 1 :]
