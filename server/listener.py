"""The listening address, and uvicorn on it: with limits on the headers, without signal handlers of its own."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ard_serve.errors import UsageError
from server.errors import ApiError, bad_request

_BACKLOG = 1024
_MAX_HEAD_BYTES = 1 << 16
_OF_A_BODY = (b"content-length", b"transfer-encoding")
_UNREAD_S = 30  # that a client has to take the rest of an answer whose connection is to be closed


def bind(host: str, port: int) -> socket.socket:
    """A listening address, taken before the model loads.

    Raises:
        UsageError: another process has the port, or the address is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"{host}:{port}: cannot listen there ({error.strerror}); choose another with --port or --host"
        ) from None
    return listener


class _Corked:
    """A transport that joins what is written in one turn of the event loop: a system call costs more than a short event."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._loop = transport, asyncio.get_running_loop()
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()
        if self._transport.get_write_buffer_size():  # a client that has stopped reading would keep its descriptor for ever
            self._loop.call_later(_UNREAD_S, self._transport.abort)

    def _flush(self) -> None:
        if self._parts:
            self._transport.write(b"".join(self._parts))
            self._parts.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def protocol(header_timeout_s: float) -> type[HttpToolsProtocol]:
    """A protocol that closes a connection whose request headers take longer than `header_timeout_s` seconds or 64 KiB."""

    class BoundedProtocol(HttpToolsProtocol):
        _header_timer: asyncio.TimerHandle | None = None
        _head_bytes = 0  # that came since the last head, body part or end of a request: what the parser may have kept

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(cast(asyncio.Transport, _Corked(transport)))
            self._expect_headers()

        def data_received(self, data: bytes) -> None:
            while data and not self.transport.is_closing():
                # No more than may still belong to a head: one read can bring 256 KiB.
                piece, data = data[: _MAX_HEAD_BYTES - self._head_bytes], data[_MAX_HEAD_BYTES - self._head_bytes :]
                self._head_bytes += len(piece)
                super().data_received(piece)
                if self._head_bytes >= _MAX_HEAD_BYTES:
                    message = f"the request's headers are over {_MAX_HEAD_BYTES} bytes; send fewer or shorter ones"
                    self._refuse(ApiError(431, message, "headers_too_large"))
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self._header_timer is None and not self.transport.is_closing():
                self._expect_headers()

        def on_headers_complete(self) -> None:
            self._head_bytes = 0
            self._stop_timer()
            if self.parser.should_upgrade() and any(name in _OF_A_BODY for name, _ in self.headers):
                # httptools reads what follows as the next request.
                message = "an upgrade of the connection is not possible with a body; send it in plain HTTP/1.1"
                return self._refuse(bad_request(message, code="invalid_http"))
            return super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._head_bytes = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._head_bytes = 0
            if not self.transport.is_closing():
                super().on_message_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._refuse(bad_request("this is not HTTP/1.1 as it should be; check the client, or what is in between",
                                     code="invalid_http"))  # fmt: skip

        def _expect_headers(self) -> None:
            self._header_timer = self.loop.call_later(header_timeout_s, self._too_slow)

        def _too_slow(self) -> None:
            self._refuse(ApiError(408, f"the headers did not arrive within {header_timeout_s:g} s", "header_timeout"))

        def _stop_timer(self) -> None:
            if self._header_timer:
                self._header_timer.cancel()
                self._header_timer = None

        def _refuse(self, error: ApiError) -> None:
            """Answer, where that would not end up inside another answer, and close."""
            has_begun = self.cycle and self.cycle.response_started and not self.cycle.response_complete
            if not has_begun and not self.pipeline and not self.transport.is_closing():
                body = error.body()
                headers = {**error.all_headers(), "content-length": str(len(body)), "connection": "close"}
                lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                self.transport.write(STATUS_LINE[error.status] + lines.encode("latin-1") + b"\r\n" + body)
            self.transport.close()

    return BoundedProtocol


class Server(uvicorn.Server):
    """A uvicorn server whose owner handles the signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(app: Callable[..., Any], header_timeout_s: float, idle_timeout_s: float) -> Server:
    """A server for `app`; the times are in seconds."""
    return Server(
        uvicorn.Config(
            app,
            http=protocol(header_timeout_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=round(max(1, idle_timeout_s)),
            timeout_graceful_shutdown=1,
            backlog=_BACKLOG,
        )
    )
