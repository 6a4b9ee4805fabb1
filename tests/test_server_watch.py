"""What the watch makes of an engine's canaries and metrics, with a scripted engine in its place."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from server.admission import Admission, Lanes
from server.config import ServeConfig
from server.health import Phase
from server.ledger import Capacity, Ledger
from server.metrics import Metrics
from server.upstream import Upstream
from server.watch import Watch

WINDOW = 512


class ScriptedUpstream:
    """An engine that says of itself what a test tells it to; each canary waits until `go` lets it be answered."""

    def __init__(self, ranks: int = 1) -> None:
        self.ranks, self.blocks, self.corrupted, self.has_metrics = ranks, 6501, 0, True
        self.canaries, self.go = 0, asyncio.Event()
        self.go.set()

    async def call(self, method: str, path: str, payload: Any = None, request_id: str = "") -> tuple[int, Any]:
        if path == "/v1/completions":
            self.canaries += 1
            await self.go.wait()
        if path != "/metrics":
            return 200, {}
        if not self.has_metrics:
            raise TimeoutError
        counted = f"vllm:corrupted_requests_total {self.corrupted}\n"
        info = 'vllm:cache_config_info{{block_size="32",engine="{}",num_gpu_blocks="{}"}} 1.0\n'
        return 200, "".join(info.format(rank, self.blocks) for rank in range(self.ranks)) + counted


@asynccontextmanager
async def watching(
    engine: ScriptedUpstream, canary_interval_s: float = 0.001, seats: int | None = None
) -> AsyncIterator[Watch]:
    async def checked() -> None: ...

    config, ledger = ServeConfig(model=Path("tiny"), canary_interval_s=canary_interval_s), Ledger()
    admission = Admission([ledger], Lanes(128, 3), queue_size=1, queue_timeout_s=1)
    watch = Watch("0", config, cast(Upstream, engine), WINDOW, seats, ledger, admission, Metrics(), checked)
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()


async def after_two_canaries(engine: ScriptedUpstream) -> None:
    """The second begins when what the first showed has been taken in."""
    seen = engine.canaries
    while engine.canaries < seen + 3:
        await asyncio.sleep(0.001)


async def test_metrics_that_come_too_late_leave_the_capacity_as_it_was() -> None:
    async with watching(engine := ScriptedUpstream()) as watch:
        await watch.health.until_first_ready()
        assert watch.ledger.capacity == Capacity(208_000, 32)
        engine.has_metrics = False
        await after_two_canaries(engine)
        assert watch.ledger.capacity == Capacity(208_000, 32)
        engine.has_metrics, engine.blocks = True, 3001
        await after_two_canaries(engine)
        assert watch.ledger.capacity == Capacity(96_000, 32)


async def test_each_data_parallel_rank_has_memory_and_seats_of_its_own() -> None:
    async with watching(ScriptedUpstream(ranks=2), seats=64) as watch:
        await watch.health.until_first_ready()
        assert watch.ledger.capacity == Capacity(2 * 208_000, 32, 2 * 64)


@pytest.mark.fault("S22")
async def test_an_engine_that_counts_nans_is_not_ready_for_a_missing_scrape() -> None:
    async with watching(engine := ScriptedUpstream()) as watch:
        await watch.health.until_first_ready()
        engine.corrupted = 1
        while watch.health.phase is not Phase.CORRUPT:
            await asyncio.sleep(0.001)
            engine.corrupted += 1
        engine.has_metrics = False
        await after_two_canaries(engine)
        assert watch.health.phase is Phase.CORRUPT
        assert not watch.ledger.is_open
        engine.has_metrics = True
        await after_two_canaries(engine)
        assert watch.health.is_ready


@pytest.mark.fault("S4")
async def test_a_failure_seen_during_a_canary_asks_for_another_at_once() -> None:
    engine = ScriptedUpstream()
    async with watching(engine, canary_interval_s=60) as watch:
        await watch.health.until_first_ready()
        engine.go.clear()
        watch.suspect()
        while engine.canaries < 2:
            await asyncio.sleep(0.001)
        watch.suspect()
        engine.go.set()
        async with asyncio.timeout(5):
            while engine.canaries < 3:
                await asyncio.sleep(0.001)
