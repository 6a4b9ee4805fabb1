"""A client that stops reading does not keep its connection beyond the end of its answer."""

import asyncio
import socket

import pytest

from server import listener


class Talker(asyncio.Protocol):
    """Writes more than the sockets hold, then closes."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        corked = listener._Corked(transport)
        corked.write(b"x" * 20_000_000)
        corked.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


@pytest.mark.fault("S17")
async def test_a_client_that_has_stopped_reading_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_UNREAD_S", 0.1)
    ours, theirs = socket.socketpair()
    with theirs:
        _, talker = await asyncio.get_running_loop().connect_accepted_socket(Talker, ours)
        await asyncio.wait_for(talker.lost.wait(), 5)
