"""Control tokens that a user types in a message stay text: `<|im_end|>` must not end the user's turn.

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
_UNTRUSTED_ROLES = frozenset({"user", "tool", "function"})


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
        messages = call.fields[call.kind.prompt]
        if self._pattern is None or call.kind is COMPLETION:
            return call
        cleaned = self._text(messages) if isinstance(messages, str) else [self._message(message) for message in messages]
        if cleaned == messages:
            return call
        fields = call.fields | {call.kind.prompt: cleaned}
        return replace(call, fields=fields, body=json.dumps(fields).encode())

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if message.get("role") not in _UNTRUSTED_ROLES or not content:
            return message
        if isinstance(content, str):
            return message | {"content": self._text(content)}
        return message | {"content": [self._part(part) for part in content]}

    def _part(self, part: Any) -> Any:
        if isinstance(part, str):
            return self._text(part)
        return part | {"text": self._text(part["text"])} if isinstance(part.get("text"), str) else part

    def _text(self, text: str) -> str:
        assert self._pattern is not None
        return self._pattern.sub(lambda found: found[0][0] + _JOINER + found[0][1:], text)
