"""Whether the gateway costs more than 1% of the throughput of 64 streams, on an engine that runs:

    python tests/bench_server_throughput.py docs/results/server-throughput-gpu.json MODEL --engine http://127.0.0.1:8300

Blocks of equal work, each client a number of streams of so many tokens, go straight to the engine and through a gateway that is
attached to it: straight, gateway, gateway, straight, and so on until the time is over. Two neighbours are a pair; the result is
the mean of their ratios with its confidence interval. As a control the same is said of neighbours of one side, where nothing
should be found. Without --engine and MODEL the scripted engine answers at a speed of its own: a try of the measurement.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import time
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import uvloop
from bench_server import attached, both
from helpers_bench import Streams, circumstances, real_body, scripted_body, write
from helpers_paired import interval, loss
from helpers_server import ENGINE_KEY, FAKE_ENGINE, NO_TLS

from server.upstream import Upstream

_LIMIT_PERCENT, _LIMIT_MS = 1.0, 3.0
_FEWEST_PAIRS = 6
_WARM_UP_BLOCKS = 2  # of each side

Scene = AbstractContextManager[tuple[str, str, psutil.Process]]


@dataclass(frozen=True)
class Work:
    """What each block does. The starts of the clients are spread over `stagger_s`, the same in each block."""

    streams: int
    rounds: int
    tokens: int
    stagger_s: float
    gap_s: float | None
    """Between two events of a stream, of the scripted engine; a real one has its own."""

    def body(self) -> bytes:
        return real_body(self.tokens) if self.gap_s is None else scripted_body(self.tokens, self.gap_s)


@dataclass(frozen=True)
class Block:
    """What came of one: the mean of the seconds in which each client got its work done, time to the first event, events.

    The mean, and not the time until the last one is done: that holds the stagger as well, which no gateway can lengthen.
    """

    seconds: float
    ttft_ms: float
    events: int


async def block(server: Upstream, work: Work) -> Block:
    """Every client's streams, one after another; new prompts, so that no cache knows them."""
    streams, took_s = Streams(), []
    bodies = [[work.body() for _ in range(work.rounds)] for _ in range(work.streams)]

    async def client(number: int) -> None:
        await asyncio.sleep(work.stagger_s * number / work.streams)
        began = time.perf_counter()
        for body in bodies[number]:
            await streams.one(server, body)
        took_s.append(time.perf_counter() - began)

    await asyncio.gather(*(client(number) for number in range(work.streams)))
    return Block(statistics.fmean(took_s), statistics.median(streams.ttft_ms), streams.events)


@dataclass(frozen=True)
class Turns:
    """Blocks of both sides in the order A B B A A B B A ..."""

    straight: list[Block] = field(default_factory=list)
    through: list[Block] = field(default_factory=list)

    async def take(self, engine: Upstream, gateway: Upstream, work: Work, seconds: float) -> None:
        """For so long, after a warm-up, on one loop and the same open connections."""
        with closing(engine), closing(gateway):
            sides = (engine, self.straight), (gateway, self.through)
            for server, _ in sides * _WARM_UP_BLOCKS:
                await block(server, work)
            until = time.perf_counter() + seconds
            while len(self.straight) < _FEWEST_PAIRS or time.perf_counter() < until:
                for server, blocks in sides if len(self.straight) % 2 == 0 else sides[::-1]:
                    blocks.append(await block(server, work))


def findings(straight: list[Block], through: list[Block], work: Work) -> dict[str, Any]:
    """What the pairs say, and what they say where both halves are of one side. A half without another is left out."""
    pairs = list(zip(straight, through, strict=False))
    if len(pairs) < _FEWEST_PAIRS:
        raise SystemExit(
            f"{len(pairs)} pairs of blocks in the time there was, {_FEWEST_PAIRS} are needed; make the blocks smaller"
        )
    added_ms, low_ms, high_ms = interval([b.ttft_ms - a.ttft_ms for a, b in pairs])
    # In A B B A A B B A the neighbours of one side are B B, then A A, and so on.
    alike = [
        (blocks[at].seconds, blocks[at + 1].seconds)
        for at in range(len(pairs) - 1)
        for blocks in (through if at % 2 == 0 else straight,)
    ]
    ttft = {"mean": round(added_ms, 3), "low": round(low_ms, 3), "high": round(high_ms, 3)}
    return {
        "load": f"{work.streams} streams of {work.tokens} tokens, {work.rounds} times, starts over {work.stagger_s} s"
        + (f"; the scripted engine, {work.gap_s} s between events" if work.gap_s is not None else ""),
        "throughput": loss([(a.seconds, b.seconds) for a, b in pairs], _LIMIT_PERCENT),
        "control": loss(alike, _LIMIT_PERCENT) | {"what": "neighbours of one side: the interval should hold 0"},
        "ttft_added_ms": ttft | {"limit_ms": _LIMIT_MS, "verdict": _verdict(low_ms, high_ms, _LIMIT_MS)},
        "events_a_block": sorted({one.events for one in (*straight, *through)}),
        "events_per_s": {
            name: round(statistics.median(one.events / one.seconds for one in blocks), 1)
            for name, blocks in (("straight", straight), ("gateway", through))
        },
        "block_seconds": {
            "straight": [round(one.seconds, 4) for one in straight],
            "gateway": [round(one.seconds, 4) for one in through],
        },
    }


def _verdict(low: float, high: float, limit: float) -> str:
    return "met" if high <= limit else "missed" if low > limit else "undecided"


def scene_of(model: Path | None, running: str | None) -> Scene:
    """The engine and a gateway attached to it."""
    if not (model and running):
        return both(FAKE_ENGINE, '{"blocks": 4000}')
    name = httpx.get(f"{running}/v1/models", trust_env=False, verify=NO_TLS).json()["data"][0]["id"]
    return attached(running, model=str(model), max_model_len=512, served_model_name=name)


def main() -> None:
    """Measure, and write everything into a file of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--engine", metavar="URL", help="a keyless vLLM that runs the model, with room for the streams")
    parser.add_argument("--seconds", type=float, default=170, help="how long to measure, after a warm-up of four blocks")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="streams of each client in a block, one after another")
    parser.add_argument("--tokens", type=int, default=96, help="of each stream")
    parser.add_argument("--stagger-s", type=float, default=0.4, help="over which the clients of a block start")
    parser.add_argument("--gap-s", type=float, default=0.01, help="between two events of a stream of the scripted engine")
    given = parser.parse_args()
    random.seed(0)
    results = circumstances(("httptools", "uvicorn", "uvloop", "fastapi"))
    work = Work(given.streams, given.rounds, given.tokens, given.stagger_s, None if given.engine else given.gap_s)
    with scene_of(given.model, given.engine) as (engine, gateway, process):
        key = "" if given.engine else ENGINE_KEY
        before_s, began = sum(process.cpu_times()[:2]), time.perf_counter()
        turns = Turns()
        with contextlib.suppress(KeyboardInterrupt):  # the time was over; what there is, is evidence too
            uvloop.run(turns.take(Upstream(engine, key), Upstream(gateway, ""), work, given.seconds))
        results |= findings(turns.straight, turns.through, work)
        results["gateway_cpu_share"] = round((sum(process.cpu_times()[:2]) - before_s) / (time.perf_counter() - began), 3)
    results["load_average_after"] = round(os.getloadavg()[0], 2)
    write(given.out, results)
    print(json.dumps({name: results[name] for name in ("throughput", "ttft_added_ms")}))


if __name__ == "__main__":
    main()
