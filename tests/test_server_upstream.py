"""The gateway's own client of its engine: connections used again, answers cut short, ends that cancel. Real sockets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from server import connection, upstream
from server.connection import UpstreamError
from server.upstream import Upstream

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class Peer:
    """An engine that gives each request the same bytes, and counts connections and requests."""

    def __init__(self, answer: bytes, then_close: bool = False) -> None:
        self.answer, self.then_close = answer, then_close
        self.connections = 0
        self.heads: list[bytes] = []
        self.closed = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head)
                writer.write(self.answer)
                await writer.drain()
                if self.then_close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            self.closed.set()
        finally:
            writer.close()


@asynccontextmanager
async def talking_to(peer: Peer, folder: Path) -> AsyncIterator[Upstream]:
    server = await asyncio.start_unix_server(peer.serve, str(folder / "engine.sock"))
    async with server:
        with closing(Upstream(folder / "engine.sock", "secret")) as client:
            yield client


async def test_a_connection_is_used_again_and_carries_key_and_id(tmp_path: Path) -> None:
    async with talking_to(peer := Peer(WHOLE), tmp_path) as client:
        for number in range(3):
            assert await client.call("GET", "/health", request_id=f"r{number}") == (200, {})
    assert (peer.connections, len(peer.heads)) == (1, 3)
    assert b"authorization: Bearer secret\r\n" in peer.heads[2]
    assert b"x-request-id: r2\r\n" in peer.heads[2]


async def test_one_that_was_idle_too_long_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is about to close it: a request must not meet that."""
    monkeypatch.setattr(upstream, "_REUSE_S", 0)
    async with talking_to(peer := Peer(WHOLE), tmp_path) as client:
        await client.call("GET", "/health")
        await client.call("GET", "/health")
    assert peer.connections == 2


async def test_requests_at_once_have_a_connection_each(tmp_path: Path) -> None:
    async with talking_to(peer := Peer(WHOLE), tmp_path) as client:
        await asyncio.gather(*(client.call("GET", "/health") for _ in range(5)))
    assert peer.connections == 5


@pytest.mark.fault("S4")
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        WHOLE[:-1],
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
        b"SSH-2.0-OpenSSH\r\n\r\n",
    ],
    ids=["nothing", "half a head", "short of its length", "half a chunk", "not HTTP"],
)
async def test_an_answer_that_breaks_off_is_an_error(tmp_path: Path, answer: bytes) -> None:
    async with talking_to(Peer(answer, then_close=True), tmp_path) as client:
        with pytest.raises(UpstreamError):
            await client.call("GET", "/health")


async def test_an_answer_without_a_length_ends_with_its_connection(tmp_path: Path) -> None:
    async with talking_to(Peer(b"HTTP/1.1 200 OK\r\n\r\nabc", then_close=True), tmp_path) as client:
        assert await client.call("GET", "/health") == (200, "abc")


async def test_nobody_there_is_an_error(tmp_path: Path) -> None:
    with closing(Upstream(tmp_path / "no.sock", "")) as client, pytest.raises(UpstreamError, match="no connection"):
        await client.call("GET", "/health")


@pytest.mark.fault("S17")
async def test_closing_an_answer_early_ends_the_connection(tmp_path: Path) -> None:
    unfinished = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n"
    async with talking_to(peer := Peer(unfinished), tmp_path) as client:
        with closing(await client.ask("POST", "/v1/completions", b"{}", "r")) as answer:
            assert await answer.piece() == b"ab"
        await asyncio.wait_for(peer.closed.wait(), 5)


async def test_an_answer_that_nobody_takes_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HIGH_WATER_BYTES", 1000)
    size = 20_000_000
    peer = Peer(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
    async with talking_to(peer, tmp_path) as client:
        with closing(await client.ask("GET", "/", b"", "r")) as answer:
            await asyncio.sleep(0.2)  # time in which all of it would come
            held = len(await answer.piece())
            assert held < size / 4
            assert held + len(await answer.read()) == size
