"""One streamed completion, timed: the events of its response, and how it ended."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import httptools

from loadtests.address import Address
from loadtests.connection import connect

Outcome = Literal[
    "ok", "rejected", "server_error", "client_error", "timeout", "no_done", "error_event", "connection", "cancelled"
]


@dataclass(slots=True)
class Exchange:
    """What one request saw. Times are `time.perf_counter()` seconds; `token_times_s` has one entry per token-bearing event."""

    outcome: Outcome = "cancelled"
    status: int = 0
    detail: str = ""
    connect_ms: float = 0
    sent_s: float = 0
    token_times_s: list[float] = field(default_factory=list)
    finished_s: float = 0
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
        if not exchange.token_times_s and exchange.usage.get("completion_tokens"):
            # A single token without text, such as an end that was to be ignored, comes with the event that finishes.
            exchange.token_times_s.append(exchange.finished_s)
        exchange.outcome = _judge(exchange)
    except TimeoutError:
        exchange.outcome, exchange.detail = "timeout", f"no end after {timeout_s:g} s"
    except (OSError, EOFError, httptools.HttpParserError) as error:
        exchange.outcome = "no_done" if exchange.token_times_s else "connection"
        exchange.detail = str(error) or type(error).__name__
    return exchange


async def _follow(address: Address, path: str, body: bytes, exchange: Exchange) -> None:
    rest = b""

    def take(part: bytes, now_s: float) -> None:
        nonlocal rest
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            _take(line, now_s, exchange)

    began_s = time.perf_counter()
    talk = await connect(address, take)
    try:
        exchange.connect_ms = (time.perf_counter() - began_s) * 1000
        await talk.ask(address, "POST", path, body)
        if talk.status != 200:
            exchange.detail = rest[:500].decode(errors="replace")
    finally:
        exchange.status, exchange.sent_s = talk.status, talk.sent_s
        talk.transport.close()


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
        data = None
    if not isinstance(data, dict):
        data = {"error": {"message": f"event is not a JSON object: {payload[:80]!r}"}}
    if error := data.get("error"):
        exchange.detail = str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    if usage := data.get("usage"):
        exchange.usage = usage
    for choice in data.get("choices") or ():
        text, bears_token = _content(choice)
        exchange.text += text
        exchange.finished_s = now_s
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
