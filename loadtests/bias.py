"""What this client itself adds: the same load put on a mock server whose latencies are known."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import uvloop

from ard_serve.errors import ResourceError
from loadtests.address import Address
from loadtests.client import Exchange, Stream, stream
from loadtests.load import closed_loop
from loadtests.metrics import distribution
from loadtests.records import Record, Role
from loadtests.target import Target
from loadtests.tokens import TokenSource

TTFT_MS, ITL_MS = 200.0, 20.0
_START_S = 20
_FEWEST_REQUESTS = 4


class ClientBias(Record):
    """Measured against true: medians in ms at a concurrency, and what the client cost.

    `mock_ttft_p50_ms` is what the mock server gave by its own clock, `ttft_added_*` what each request saw beyond that: the
    way there and back, which is the client's. Together with the mock's own lateness it is what `ttft_p50_ms` is off.
    """

    concurrency: int
    requests: int
    true_ttft_ms: float = TTFT_MS
    ttft_p50_ms: float
    ttft_p99_ms: float
    mock_ttft_p50_ms: float
    ttft_added_p50_ms: float
    ttft_added_p99_ms: float
    true_itl_ms: float = ITL_MS
    itl_p50_ms: float
    itl_p99_ms: float
    cpu_s: float
    rss_bytes: int

    @property
    def ttft_bias_ms(self) -> float:
        """How far the median TTFT is off, the mock server's own lateness included."""
        return self.ttft_p50_ms - self.true_ttft_ms


@asynccontextmanager
async def mock_server(*flags: str) -> AsyncIterator[Address]:
    """A mock server in its own process, for as long as the body runs."""
    command = [sys.executable, "-m", "loadtests.mock_server", *flags]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        try:
            port = int(await asyncio.wait_for(process.stdout.readline(), _START_S))
        except (TimeoutError, ValueError):
            raise ResourceError(f"the mock server did not start in {_START_S} s; use --no-check-client") from None
        yield Address("http", "127.0.0.1", port, "")
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def measure_bias(
    concurrency: int, prompt_tokens: int, output_tokens: int, requests: int = 0, follow: Stream = stream
) -> ClientBias:
    """Load a mock server with `requests` (by default one for each stream, and four at least), exactly as a run would.

    `follow` is what sends; `cpu_s` and `rss_bytes` are those of this process and its children, the mock server apart.
    """
    requests = requests or max(concurrency, _FEWEST_REQUESTS)
    async with mock_server("--ttft-ms", str(TTFT_MS), "--itl-ms", str(ITL_MS)) as address:
        source: TokenSource = _AnyIds()
        target = Target(address, "mock", "/v1/completions", source, {"stream_options": {"include_usage": True}})
        body = target.body(list(range(100, 100 + prompt_tokens)), output_tokens)
        seen: list[Exchange] = []

        async def send(number: int, role: Role, planned_s: float) -> bool:
            exchange = await follow(address, target.path, body, 60, Exchange())
            if role == "measured":
                seen.append(exchange)
            return exchange.outcome == "ok"

        # The first connection pays for what both sides load late.
        await send(0, "warm_up", time.perf_counter())
        processes = _client_processes()
        before_s = _cpu_s(processes)
        await closed_loop(send, concurrency, requests)
        cpu_s, rss_bytes = _cpu_s(processes) - before_s, sum(process.memory_info().rss for process in processes)
    seen = [one for one in seen if one.outcome == "ok"]
    ttft = distribution((one.token_times_s[0] - one.sent_s) * 1000 for one in seen)
    given = distribution((one.usage["first_event_s"] - one.usage["arrived_s"]) * 1000 for one in seen)
    added = distribution(_added_ms(one) for one in seen)
    itl = distribution((b - a) * 1000 for one in seen for a, b in zip(one.token_times_s, one.token_times_s[1:], strict=False))
    if ttft is None or given is None or added is None or itl is None:
        raise ResourceError(f"the mock server answered none of {requests} requests; use --no-check-client")
    return ClientBias(
        concurrency=concurrency, requests=len(seen), ttft_p50_ms=ttft.p50, ttft_p99_ms=ttft.p99, mock_ttft_p50_ms=given.p50,
        ttft_added_p50_ms=added.p50, ttft_added_p99_ms=added.p99, itl_p50_ms=itl.p50, itl_p99_ms=itl.p99,
        cpu_s=round(cpu_s, 2), rss_bytes=rss_bytes,
    )  # fmt: skip


def _added_ms(one: Exchange) -> float:
    """From writing to the mock's reading, and from its writing to our reading; both clocks are the machine's."""
    added_s: float = one.usage["arrived_s"] - one.sent_s + one.token_times_s[0] - one.usage["first_event_s"]
    return 1000 * added_s


def _client_processes() -> list[psutil.Process]:
    """This process and the sending ones below it."""
    me = psutil.Process()
    return [me, *(child for child in me.children() if "loadtests.senders" in child.cmdline())]


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


class _AnyIds:
    name = "none"

    def encode(self, text: str, special: bool = False) -> list[int]:
        return [0]


def main() -> None:
    """Print the client's bias at some concurrencies as JSON lines: `python -m loadtests.bias 16 64 128`."""
    for concurrency in [int(argument) for argument in sys.argv[1:]] or [64, 128]:
        print(uvloop.run(measure_bias(concurrency, 2048, 128)).model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
