"""Which HTTP client takes the least CPU: `python tests/bench_server_clients.py docs/results/server-clients.json`.

For a request of one event, and for an event of 64 streams, from a scripted engine on a Unix socket.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import uvloop
from helpers_bench import circumstances, scripted_body, spread, write
from helpers_server import FAKE_ENGINE, wait_for

from server.upstream import Upstream

_STREAMS = 64
_EVENTS = 300
_GAP_S = 0.02
_LIGHT_REQUESTS = 2000
_ROUNDS = 3
_KEY = "bench"
_HEADERS = {"authorization": f"Bearer {_KEY}"}

Open = Callable[[bytes], AsyncIterator[bytes]]
Opening = Callable[[Path], AbstractAsyncContextManager[Open]]


@asynccontextmanager
async def httpx_client(socket: Path) -> AsyncIterator[Open]:
    transport = httpx.AsyncHTTPTransport(uds=str(socket), limits=httpx.Limits(max_connections=None))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None, headers=_HEADERS) as client:

        async def ask(body: bytes) -> AsyncIterator[bytes]:
            async with client.stream("POST", "/v1/completions", content=body) as response:
                async for chunk in response.aiter_raw():
                    yield chunk

        yield ask


@asynccontextmanager
async def aiohttp_client(socket: Path) -> AsyncIterator[Open]:
    connector = aiohttp.UnixConnector(path=str(socket), limit=0)
    async with aiohttp.ClientSession("http://engine", connector=connector, auto_decompress=False, headers=_HEADERS) as session:

        async def ask(body: bytes) -> AsyncIterator[bytes]:
            async with session.post("/v1/completions", data=body) as response:
                async for chunk in response.content.iter_any():
                    yield chunk

        yield ask


@asynccontextmanager
async def own_client(socket: Path) -> AsyncIterator[Open]:
    with closing(Upstream(socket, _KEY)) as upstream:

        async def ask(body: bytes) -> AsyncIterator[bytes]:
            with closing(await upstream.ask("POST", "/v1/completions", body, "bench")) as answer:
                while piece := await answer.piece():
                    yield piece

        yield ask


CLIENTS: dict[str, Opening] = {"httpx": httpx_client, "aiohttp": aiohttp_client, "ours": own_client}


async def client_cost_us(client: Opening, socket: Path) -> tuple[float, float]:
    """CPU of this process in microseconds: for each request of one event, and for each event of 64 streams."""
    async with client(socket) as ask:

        async def read(body: bytes, times: int) -> None:
            for _ in range(times):
                async for _chunk in ask(body):
                    pass

        light, long = scripted_body(1, 0), scripted_body(_EVENTS, _GAP_S)
        await read(light, 100)
        before = time.process_time()
        await asyncio.gather(*(read(light, _LIGHT_REQUESTS // 4) for _ in range(4)))
        between = time.process_time()
        await asyncio.gather(*(read(long, 1) for _ in range(_STREAMS)))
        return 1e6 * (between - before) / _LIGHT_REQUESTS, 1e6 * (time.process_time() - between) / (_STREAMS * _EVENTS)


@contextmanager
def engine(folder: Path) -> Iterator[Path]:
    """A scripted engine of its own; yields its socket."""
    socket = folder / "engine.sock"
    environment = os.environ | {"VLLM_API_KEY": _KEY, "FAKE_LOG": str(folder / "engine.jsonl")}
    process = subprocess.Popen([*FAKE_ENGINE, "--uds", str(socket)], env=environment)
    try:
        wait_for(socket.exists, 20)
        yield socket
    finally:
        for child in psutil.Process(process.pid).children():
            child.kill()
        process.kill()
        process.wait()


def main(out: Path) -> None:
    """Measure and write the results."""
    results: dict[str, Any] = {
        **circumstances(("aiohttp", "httpx", "httptools", "uvloop")),
        "load": f"{_STREAMS} streams of {_EVENTS} events, one each {1e3 * _GAP_S:.0f} ms",
    }
    with tempfile.TemporaryDirectory() as name, engine(Path(name)) as socket:
        for label, client in CLIENTS.items():
            rounds = [uvloop.run(client_cost_us(client, socket)) for _ in range(_ROUNDS)]
            results[label] = {
                "cpu_us_per_request": spread([request for request, _ in rounds]),
                "cpu_us_per_event": spread([event for _, event in rounds]),
            }
    results["load_average_after"] = round(os.getloadavg()[0], 2)
    write(out, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
