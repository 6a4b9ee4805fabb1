"""What the benchmarks of the server share: where and when, streams with their clocks, spreads, the results file."""

import asyncio
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from server.upstream import Upstream


def circumstances(packages: tuple[str, ...]) -> dict[str, Any]:
    """Command, commit ($COMMIT where only the files were copied), machine, date, versions, and how busy the machine is."""
    # --verify, or a repository without commits, as copied files may be in, answers with the word HEAD.
    head = subprocess.run(["git", "rev-parse", "--verify", "--quiet", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": "python " + " ".join(sys.argv),
        "commit": head.stdout.strip() or os.environ.get("COMMIT", "unknown"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_gpus()}{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in packages},
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def _gpus() -> str:
    """Names of the NVIDIA GPUs; nothing where there is none."""
    if not (tool := shutil.which("nvidia-smi")):
        return ""
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return "".join(f"{name}, " for name in answer.stdout.splitlines()) if answer.returncode == 0 else ""


def write(out: Path, results: dict[str, Any]) -> None:
    """The results, on disk and on the screen."""
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest of repeated measurements."""
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def scripted_body(events: int, gap_s: float) -> bytes:
    """A stream of the scripted engine: so many events, so far apart."""
    script = json.dumps({"tokens": events, "gap_s": gap_s})
    return json.dumps({"prompt": [1, 2, 3], "max_tokens": 8, "stream": True, "user": script}).encode()


def real_body(tokens: int) -> bytes:
    """A stream of a real model: so many tokens, from a short prompt that no cache knows."""
    prompt = [random.randrange(5, 250) for _ in range(16)]
    return json.dumps({"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}).encode()


@dataclass
class Streams:
    """What a client saw: time to the first event of each stream in ms, and events in all."""

    ttft_ms: list[float] = field(default_factory=list)
    events: int = 0

    async def one(self, server: Upstream, body: bytes) -> None:
        started = time.perf_counter()
        with closing(await server.ask("POST", "/v1/completions", body, "bench")) as answer:
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}: {(await answer.read())[:300]!r}")
            first = await answer.piece()
            self.ttft_ms.append(1e3 * (time.perf_counter() - started))
            self.events += first.count(b"\n\n")
            while piece := await answer.piece():
                self.events += piece.count(b"\n\n")


async def burst(server: Upstream, bodies: list[bytes]) -> float:
    """All at the same instant, on connections that are open; median time to the first event in ms."""
    for streams in (Streams(), last := Streams()):
        await asyncio.gather(*(streams.one(server, body) for body in bodies))
    return statistics.median(last.ttft_ms)


async def closed_loop(server: Upstream, bodies: list[bytes], seconds: float, stream_s: float) -> tuple[float, float, int]:
    """Each client asks again when its stream has ended; the first start anywhere within `stream_s`, as independent users do.

    Returns the median time to the first event in ms, events a second, and the events.
    """
    streams, began = Streams(), time.perf_counter()

    async def client(body: bytes) -> None:
        await asyncio.sleep(random.random() * stream_s)
        while time.perf_counter() - began < seconds:
            await streams.one(server, body)

    await asyncio.gather(*(client(body) for body in bodies))
    return statistics.median(streams.ttft_ms), streams.events / (time.perf_counter() - began), streams.events
