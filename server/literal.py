"""Control tokens that a user types, or that stand in what a tool has fetched, stay text: `<|im_end|>` must not end a turn.

vLLM encodes a rendered chat with every special token active, and only the template is meant to write those. A word joiner
(U+2060, invisible) after the first character of a typed one makes the tokenizer see ordinary characters.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from server.call import COMPLETION, Call

_JOINER = "\u2060"
_TRUSTED_ROLES = ("system", "developer", "assistant")  # written by the client's own program or by the model


def control_tokens(folder: Path) -> tuple[str, ...]:
    """The special tokens of a model folder's tokenizer, longest first; none where it has no tokenizer files."""
    found = {token for name in ("tokenizer.json", "tokenizer_config.json") for token in _special(folder / name)}
    return tuple(sorted(found, key=lambda token: (-len(token), token)))


def _special(path: Path) -> Iterator[str]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    added = [*(fields.get("added_tokens") or ()), *(fields.get("added_tokens_decoder") or {}).values()]
    yield from (token["content"] for token in added if token.get("special") and len(token.get("content", "")) > 1)


class Literal:
    """Rewrites the messages of a call that contain control tokens; leaves every other call's bytes alone."""

    def __init__(self, tokens: tuple[str, ...]) -> None:
        self._pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def clean(self, call: Call) -> Call:
        """The call, with typed control tokens made literal. Raw completions are the client's own template: untouched."""
        if self._pattern is None or call.kind is COMPLETION:
            return call
        name, prompt = call.kind.prompt, call.fields[call.kind.prompt]
        cleaned = {name: self._literal(prompt) if isinstance(prompt, str) else [self._message(message) for message in prompt]}
        if "documents" in call.fields:
            cleaned["documents"] = self._literal(call.fields["documents"])
        fields = call.fields | cleaned
        return call if fields == call.fields else replace(call, fields=fields, body=json.dumps(fields).encode())

    def _message(self, message: dict[str, Any]) -> Any:
        """vLLM takes an item with an output for a tool's, whatever role it states."""
        is_trusted = message.get("role") in _TRUSTED_ROLES and "output" not in message
        return message if is_trusted else self._literal(message)

    def _literal(self, node: Any) -> Any:
        """Every text in it, whatever its field: templates and vLLM's own readers differ in which they write."""
        if isinstance(node, str):
            assert self._pattern is not None
            return self._pattern.sub(lambda found: found[0][0] + _JOINER + found[0][1:], node)
        if isinstance(node, dict):
            return {name: self._literal(value) for name, value in node.items()}
        return [self._literal(child) for child in node] if isinstance(node, list) else node
