"""HTTP/1.1 on a connection of its own for each request: httptools on a bare asyncio protocol.

A load generator must not measure itself: the clock is read as the socket's bytes come in, before any task is woken.
Measured against h11, httpx, httpx2 and aiohttp in docs/decisions/0003-loadtest-client.md.
"""

import asyncio
import functools
import ssl
import time
from collections.abc import Callable

import httptools

from loadtests.address import Address

# (a piece of the body, perf_counter seconds of its arrival)
Take = Callable[[bytes, float], None]


class Talk(asyncio.Protocol):
    """One request and its response on a connection of its own; the parser calls the `on_` methods."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._parser = httptools.HttpResponseParser(self)
        self._arrived_s = 0.0
        self._ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport
        self.status = 0
        self.sent_s = 0.0

    async def ask(self, address: Address, method: str, path: str, body: bytes) -> None:
        """Send the request, at `sent_s`, and wait for the end of the response; raises what cut it short."""
        headers = {
            "Host": address.authority,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **address.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        message = f"{method} {address.prefix}{path} HTTP/1.1\r\n{head}\r\n".encode() + body
        # uvloop would otherwise hold the bytes back until everything else of this turn of the loop is done.
        self.transport.set_write_buffer_limits(high=0)
        self.sent_s = time.perf_counter()
        self.transport.write(message)
        if error := await self._ended:
            raise error

    def data_received(self, data: bytes) -> None:
        self._arrived_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        # A response without a length ends here too: whether a stream is whole is told by its [DONE].
        self._end(exc or (None if self.status else EOFError("the connection was closed without an answer")))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._take(body, self._arrived_s)

    def on_message_complete(self) -> None:
        if self.status >= 200:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(error)


async def connect(address: Address, take: Take) -> Talk:
    """Open a connection; `take` is given each piece of the response's body as it arrives."""
    context = _tls() if address.scheme == "https" else None
    loop = asyncio.get_running_loop()
    transport, talk = await loop.create_connection(lambda: Talk(take), address.host, address.port, ssl=context)
    talk.transport = transport
    return talk


async def fetch(address: Address, path: str, timeout_s: float) -> bytes:
    """GET `path` and return its body; raises OSError for any answer but 200."""
    parts: list[bytes] = []
    async with asyncio.timeout(timeout_s):
        talk = await connect(address, lambda part, _: parts.append(part))
        try:
            await talk.ask(address, "GET", path, b"")
        except (EOFError, httptools.HttpParserError) as error:
            raise OSError(f"{path}: {error}") from None
        finally:
            talk.transport.close()
    if talk.status != 200:
        raise OSError(f"{path}: status {talk.status}")
    return b"".join(parts)


@functools.cache
def _tls() -> ssl.SSLContext:
    """Reads the machine's certificates, which takes long enough to be done once."""
    return ssl.create_default_context()
