"""One streamed request, timed: h11 on bare asyncio streams, so that the client does not measure itself.

Measured against httpx, httpx2 and aiohttp in docs/decisions/0003-loadtest-client.md: at 128 streams and a true TTFT of
200 ms the general clients report 240 to 430 ms, this one 215.
"""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import h11

from loadtests.address import Address

Outcome = Literal[
    "ok", "rejected", "server_error", "client_error", "timeout", "no_done", "error_event", "connection", "cancelled"
]
_READ_BYTES = 1 << 16


@dataclass(slots=True)
class Exchange:
    """What one request saw. Times are `time.perf_counter()` seconds; `token_times_s` has one entry per token-bearing event."""

    outcome: Outcome = "cancelled"
    status: int = 0
    detail: str = ""
    connect_ms: float = 0
    sent_s: float = 0
    token_times_s: list[float] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    done: bool = False


Stream = Callable[[Address, str, bytes, float, "Exchange"], Awaitable["Exchange"]]


async def stream(address: Address, path: str, body: bytes, timeout_s: float, seen: Exchange | None = None) -> Exchange:
    """Send one completion request and follow its events to `[DONE]`.

    Never raises for what a server does: the outcome says it. `seen` is filled as the stream goes on, so that a caller
    that cancels keeps what has been measured.
    """
    exchange = seen if seen is not None else Exchange()
    try:
        async with asyncio.timeout(timeout_s):
            await _follow(address, path, body, exchange)
        exchange.outcome = _judge(exchange)
    except TimeoutError:
        exchange.outcome, exchange.detail = "timeout", f"no end after {timeout_s:g} s"
    except (OSError, EOFError, h11.ProtocolError) as error:
        exchange.outcome = "no_done" if exchange.token_times_s else "connection"
        exchange.detail = str(error) or type(error).__name__
    return exchange


async def fetch(address: Address, path: str, timeout_s: float) -> bytes:
    """GET `path` and return its body; raises OSError for any answer but 200."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await _connect(address)
        try:
            parts = [part async for part in _talk(address, "GET", path, b"", reader, writer)]
        finally:
            writer.close()
    if parts[0] != 200:
        raise OSError(f"{path}: status {parts[0]!r}")
    return b"".join(part for part in parts[1:] if isinstance(part, bytes))


async def _connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = ssl.create_default_context() if address.scheme == "https" else None
    return await asyncio.open_connection(address.host, address.port, ssl=context)


async def _follow(address: Address, path: str, body: bytes, exchange: Exchange) -> None:
    began_s = time.perf_counter()
    reader, writer = await _connect(address)
    try:
        exchange.sent_s = time.perf_counter()
        exchange.connect_ms = (exchange.sent_s - began_s) * 1000
        rest = b""
        async for part in _talk(address, "POST", path, body, reader, writer):
            if isinstance(part, int):
                exchange.status = part
                continue
            now_s = time.perf_counter()
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                _take(line, now_s, exchange)
        if exchange.status != 200:
            exchange.detail = rest[:500].decode(errors="replace")
    finally:
        writer.close()


async def _talk(
    address: Address, method: str, path: str, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> AsyncIterator[int | bytes]:
    """Yield the status, then the body's pieces as they arrive."""
    http = h11.Connection(h11.CLIENT)
    headers = {
        "Host": f"{address.host}:{address.port}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **address.headers,
    }
    request = h11.Request(method=method, target=address.prefix + path, headers=list(headers.items()))
    writer.write(http.send(request) + (http.send(h11.Data(data=body)) if body else b"") + http.send(h11.EndOfMessage()))
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Data):
            yield bytes(event.data)
        elif isinstance(event, h11.Response):
            yield event.status_code
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            return


def _take(line: bytes, now_s: float, exchange: Exchange) -> None:
    """Read one line of a server-sent event stream."""
    if not line.startswith(b"data:"):
        return
    payload = line[5:].strip()
    if payload == b"[DONE]":
        exchange.done = True
        return
    try:
        data = json.loads(payload)
    except ValueError:
        data = {"error": {"message": f"event is not JSON: {payload[:80]!r}"}}
    if error := data.get("error"):
        exchange.detail = str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    if usage := data.get("usage"):
        exchange.usage = usage
    for choice in data.get("choices") or ():
        text, bears_token = _content(choice)
        exchange.text += text
        if bears_token:
            exchange.token_times_s.append(now_s)


def _content(choice: dict[str, Any]) -> tuple[str, bool]:
    """The text of one choice and whether the event carries a generated token.

    A completion's event with empty text carries a token that is not whole characters yet; a chat's carries its role.
    """
    if "delta" in choice:
        delta = choice["delta"] or {}
        text = (delta.get("content") or "") + (delta.get("reasoning_content") or delta.get("reasoning") or "")
        return text, bool(text)
    text = choice.get("text") or ""
    return text, bool(text) or choice.get("finish_reason") is None


def _judge(exchange: Exchange) -> Outcome:
    if exchange.status == 429:
        return "rejected"
    if exchange.status >= 500:
        return "server_error"
    if exchange.status != 200:
        return "client_error"
    if exchange.detail:
        return "error_event"
    return "ok" if exchange.done and exchange.token_times_s else "no_done"
