"""Remembers which conversations have outgrown the native model: those never go back to it."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

_REMEMBERED = 100_000  # of 16 bytes each, the oldest forgotten first


class Conversations:
    """Known by the hashes of their messages: a turn's messages are the beginning of the next turn's."""

    def __init__(self, limit: int = _REMEMBERED) -> None:
        self._limit = limit
        self._grown: OrderedDict[bytes, None] = OrderedDict()

    def grew(self, owner: str, messages: Sequence[Any]) -> None:
        """Note that this conversation of `owner`'s has gone to the restored model."""
        *_, whole = _digests(owner, messages)
        self._grown[whole] = None
        self._grown.move_to_end(whole)
        if len(self._grown) > self._limit:
            self._grown.popitem(last=False)

    def has_grown(self, owner: str, messages: Sequence[Any]) -> bool:
        """Whether these messages, or those that they began with in an earlier turn, have."""
        return any(digest in self._grown for digest in _digests(owner, messages))


def _digests(owner: str, messages: Sequence[Any]) -> Iterator[bytes]:
    """One for each beginning of the conversation, the whole last; texts are not kept."""
    running = hashlib.sha256(owner.encode())
    for message in messages:
        running.update(json.dumps(message, sort_keys=True).encode() + b"\n")
        yield running.digest()[:16]
