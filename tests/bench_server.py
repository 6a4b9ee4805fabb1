"""What the gateway costs: `python tests/bench_server.py docs/results/server-overhead.json`.

Two questions, answered with a scripted engine so that the engine's own time does not blur them. Which HTTP client passes
events on for the least CPU? And what do requests pay for going through the gateway instead of straight to the engine?
"""

import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import uvloop
from helpers_server import FAKE_ENGINE, gateways, wait_for

_STREAMS = 64
_EVENTS = 300
_GAP_S = 0.02
_LIGHT_REQUESTS = 400
_KEY = "bench"

Open = Callable[[Path, bytes], AsyncIterator[bytes]]


async def with_httpx(socket: Path, body: bytes) -> AsyncIterator[bytes]:
    transport = httpx.AsyncHTTPTransport(uds=str(socket))
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None) as client,
        client.stream("POST", "/v1/completions", content=body, headers={"authorization": f"Bearer {_KEY}"}) as response,
    ):
        async for chunk in response.aiter_raw():
            yield chunk


async def with_aiohttp(socket: Path, body: bytes) -> AsyncIterator[bytes]:
    connector = aiohttp.UnixConnector(path=str(socket))
    async with (
        aiohttp.ClientSession("http://engine", connector=connector, auto_decompress=False) as session,
        session.post("/v1/completions", data=body, headers={"authorization": f"Bearer {_KEY}"}) as response,
    ):
        async for chunk in response.content.iter_any():
            yield chunk


async def with_plain_sockets(socket: Path, body: bytes) -> AsyncIterator[bytes]:
    """asyncio streams and the chunked encoding read by hand: the floor, without any of the error handling one would need."""
    reader, writer = await asyncio.open_unix_connection(str(socket))
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: engine\r\nauthorization: Bearer {_KEY}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await reader.readuntil(b"\r\n\r\n")
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    writer.close()


CLIENTS: dict[str, Open] = {"httpx": with_httpx, "aiohttp": with_aiohttp, "plain sockets": with_plain_sockets}


def request_body(events: int, gap_s: float) -> bytes:
    script = json.dumps({"tokens": events, "gap_s": gap_s})
    return json.dumps({"prompt": [1, 2, 3], "max_tokens": 8, "stream": True, "user": script}).encode()


async def client_cost_us(client: Open, socket: Path) -> float:
    """CPU of this process for each event, in microseconds, with 64 streams at 50 events a second each."""

    async def read_one() -> int:
        return len([chunk async for chunk in client(socket, request_body(_EVENTS, _GAP_S))])

    await read_one()
    before = time.process_time()
    await asyncio.gather(*(read_one() for _ in range(_STREAMS)))
    return 1e6 * (time.process_time() - before) / (_STREAMS * _EVENTS)


async def timings(connect: Callable[[], aiohttp.ClientSession], events: int, streams: int, requests: int) -> dict[str, float]:
    """Time to the first event and whole time of requests, `streams` at once, in milliseconds."""
    ttft_ms, whole_ms = [], []
    body = request_body(events, _GAP_S if events > 1 else 0)

    async def worker(session: aiohttp.ClientSession) -> None:
        for _ in range(requests // streams):
            started = time.perf_counter()
            async with session.post("/v1/completions", data=body) as response:
                await response.content.readany()
                ttft_ms.append(1e3 * (time.perf_counter() - started))
                await response.read()
            whole_ms.append(1e3 * (time.perf_counter() - started))

    started = time.perf_counter()
    async with connect() as session:
        await asyncio.gather(*(worker(session) for _ in range(streams)))
    elapsed_s = time.perf_counter() - started
    return {
        "ttft_p50_ms": statistics.median(ttft_ms),
        "ttft_p99_ms": sorted(ttft_ms)[int(0.99 * (len(ttft_ms) - 1))],
        "whole_p50_ms": statistics.median(whole_ms),
        "events_per_s": requests * events / elapsed_s,
    }


async def gateway_cost(pid: int, url: str, socket: Path) -> dict[str, Any]:
    """The same requests straight to the engine and through the gateway, and the gateway's CPU and memory for them."""

    def straight() -> aiohttp.ClientSession:
        connector = aiohttp.UnixConnector(str(socket), limit=0)
        return aiohttp.ClientSession(
            "http://engine", connector=connector, headers={"authorization": f"Bearer {_KEY}"}, raise_for_status=True
        )

    def through() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), raise_for_status=True)

    answer: dict[str, Any] = {}
    process, cpu_s, light_cpu_s = psutil.Process(pid), 0.0, 0.0
    for name, connect in (("straight", straight), ("gateway", through)):
        await timings(connect, 1, 1, 50)
        before_s = sum(process.cpu_times()[:2])
        light = await timings(connect, 1, 1, _LIGHT_REQUESTS)
        light_cpu_s = sum(process.cpu_times()[:2]) - before_s
        before_s = sum(process.cpu_times()[:2])
        streams = await timings(connect, _EVENTS, _STREAMS, _STREAMS)
        cpu_s = sum(process.cpu_times()[:2]) - before_s
        answer[name] = {"one_light_request_at_a_time": light, "64_streams": streams}
    answer["cpu_ms_per_light_request"] = 1e3 * light_cpu_s / _LIGHT_REQUESTS
    answer["cpu_us_per_event"] = 1e6 * cpu_s / (_STREAMS * _EVENTS)
    one = "one_light_request_at_a_time"
    answer["ttft_added_p50_ms"] = answer["gateway"][one]["ttft_p50_ms"] - answer["straight"][one]["ttft_p50_ms"]
    answer["memory_mb"] = process.memory_info().rss / 1e6
    return answer


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
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    results: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average_before": round(os.getloadavg()[0], 2),
        "load": f"{_STREAMS} streams of {_EVENTS} events, one each {1e3 * _GAP_S:.0f} ms",
        "versions": {name: version(name) for name in ("aiohttp", "httpx", "uvicorn", "uvloop", "fastapi")},
    }
    with tempfile.TemporaryDirectory() as name, engine(Path(name)) as socket, gateways(Path(name)) as start:
        results["client_cpu_us_per_event"] = {
            label: round(uvloop.run(client_cost_us(client, socket)), 1) for label, client in CLIENTS.items()
        }
        gateway = start({"blocks": 4000}).until_ready()
        results["gateway"] = rounded(uvloop.run(gateway_cost(gateway.process.pid, gateway.url, socket)))
    results["load_average_after"] = round(os.getloadavg()[0], 2)
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


def rounded(values: Any) -> Any:
    """Three decimals, at any depth."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    return round(values, 3) if isinstance(values, float) else values


if __name__ == "__main__":
    main(Path(sys.argv[1]))
