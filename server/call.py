"""A client's generation request, parsed and held to the limits before it costs the engine anything."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from server import grammar
from server.config import ServeConfig
from server.errors import ApiError, bad_request

_MAX_DEPTH = 64
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")

# Parameters of vLLM that reach past the request: other tenants' cache, the engine's transfers, unpickled tensors, scheduling.
REFUSED = frozenset(
    {
        *("prompt_embeds", "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "mm_processor_kwargs", "media_io_kwargs"),
        *("mm_payload", "return_mm_kwargs", "chat_template", "priority", "request_id", "session_id"),
        *("previous_response_id", "background"),
    }
)
TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking", "reasoning_text")  # no set: [] has no hash


@dataclass(frozen=True)
class CallLimits:
    """What a request may ask for; lengths in tokens. `measured` is the longest whose quality was measured."""

    window: int
    measured: int | None
    max_n: int
    max_prompts: int
    max_generated_tokens: int
    default_max_tokens: int
    max_logprobs: int
    max_schema_bytes: int

    @property
    def measured_window(self) -> int:
        """Length up to which quality was measured, as far as it is served."""
        return min(self.measured or self.window, self.window)

    @classmethod
    def of(cls, config: ServeConfig, window: int, measured: int | None) -> Self:
        """The configured limits; what is not configured follows the window."""
        return cls(
            window=window,
            measured=measured,
            max_n=config.max_n,
            max_prompts=config.max_prompts,
            max_generated_tokens=config.max_generated_tokens or window,
            default_max_tokens=config.default_max_tokens,
            max_logprobs=config.max_logprobs,
            max_schema_bytes=config.max_schema_bytes,
        )


@dataclass(frozen=True)
class Kind:
    """One of the generation endpoints, and what it calls its fields."""

    path: str
    prompt: str
    max_tokens: tuple[str, ...]
    schema: str


COMPLETION = Kind("/v1/completions", "prompt", ("max_tokens",), "CompletionRequest")
CHAT = Kind("/v1/chat/completions", "messages", ("max_completion_tokens", "max_tokens"), "ChatCompletionRequest")
RESPONSES = Kind("/v1/responses", "input", ("max_output_tokens",), "ResponsesRequest")
KINDS = (COMPLETION, CHAT, RESPONSES)


@dataclass(frozen=True)
class Call:
    """A request that passed: what admission and the exchange need, and the body as it came.

    `prompt_tokens` holds a length for each prompt where prompts came as token ids, else None.
    """

    kind: Kind
    fields: dict[str, Any]
    body: bytes
    stream: bool
    n: int
    prompts: int
    prompt_tokens: tuple[int, ...] | None
    max_tokens: int | None

    @property
    def max_tokens_name(self) -> str:
        """The field in which the client said max_tokens, or would."""
        return next((name for name in self.kind.max_tokens if self.fields.get(name) is not None), self.kind.max_tokens[0])


def parse(body: bytes, kind: Kind, limits: CallLimits, known: frozenset[str], model: str) -> Call:
    """Check a body and read what admission needs from it. `known` are the engine's parameters; empty means not yet known.

    Raises:
        ApiError: 400 (404 for another model), naming the parameter and its limit.
    """
    fields = decode(body)
    _check_names(fields, known)
    asked = fields.get("model")
    if asked is not None and asked != model:
        raise ApiError(404, f"model {str(asked)[:100]!r} is not served here; use {model!r}", "model_not_found", "model")
    if kind.prompt not in fields:
        raise bad_request(f"'{kind.prompt}' is required", kind.prompt, "missing_required_parameter")
    prompts, prompt_tokens = _prompt_size(fields[kind.prompt]) if kind is COMPLETION else (1, None)
    if kind is not COMPLETION:
        _check_content(fields[kind.prompt], kind)
    grammar.check(fields, limits.max_schema_bytes)
    stream = _boolean(fields, "stream")
    _check_sampling(fields, limits)
    n = max(_integer(fields, "n", 1, limits.max_n) or 1, _integer(fields, "best_of", 1, limits.max_n) or 1)
    if prompts > limits.max_prompts:
        more = f"the limit is {limits.max_prompts}; send fewer at a time, or start the server with a larger --max-prompts"
        raise bad_request(f"{prompts} prompts in one request; {more}", kind.prompt)
    max_tokens = _max_tokens(fields, kind, limits)
    if n * prompts * (max_tokens or 1) > limits.max_generated_tokens:
        raise bad_request(
            f"n x prompts x {kind.max_tokens[0]} = {n} x {prompts} x {max_tokens} is over the limit of "
            f"{limits.max_generated_tokens} generated tokens a request; lower one of them",
            kind.max_tokens[0],
        )
    return Call(kind, fields, body, stream, n, prompts, prompt_tokens, max_tokens)


def decode(body: bytes) -> dict[str, Any]:
    """JSON object of a body, strictly: no duplicate keys, NaN, deep nesting, over-long integers or lone surrogates.

    Raises:
        ApiError: 400, saying where the JSON breaks.
    """
    try:
        fields = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error.msg} at character {error.pos}", code="invalid_json") from None
    except RecursionError:
        raise bad_request(f"the body is nested deeper than {_MAX_DEPTH} levels", code="invalid_json") from None
    except ValueError as error:
        raise bad_request(f"the body is not usable JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise bad_request(f"the body must be a JSON object, not {type(fields).__name__}", code="invalid_json")
    if body.count(b"[") + body.count(b"{") > _MAX_DEPTH:  # fewer brackets cannot nest deeper; a long prompt's ids take time
        _check_depth(fields)
    if _SURROGATE_ESCAPE.search(body):
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise bad_request("the body holds a lone surrogate (half of a \\u pair)", code="invalid_json") from None
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has the same key twice")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(fields: dict[str, Any]) -> None:
    level: list[Any] = [fields]
    for _ in range(_MAX_DEPTH):
        level = [child for node in level for child in _children(node) if type(child) in (dict, list)]
        if not level:
            return
    raise bad_request(f"the body is nested deeper than {_MAX_DEPTH} levels", code="invalid_json")


def _children(node: Any) -> Iterator[Any]:
    return iter(node.values() if isinstance(node, dict) else node)


def _check_names(fields: dict[str, Any], known: frozenset[str]) -> None:
    for name in fields:
        if name in REFUSED and fields[name] is not None and fields[name] is not False:
            raise bad_request(f"'{name[:100]}' is not allowed on this server; remove it", name[:100], "unsupported_parameter")
        if known and name not in known:
            raise bad_request(f"unknown parameter '{name[:100]}'; remove it", name[:100], "unknown_parameter")


def _prompt_size(prompt: Any) -> tuple[int, tuple[int, ...] | None]:
    """Number of prompts, and their lengths where they came as token ids."""
    if isinstance(prompt, str):
        return 1, None
    if isinstance(prompt, list) and prompt:
        types = set(map(type, prompt))
        if types == {int}:
            return 1, (len(prompt),)
        if types == {str}:
            return len(prompt), None
        if types == {list} and all(set(map(type, ids)) == {int} for ids in prompt):
            return len(prompt), tuple(len(ids) for ids in prompt)
    raise bad_request("prompt must be a string, a list of strings, or a list (of lists) of token ids, and not empty", "prompt")


def _check_content(prompt: Any, kind: Kind) -> None:
    if isinstance(prompt, str) and kind is RESPONSES:
        return
    if not isinstance(prompt, list) or not prompt or not all(isinstance(message, dict) for message in prompt):
        raise bad_request(f"{kind.prompt} must be a list of messages, and not empty", kind.prompt)
    for index, message in enumerate(prompt):
        where = f"{kind.prompt}[{index}]"
        if not isinstance(message.get("role", None if kind is CHAT else ""), str):  # Responses' tool outputs have no role
            raise bad_request(f"{where}.role must be a string", f"{where}.role")
        for name in ("content", "output"):
            _check_texts(message.get(name), f"{where}.{name}")


def _check_texts(content: Any, where: str) -> None:
    if content is not None and not isinstance(content, (str, list)):
        raise bad_request(f"{where} must be a string, a list of parts, or null", where)
    for part in content if isinstance(content, list) else ():
        if isinstance(part, str):
            continue
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type not in TEXT_PARTS:
            raise bad_request(f"{where}: type {str(part_type)[:40]!r} is refused, only text is served", where)
        if part.get("uuid") is not None:  # vLLM takes such a part for the image whose URL it may hold, whatever its type
            raise bad_request(f"{where}: a part with a uuid is refused, only text is served; remove it", where)


def _boolean(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{name} must be true or false", name)
    return bool(value)


def _integer(fields: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise bad_request(f"{name} = {str(value)[:40]} is out of range; it must be an integer from {low} to {high}", name)
    return value


def _check_sampling(fields: dict[str, Any], limits: CallLimits) -> None:
    _integer(fields, "top_logprobs", 0, limits.max_logprobs)
    _integer(fields, "prompt_logprobs", 0, limits.max_logprobs)
    _integer(fields, "min_tokens", 0, limits.window)
    _integer(fields, "seed", -(1 << 63), (1 << 63) - 1)
    if not isinstance(fields.get("logprobs"), bool):
        _integer(fields, "logprobs", 0, limits.max_logprobs)
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        value = fields.get(name)
        if value is not None and (type(value) not in (int, float) or not abs(value) < 1e6):
            raise bad_request(f"{name} = {str(value)[:40]} must be a number of ordinary size", name)


def _max_tokens(fields: dict[str, Any], kind: Kind, limits: CallLimits) -> int | None:
    given = [value for name in kind.max_tokens if (value := _integer(fields, name, 1, limits.window)) is not None]
    return given[0] if given else 16 if kind is COMPLETION else None
