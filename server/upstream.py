"""HTTP to the engine, by socket or URL: whole answers, and streams whose closing cancels the engine's work."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

_CONNECT_TIMEOUT_S = 5
_NO_TRACE: Mapping[str, str] = {}


class UpstreamError(Exception):
    """The engine did not answer, or stopped in the middle of an answer."""


class Upstream:
    """A client of one engine. Deadlines are the caller's: every await here may be cancelled, which closes the connection."""

    def __init__(self, address: Path | str, key: str) -> None:
        on_socket = isinstance(address, Path)
        self._session = aiohttp.ClientSession(
            base_url="http://engine" if on_socket else str(address),
            connector=aiohttp.UnixConnector(path=str(address), limit=0) if on_socket else aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            headers={"authorization": f"Bearer {key}"} if key else None,
            auto_decompress=False,
        )

    @asynccontextmanager
    async def open(
        self, method: str, path: str, body: bytes | None, request_id: str, trace: Mapping[str, str] = _NO_TRACE
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request and yield its response as soon as the headers are there; leaving the block early cancels it.

        Raises:
            UpstreamError: the connection failed, before or during the answer.
        """
        headers = {"x-request-id": request_id, "content-type": "application/json", **trace}
        try:
            async with self._session.request(method, path, data=body, headers=headers) as response:
                try:
                    yield response
                finally:
                    # Releasing would read the rest to reuse the connection; closing is what tells the engine to stop.
                    if not response.content.at_eof():
                        response.close()
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(f"{type(error).__name__}: {error}") from error

    async def call(self, method: str, path: str, payload: Any = None, request_id: str = "gateway") -> tuple[int, Any]:
        """Status and decoded JSON of a short request; text where the answer is not JSON.

        Raises:
            UpstreamError: the connection failed.
        """
        body = None if payload is None else json.dumps(payload).encode()
        async with self.open(method, path, body, request_id) as response:
            raw = await response.read()
            try:
                return response.status, json.loads(raw)
            except ValueError:
                return response.status, raw.decode(errors="replace")

    async def close(self) -> None:
        await self._session.close()
