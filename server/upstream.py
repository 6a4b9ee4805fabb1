"""HTTP to one engine, by socket or URL: connections kept for reuse, answers whose closing cancels the engine's work."""

import asyncio
import json
import ssl
import time
from collections import deque
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from server.connection import Connection, UpstreamError

_CONNECT_TIMEOUT_S = 5
_REUSE_S = 3  # vLLM closes a connection that has been idle for five seconds; a request must not meet that
_NO_TRACE: Mapping[str, str] = {}


class Upstream:
    """A client of one engine. Deadlines are the caller's: every await here may be cancelled, which closes the connection."""

    def __init__(self, address: Path | str, key: str) -> None:
        self._socket = str(address) if isinstance(address, Path) else None
        url = urlsplit("http://engine" if self._socket else str(address))
        self._host, self._port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        authorization = f"authorization: Bearer {key}\r\n" if key else ""
        self._head = f" HTTP/1.1\r\nhost: {url.netloc}\r\n{authorization}content-type: application/json\r\n"
        self._idle: deque[Connection] = deque()  # the one used last at the right

    async def ask(
        self, method: str, path: str, body: bytes, request_id: str, trace: Mapping[str, str] = _NO_TRACE
    ) -> Connection:
        """Send a request and return its answer once the head is there. The caller closes it; early is what cancels it.

        Raises:
            UpstreamError: the connection failed.
        """
        more = "".join(f"{name}: {value}\r\n" for name, value in trace.items())
        head = f"{method} {path}{self._head}x-request-id: {request_id}\r\n{more}content-length: {len(body)}\r\n\r\n"
        connection = self._reuse() or await self._connect()
        try:
            await connection.ask(head.encode("latin-1") + body)
        except BaseException:
            connection.abort()
            raise
        return connection

    async def call(self, method: str, path: str, payload: Any = None, request_id: str = "gateway") -> tuple[int, Any]:
        """Status and decoded JSON of a short request; text where the answer is not JSON.

        Raises:
            UpstreamError: the connection failed.
        """
        body = b"" if payload is None else json.dumps(payload).encode()
        with closing(await self.ask(method, path, body, request_id)) as answer:
            raw = await answer.read()
            try:
                return answer.status, json.loads(raw)
            except ValueError:
                return answer.status, raw.decode(errors="replace")

    def close(self) -> None:
        """End the connections that nobody uses."""
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    def _reuse(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if _is_fresh(connection):
                return connection
            connection.abort()
        return None

    def _release(self, connection: Connection) -> None:
        if connection.is_reusable:
            self._idle.append(connection)
        else:
            connection.abort()
        while self._idle and not _is_fresh(self._idle[0]):
            self._idle.popleft().abort()

    async def _connect(self) -> Connection:
        loop, new = asyncio.get_running_loop(), lambda: Connection(self._release)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                if self._socket:
                    _, connection = await loop.create_unix_connection(new, self._socket)
                else:
                    _, connection = await loop.create_connection(new, self._host, self._port, ssl=self._tls)
        except OSError as error:  # a TimeoutError is one
            raise UpstreamError(f"no connection: {error or 'timed out'}") from error
        return connection


def _is_fresh(connection: Connection) -> bool:
    return connection.is_open and time.monotonic() - connection.idle_since < _REUSE_S
