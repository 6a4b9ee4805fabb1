"""One HTTP/1.1 connection to an engine: httptools on an asyncio protocol, one request at a time.

Why not a client library: docs/decisions/0002-gateway-http-client.md.
"""

import asyncio
import time
from collections.abc import Callable

import httptools

# An answer that its client does not take as fast as the engine gives it stops being read here.
_HIGH_WATER_BYTES = 1 << 18


class UpstreamError(Exception):
    """The engine did not answer, or stopped in the middle of an answer."""


class Connection(asyncio.Protocol):
    """A connection, and the answer that is coming in on it; the parser calls the `on_` methods.

    `release` is given the connection when its answer has been closed, and decides whether it is used again.
    """

    def __init__(self, release: Callable[["Connection"], None]) -> None:
        self.status, self.content_type = 0, ""
        self.idle_since = 0.0
        self._release = release
        self._parser = httptools.HttpResponseParser(self)
        self._has_head = self._is_whole = self._has_length = self._keeps_alive = False
        self._lost: str | None = None
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        self._news: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport

    async def ask(self, request: bytes) -> None:
        """Send a whole request and wait for the head of its answer.

        Raises:
            UpstreamError: the connection broke before that.
        """
        self._parser = httptools.HttpResponseParser(self)
        self._has_head = self._is_whole = self._has_length = self._keeps_alive = False
        self._transport.write(request)
        while not self._has_head:
            await self._more()

    async def piece(self) -> bytes:
        """What has come of the body since the last call; waits for something, and is empty at the body's end.

        Raises:
            UpstreamError: the connection broke before the end.
        """
        while not self._pieces:
            if self._is_whole:
                return b""
            await self._more()
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if self._held_bytes > _HIGH_WATER_BYTES:
            self._transport.resume_reading()
        self._held_bytes = 0
        return body

    async def read(self) -> bytes:
        """The rest of the body."""
        pieces = []
        while piece := await self.piece():
            pieces.append(piece)
        return b"".join(pieces)

    @property
    def is_reusable(self) -> bool:
        """Whether the answer has come whole and another request may follow it."""
        return self._keeps_alive and self._lost is None and not self._pieces

    @property
    def is_open(self) -> bool:
        return self._lost is None

    def close(self) -> None:
        """The answer is done with. One that has not come whole ends the connection, which tells the engine to stop."""
        self.idle_since = time.monotonic()
        self._release(self)

    def abort(self) -> None:
        """End the connection."""
        self._transport.abort()

    async def _more(self) -> None:
        if self._lost is not None:
            raise UpstreamError(self._lost)
        self._news = asyncio.get_running_loop().create_future()
        await self._news

    def _tell(self) -> None:
        if self._news and not self._news.done():
            self._news.set_result(None)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._lost = f"not HTTP: {error}"
            self._transport.abort()
        if self._held_bytes > _HIGH_WATER_BYTES:
            self._transport.pause_reading()
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._has_head and not self._has_length:
            self._is_whole = True  # such an answer ends where its connection ends
        self._lost = self._lost or f"the connection was closed: {exc or 'by the engine'}"
        self._tell()

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower == b"content-type":
            self.content_type = value.decode("latin-1")
        elif lower in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._has_head = self.status >= 200

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._held_bytes += len(body)

    def on_message_complete(self) -> None:
        self._is_whole = self._has_head
        self._keeps_alive = self._is_whole and self._parser.should_keep_alive()
