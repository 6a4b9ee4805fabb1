"""The OpenAPI document of this gateway: its routes, what it checks in a request, and every status it may answer."""

from collections.abc import Mapping
from typing import Any

import ard_serve
from server.call import CHAT, COMPLETION, KINDS, REFUSED, TEXT_PARTS, CallLimits, Kind

Schema = dict[str, Any]

_INTEGERS: Schema = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PART: Schema = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": {"enum": list(TEXT_PARTS)}, "uuid": {"type": "null"}},
}
_CONTENT: Schema = {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"anyOf": [{"type": "string"}, _PART]}}]}
_MESSAGE: Schema = {"type": "object", "properties": {"role": {"type": "string"}, "content": _CONTENT, "output": _CONTENT}}
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_PLAN: Schema = {
    "type": "object",
    "required": [
        "object",
        "fits",
        "fits_now",
        "prompt_tokens",
        "max_tokens",
        "window",
        "beyond_measured",
        "kv_tokens",
        "lane",
        "profile",
    ],
    "properties": {
        **{name: {"type": "boolean"} for name in ("fits", "fits_now", "beyond_measured")},
        **{name: {"type": "integer"} for name in ("prompt_tokens", "max_tokens", "window", "kv_tokens", "kv_tokens_free")},
        "requests_waiting": {"type": "integer"},
        "lane": {"enum": ["short", "long"]},
        "profile": {"enum": ["restored", "native"]},
        "estimated_first_token_s": {"type": ["number", "null"]},
        "estimated_last_token_s": {"type": ["number", "null"]},
    },
}
_CARD: Schema = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "max_model_len"],
    "properties": {"id": {"type": "string"}, "object": {"const": "model"}, "max_model_len": {"type": "integer"}},
}
_CARDS: Schema = {"type": "object", "required": ["object", "data"], "properties": {"data": {"type": "array", "items": _CARD}}}
_PROBE: Schema = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}
_EVENT: Schema = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}  # one of a stream's
_ANY_OBJECT: Schema = {"type": "object"}
_ERRORS = {
    400: "A value is wrong; `param` names it.",
    401: "The key is missing or wrong.",
    403: "The key is not an administrator's.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    429: "The server is full, or the key's quota is used up.",
    500: "The engine computes nonsense, or the gateway has a bug.",
    503: "The engine is loading, down or shutting down.",
    504: "The request did not end within its deadline.",
}
_OF_A_REQUEST = (400, 401, 404, 408, 413, 429, 500, 503, 504)
_NO_KEY: Schema = {"security": [{}]}


def document(limits: CallLimits, parameters: Mapping[str, frozenset[str]], keyed: bool) -> Schema:
    """The document. `parameters` are the engine's request fields by schema name; before it has loaded any field passes."""
    schemas = {kind.schema: _request(kind, limits, parameters.get(kind.schema, frozenset())) for kind in KINDS}
    refs = {kind: {"$ref": f"#/components/schemas/{kind.schema}"} for kind in KINDS}
    stream = {"text/event-stream": {"schema": _EVENT}}
    paths: Schema = {kind.path: {"post": _operation(_ANY_OBJECT, _OF_A_REQUEST, refs[kind], stream)} for kind in KINDS}
    paths["/v1/plan"] = {"post": _operation(_PLAN, _OF_A_REQUEST, {"anyOf": [refs[COMPLETION], refs[CHAT]]})}
    paths["/v1/models"] = {"get": _operation(_CARDS, (401,))}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    paths["/v1/models/{name}"] = {"get": _operation(_CARD, (401, 404)), "parameters": [name]}
    paths["/openapi.json"] = {"get": _operation(_ANY_OBJECT, (401,))}
    metrics = _operation({}, (401, 403))
    metrics["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    paths["/metrics"] = {"get": metrics}
    page = _operation({}, ()) | _NO_KEY
    page["responses"]["200"]["content"] = {"text/html": {"schema": {"type": "string"}}}
    paths["/dashboard"] = {"get": page}
    paths["/livez"] = {"get": _operation(_PROBE, ()) | _NO_KEY}
    paths["/readyz"] = {"get": _operation(_PROBE, ()) | _NO_KEY}
    paths["/readyz"]["get"]["responses"]["503"] = _answer("Not ready; `reason` says why.", _PROBE)
    return {
        "openapi": "3.1.0",
        "info": {"title": "ard serve", "version": ard_serve.__version__},
        "security": [{"key": []}] if keyed else [],
        "paths": paths,
        "components": {
            "schemas": schemas | {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _request(kind: Kind, limits: CallLimits, known: frozenset[str]) -> Schema:
    """What `call.parse` looks at; other fields of the engine go to it as they are."""
    logprobs = _integer(0, limits.max_logprobs)
    checked: Schema = {
        kind.prompt: _prompt(kind, limits),
        "model": {"type": ["string", "null"]},
        "stream": {"type": ["boolean", "null"]},
        "n": _integer(1, limits.max_n),
        "best_of": _integer(1, limits.max_n),
        "seed": _integer(-(1 << 63), (1 << 63) - 1),
        "min_tokens": _integer(0, limits.window),
        "top_logprobs": logprobs,
        "prompt_logprobs": logprobs,
        "logprobs": {"anyOf": [{"type": "boolean"}, logprobs]},
        **{name: _integer(1, limits.window) for name in kind.max_tokens},
        **{name: {"type": ["number", "null"], "exclusiveMinimum": -1e6, "exclusiveMaximum": 1e6} for name in _NUMBERS},
        **{name: {"enum": [None, False]} for name in REFUSED},
    }
    names = known or checked.keys()
    properties = {name: checked.get(name, {}) for name in sorted(names)}
    return {"type": "object", "required": [kind.prompt], "properties": properties, "additionalProperties": not known}


def _prompt(kind: Kind, limits: CallLimits) -> Schema:
    text: Schema = {"type": "string"}
    if kind is COMPLETION:
        several: Schema = {"type": "array", "minItems": 1, "maxItems": limits.max_prompts}
        return {"anyOf": [text, _INTEGERS, several | {"items": text}, several | {"items": _INTEGERS}]}
    if kind is CHAT:
        return {"type": "array", "items": _MESSAGE | {"required": ["role"]}, "minItems": 1}
    return {"anyOf": [text, {"type": "array", "items": _MESSAGE, "minItems": 1}]}


def _integer(low: int, high: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def _operation(answer: Schema, errors: tuple[int, ...], body: Schema | None = None, other: Schema | None = None) -> Schema:
    responses = {"200": _answer("OK", answer, other)}
    responses |= {str(status): _answer(_ERRORS[status], {"$ref": "#/components/schemas/Error"}) for status in errors}
    operation: Schema = {"responses": responses}
    if body:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation


def _answer(description: str, schema: Schema, other: Schema | None = None) -> Schema:
    request_id = {"x-request-id": {"required": True, "schema": {"type": "string"}}}
    return {
        "description": description,
        "headers": request_id,
        "content": {"application/json": {"schema": schema}, **(other or {})},
    }
