"""Several processes that send, for loads that one event loop cannot follow; one process decides what is sent when.

Times stay comparable: `time.perf_counter` is the machine's monotonic clock, the same in every process on Linux.
"""

import asyncio
import contextlib
import functools
import itertools
import pickle
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from loadtests.address import Address
from loadtests.client import Exchange, stream

_LENGTH = struct.Struct("<I")


class SenderPool:
    """Child processes that follow streams; `stream` is `loadtests.client.stream`, done by the least busy of them."""

    def __init__(self, children: list["_Child"]) -> None:
        self._children = children

    async def stream(self, address: Address, path: str, body: bytes, timeout_s: float, seen: Exchange) -> Exchange:
        """Follow one request; `seen` is filled when it ends or is cancelled."""
        child = min(self._children, key=lambda one: len(one.waiting))
        return await child.stream((address, path, body, timeout_s), seen)


@asynccontextmanager
async def sender_pool(processes: int) -> AsyncIterator[SenderPool]:
    """`processes` children for as long as the body runs."""
    children = [await _Child.start() for _ in range(processes)]
    try:
        yield SenderPool(children)
    finally:
        for child in children:
            await child.stop()


class _Child:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count()
        self.waiting: dict[int, asyncio.Future[Exchange]] = {}
        self._answers = asyncio.create_task(self._read())

    @classmethod
    async def start(cls) -> "_Child":
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, "-m", "loadtests.senders"]
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, start_new_session=True))

    async def stream(self, request: tuple[Any, ...], seen: Exchange) -> Exchange:
        number = next(self._numbers)
        future = self.waiting[number] = asyncio.get_running_loop().create_future()
        self._tell((number, request))
        try:
            found = await asyncio.shield(future)
        except asyncio.CancelledError:
            self._tell((number, None))
            _copy(await future, seen)
            raise
        _copy(found, seen)
        return seen

    async def stop(self) -> None:
        self._answers.cancel()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    def _tell(self, message: tuple[int, Any]) -> None:
        assert self._process.stdin is not None
        frame = pickle.dumps(message)
        self._process.stdin.write(_LENGTH.pack(len(frame)) + frame)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while (message := await _receive(self._process.stdout)) is not None:
            number, exchange = message
            self.waiting.pop(number).set_result(exchange)
        for future in self.waiting.values():
            future.set_result(Exchange(detail="the sending process ended"))


def _copy(found: Exchange, seen: Exchange) -> None:
    for name in Exchange.__slots__:
        setattr(seen, name, getattr(found, name))


async def _receive(reader: asyncio.StreamReader) -> Any:
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        # Our own child or parent at the other end of a pipe: nobody else writes into it.
        return pickle.loads(await reader.readexactly(length))  # noqa: S301
    except asyncio.IncompleteReadError:
        return None


async def _serve() -> None:
    reader, loop = asyncio.StreamReader(), asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    following: dict[int, asyncio.Task[Exchange]] = {}
    while (message := await _receive(reader)) is not None:
        number, request = message
        if request is None:
            if number in following:
                following[number].cancel()
        else:
            address, path, body, timeout_s = request
            exchange = Exchange()
            following[number] = asyncio.create_task(stream(address, path, body, timeout_s, exchange))
            following[number].add_done_callback(functools.partial(_answer, number, exchange, following))


def _answer(number: int, exchange: Exchange, following: dict[int, asyncio.Task[Exchange]], _: asyncio.Task[Exchange]) -> None:
    """Tell the parent how a request ended, also when it was cancelled before it began."""
    del following[number]
    frame = pickle.dumps((number, exchange))
    sys.stdout.buffer.write(_LENGTH.pack(len(frame)) + frame)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    uvloop.run(_serve())
