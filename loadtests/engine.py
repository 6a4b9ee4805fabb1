"""What the engine says of itself on /metrics: counters around a cell, and the peak of its KV use within it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from loadtests.address import Address
from loadtests.connection import fetch

# Our name of each figure -> what engines call it. vLLM's are checked against a running one; SGLang's are those of its
# metrics_collector.py (0.5, started with --enable-metrics), llama.cpp's of its server's README (with --metrics; it dropped
# the use of its cache in 2025 and has counted reused tokens since August 2026).
_NAMES = {
    "preemptions": ("vllm:num_preemptions_total", "sglang:num_retracted_requests_total"),
    "cached_tokens": ("vllm:prefix_cache_hits_total", "sglang:cached_tokens_total", "llamacpp:prompt_tokens_cached_total"),
    "prompt_tokens": ("vllm:prompt_tokens_total", "sglang:prompt_tokens_total", "llamacpp:prompt_tokens_total"),
    "output_tokens": ("vllm:generation_tokens_total", "sglang:generation_tokens_total", "llamacpp:tokens_predicted_total"),
    "kv_use": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage", "llamacpp:kv_cache_usage_ratio"),
    "kv_tokens": ("sglang:max_total_num_tokens",),
    "block_tokens": ("sglang:page_size",),
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred"),
}
# One gauge for each data-parallel rank: the fullest one preempts first, and all have blocks of one size.
_LARGEST = ("kv_use", "block_tokens")
_CACHE_CONFIG = "vllm:cache_config_info"
_FIGURE = {name: figure for figure, names in _NAMES.items() for name in names}
_WANTED = (*_FIGURE, _CACHE_CONFIG)


@dataclass
class Snapshot:
    """The figures that were found, by our names; `labels` are those of vLLM's cache configuration."""

    values: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def rise(self, before: "Snapshot", figure: str) -> int | None:
        """By how much a counter rose since `before`, or None if the engine does not report it.

        SGLang prints a counter from its first event on: what a page lacked before counts from nothing.
        """
        if figure not in self.values or not before.values:
            return None
        return int(self.values[figure] - before.values.get(figure, 0))


def parse(text: str) -> Snapshot:
    """Read the figures we know; lines of others are dropped unparsed, since an engine prints thousands."""
    lines = [line for line in text.splitlines() if line.startswith(_WANTED)]
    snapshot = Snapshot()
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            figure = _FIGURE.get(sample.name)
            if sample.name == _CACHE_CONFIG:
                snapshot.labels = dict(sample.labels)
            elif figure in _LARGEST:
                snapshot.values[figure] = max(snapshot.values.get(figure, 0), sample.value)
            elif figure:
                snapshot.values[figure] = snapshot.values.get(figure, 0) + sample.value
    return snapshot


class EngineMetrics:
    """Reads one metrics page; after a first failure it stays silent, since many servers have none."""

    def __init__(self, address: Address, path: str = "/metrics") -> None:
        self.address, self._path = address, path
        self.available = True

    async def read(self) -> Snapshot:
        """The figures now; empty where the server reports none."""
        if not self.available:
            return Snapshot()
        try:
            return parse((await fetch(self.address, self._path, 10)).decode(errors="replace"))
        except (OSError, ValueError, TimeoutError):
            return Snapshot()

    async def probe(self) -> Snapshot:
        """The first reading, which decides whether there will be others."""
        snapshot = await self.read()
        self.available = bool(snapshot.values)
        return snapshot

    async def idle(self, patience_s: float = 10) -> None:
        """Wait until no request runs, so that one cell's leavings do not load the next."""
        for _ in range(int(patience_s / 0.1)):
            values = (await self.read()).values
            if not values.get("running") and not values.get("waiting"):
                return
            await asyncio.sleep(0.1)

    @asynccontextmanager
    async def peaks(self, interval_s: float, also: Callable[[], None]) -> AsyncIterator[dict[str, float]]:
        """Sample while the body runs; yields a mapping that holds each figure's largest value. `also` runs beside."""
        peaks: dict[str, float] = {}

        async def sample() -> None:
            while True:
                for figure, value in (await self.read()).values.items():
                    peaks[figure] = max(peaks.get(figure, value), value)
                also()
                await asyncio.sleep(interval_s)

        task = asyncio.create_task(sample())
        try:
            yield peaks
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
