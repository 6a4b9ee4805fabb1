"""The mock server's HTTP/1.1: httptools on a bare asyncio protocol, with the clock read as bytes arrive and as they leave."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import cast

import httptools

Handle = Callable[["Call"], Awaitable[None]]


class Call(asyncio.Protocol):
    """One connection and the request on it; `handle` answers it and is cancelled when the client leaves."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._parser = httptools.HttpRequestParser(self)
        self._parts: list[bytes] = []
        self._head = b""
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport
        self.path, self.authorization, self.arrived_s = "", "", 0.0

    @property
    def body(self) -> bytes:
        """The request's body."""
        return b"".join(self._parts)

    def start(self, status: int, kind: str) -> None:
        """Begin a chunked response of a content type; its head leaves with the first piece."""
        reason = "OK" if status == 200 else "Error"
        self._head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()

    def send(self, data: bytes) -> float:
        """Write one piece of the body; returns the perf_counter seconds at which it left."""
        self._transport.write(self._framed(data))
        return time.perf_counter()

    def end(self, data: bytes = b"") -> None:
        """Write the last piece and end the response, and the connection unless the client keeps it."""
        self._transport.write((self._framed(data) if data else b"") + b"0\r\n\r\n")
        if not self._parser.should_keep_alive():
            self._transport.close()

    def _framed(self, data: bytes) -> bytes:
        head, self._head = self._head, b""
        return b"%b%x\r\n%b\r\n" % (head, len(data), data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance
        # uvloop would otherwise collect what a whole turn of the loop writes, and the first would leave with the last.
        self._transport.set_write_buffer_limits(high=0)

    def data_received(self, data: bytes) -> None:
        self.arrived_s = self.arrived_s or time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    def on_message_begin(self) -> None:
        self._parts.clear()
        self.authorization = ""

    def on_url(self, url: bytes) -> None:
        self.path = url.decode().partition("?")[0]

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"authorization":
            self.authorization = value.decode(errors="replace")

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._task = asyncio.ensure_future(self._answer())

    async def _answer(self) -> None:
        try:
            await self._handle(self)
        except Exception:
            self._transport.close()
            raise
        finally:
            # The next request on a kept connection arrives by its own bytes.
            self.arrived_s = 0.0
