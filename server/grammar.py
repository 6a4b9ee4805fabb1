"""Schemas, patterns and grammars of a request, bounded before an engine compiles them: one alone could hold it for minutes."""

import json
import re
from collections.abc import Iterator
from typing import Any

from server.errors import bad_request

_MAX_REPEATS = 10_000
_MAX_REPEAT_DIGITS = 9  # more are over the limit whatever they say, and of thousands Python makes no int
_TOOLS_PER_SCHEMA = 16  # all tools together may take so many times one schema's size: an agent brings dozens
_INTEGER_LIMITS = {"maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties"}
# With spaces, as EBNF allows. Possessive (+): a brace that never closes must not be tried with every part of its digits.
_REPEAT = re.compile(r"\{\s*+(\d*+)\s*+(?:,\s*+(\d*+)\s*+)?\}")


def check(fields: dict[str, Any], max_schema_bytes: int) -> None:
    """Look at what the body of a request would have compiled.

    Raises:
        ApiError: 400: larger or with more repetitions than the limits, or with a parameter that a grammar cannot end under.
    """
    for name in ("response_format", "structured_outputs", "tools", "text"):
        value = fields.get(name)
        if value is None:
            continue
        size_bytes = len(json.dumps(value))
        limit_bytes = max_schema_bytes * (_TOOLS_PER_SCHEMA if name == "tools" else 1)
        if size_bytes > limit_bytes:
            remedy = f"{'send fewer or shorter ones' if name == 'tools' else 'shorten it'}, or start the server with a larger"
            raise bad_request(f"{name} is {size_bytes} bytes; the limit is {limit_bytes}; {remedy} --max-schema-bytes", name)
        if any(repeats > _MAX_REPEATS for repeats in _repeats(value)):
            raise bad_request(f"{name} asks for more than {_MAX_REPEATS} repetitions, the limit; ask for fewer", name)
        if name != "tools" and fields.get("ignore_eos") and _is_grammar(value):
            raise bad_request(f"ignore_eos does not go with {name}, whose grammar says where to end; remove one", "ignore_eos")


def _is_grammar(value: Any) -> bool:
    """Whether it asks for more than plain text; in Responses the format lies inside, beside a verbosity."""
    form = (
        value.get("format", {"type": "text"}) if isinstance(value, dict) and value.keys() & {"format", "verbosity"} else value
    )
    return bool(form != {"type": "text"})


def _repeats(node: Any) -> Iterator[float]:
    """Every bound that a grammar compiler would unroll: a schema's length limits, a pattern's {m,n} multiplied."""
    if isinstance(node, str):
        product = 1
        for bounds in _REPEAT.findall(node):
            product = min(product * max(1, *map(_bound, bounds)), _MAX_REPEATS + 1)
        yield product
    elif isinstance(node, dict):
        yield from (value for key, value in node.items() if key in _INTEGER_LIMITS and type(value) in (int, float))
        yield from (bound for value in node.values() for bound in _repeats(value))
    elif isinstance(node, list):
        yield from (bound for value in node for bound in _repeats(value))


def _bound(digits: str) -> int:
    return int(digits or 0) if len(digits) <= _MAX_REPEAT_DIGITS else _MAX_REPEATS + 1
