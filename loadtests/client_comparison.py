"""Why the client is what it is: HTTP clients against one mock server whose latencies are known.

`python -m loadtests.client_comparison OUT.json` writes the figures behind docs/decisions/0003-loadtest-client.md. Each
client runs in a process of its own, so that none pays for another's imports; those that are not installed are left out.
"""

import asyncio
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h11
import psutil
import uvloop

from loadtests.address import parse_address
from loadtests.bias import ITL_MS, TTFT_MS, mock_server
from loadtests.client import Exchange, stream
from loadtests.machine import commit, describe_machine
from loadtests.metrics import distribution

# (streams, requests, prompt tokens, output tokens)
_SHAPES = ((64, 64, 2048, 128), (128, 256, 2048, 128))
_CLIENTS = ("ours", "h11", "aiohttp", "httpx2", "httpx2-shared", "httpx", "httpx-shared")
_REPEATS = 3
_CLOSED_LOOP = ("64", "128")
_READ_BYTES = 1 << 16

Send = Callable[[str, bytes], Awaitable[Exchange]]


def _reader(exchange: Exchange) -> Callable[[bytes], None]:
    def read(line: bytes) -> None:
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"]:
            exchange.token_times_s.append(time.perf_counter())

    return read


async def _lines_of(name: str, client: Any, url: str, body: bytes) -> AsyncIterator[bytes]:
    if name == "h11":
        async for line in _lines_by_h11(url, body):
            yield line
    elif name == "aiohttp":
        async with client.post(url, data=body) as response:
            async for line in response.content:
                yield line
    else:
        async with client.stream("POST", url, content=body) as response:
            async for line in response.aiter_lines():
                yield line.encode()


async def _lines_by_h11(url: str, body: bytes) -> AsyncIterator[bytes]:
    """The pure Python parser that httpx uses, on bare asyncio streams."""
    address = parse_address(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    http, rest = h11.Connection(h11.CLIENT), b""
    headers = {"Host": address.authority, "Content-Length": str(len(body)), "Connection": "close"}
    request = h11.Request(method="POST", target=address.prefix, headers=list(headers.items()))
    writer.write(http.send(request) + http.send(h11.Data(data=body)) + http.send(h11.EndOfMessage()))
    while not isinstance(event := http.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Data):
            *lines, rest = (rest + event.data).split(b"\n")
            for line in lines:
                yield line
    writer.close()


def _senders(name: str, streams: int) -> list[Send]:
    """One sender for each stream; `-shared` clients are one for all, the others one for each."""
    library, shared = name.removesuffix("-shared"), name.endswith("-shared") or name == "aiohttp"
    if name == "ours":
        return [_own] * streams
    module = importlib.import_module(library)
    headers = {"content-type": "application/json"}

    def client() -> Any:
        if library == "h11":
            return None
        if library == "aiohttp":
            return module.ClientSession(headers=headers, connector=module.TCPConnector(limit=0))
        return module.AsyncClient(headers=headers, timeout=None, verify=False, limits=module.Limits(max_connections=None))

    def sender(one: Any) -> Send:
        async def send(url: str, body: bytes) -> Exchange:
            exchange = Exchange(sent_s=time.perf_counter())
            read = _reader(exchange)
            async for line in _lines_of(library, one, url, body):
                read(line)
            return exchange

        return send

    return [sender(client())] * streams if shared else [sender(client()) for _ in range(streams)]


async def _own(url: str, body: bytes) -> Exchange:
    return await stream(parse_address(url.removesuffix("/v1/completions")), "/v1/completions", body, 120)


async def measure(name: str, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Run one client once; latencies in ms, cost in CPU-seconds and bytes of this process."""
    streams, requests, prompt_tokens, output_tokens = shape
    request = {"model": "mock", "prompt": list(range(prompt_tokens)), "max_tokens": output_tokens, "stream": True}
    async with mock_server("--ttft-ms", str(TTFT_MS), "--itl-ms", str(ITL_MS)) as address:
        bodies = iter([json.dumps(request).encode()] * requests)
        seen: list[Exchange] = []

        async def work(send: Send) -> None:
            for body in bodies:
                seen.append(await send(f"{address.base}/v1/completions", body))  # noqa: PERF401 - interleaves with other workers

        senders, process = _senders(name, streams), psutil.Process()
        before = process.cpu_times()
        await asyncio.gather(*(work(send) for send in senders))
        after = process.cpu_times()
    ttft = distribution((one.token_times_s[0] - one.sent_s) * 1000 for one in seen)
    assert ttft is not None
    return {
        "client": name, "streams": streams, "requests": requests, "ttft_p50_ms": ttft.p50, "ttft_p99_ms": ttft.p99,
        "cpu_s": round(after.user + after.system - before.user - before.system, 2), "rss_bytes": process.memory_info().rss,
    }  # fmt: skip


def _in_a_child(*words: str) -> list[dict[str, Any]]:
    """The JSON lines that a module of this package prints, with the load average beside each."""
    printed = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) | {"load_average": psutil.getloadavg()[0]} for line in printed.splitlines()]
    for one in found:
        print(one, flush=True)
    return found


def main() -> None:
    """Measure all, or the one client that a child process is asked for."""
    if len(sys.argv) == 4 and sys.argv[1] == "--one":
        found = uvloop.run(measure(sys.argv[2], _SHAPES[int(sys.argv[3])]))
        print(json.dumps(found))
        return
    runs, closed_loop = [], []
    for _ in range(_REPEATS):
        for shape in range(len(_SHAPES)):
            for name in _CLIENTS:
                if name == "ours" or importlib.util.find_spec(name.removesuffix("-shared")):
                    runs += _in_a_child("loadtests.client_comparison", "--one", name, str(shape))
        closed_loop += _in_a_child("loadtests.bias", *_CLOSED_LOOP)
    result = {
        "command": f"python -m loadtests.client_comparison {sys.argv[1]}", "commit": commit(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(), "true_ttft_ms": TTFT_MS, "true_itl_ms": ITL_MS, "runs": runs,
        "closed_loop": {"command": f"python -m loadtests.bias {' '.join(_CLOSED_LOOP)}", "runs": closed_loop},
    }  # fmt: skip
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
