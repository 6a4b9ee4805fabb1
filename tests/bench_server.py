"""What the gateway costs: `python tests/bench_server.py docs/results/server-overhead.json SECTION`, one of

scripted       the same scripted engine, whose own time does not blur the figures, straight and through a gateway attached to
               it, in turns: 64 streams of users who come when they come, 64 at the same instant, one light request at a time
long           the same with one request after another, of up to 60K token ids
real MODEL     64 streams on a real vLLM; with --engine URL on one that runs already, keyless, instead of starting one
start MODEL    the time from the start of the process to its being ready
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import uvloop
from helpers_bench import Streams, burst, circumstances, closed_loop, real_body, scripted_body, spread, write
from helpers_server import ENGINE_KEY, FAKE_ENGINE, NO_TLS, free_port, gateways, running_engine, write_model

from server.config import ServeConfig
from server.upstream import Upstream

_STREAMS = 64
_LIGHT_REQUESTS = 400
_POLL_S = 0.1
_PROMPT_LENGTHS, _WARM_UP = (8, 8_192, 61_440), 10
_VLLM: tuple[str, ...] = ServeConfig.model_fields["engine_command"].default
_FLAGS = ("--enforce-eager", "--no-enable-prefix-caching")
_KV_GIB = 0.5

Measured = dict[str, float]


async def measure(
    url: str, make: Callable[[], bytes], seconds: float, stream_s: float, gateway: psutil.Process | None
) -> Measured:
    """One side's turn. CPU figures only where the gateway's process is given."""

    def cpu_s() -> float:
        return sum(gateway.cpu_times()[:2]) if gateway else 0.0

    with closing(Upstream(url, "" if gateway else ENGINE_KEY)) as server:
        bodies = [make() for _ in range(_STREAMS)]
        at_once_ms = await burst(server, bodies)
        before_s = cpu_s()
        ttft_ms, events_per_s, events = await closed_loop(server, bodies, seconds, stream_s)
        cpu_us = 1e6 * (cpu_s() - before_s) / events
        measured = {"ttft_ms": ttft_ms, "events_per_s": events_per_s, "burst_ttft_ms": at_once_ms}
        return measured | ({"cpu_us_per_event": cpu_us} if gateway else {})


async def light(url: str, gateway: psutil.Process | None) -> Measured:
    """One request of one event after another."""
    streams, body = Streams(), scripted_body(1, 0)
    with closing(Upstream(url, "" if gateway else ENGINE_KEY)) as server:
        before_s = sum(gateway.cpu_times()[:2]) if gateway else 0.0
        for _ in range(_LIGHT_REQUESTS):
            await streams.one(server, body)
        ttft_ms = sorted(streams.ttft_ms)[_LIGHT_REQUESTS // 2]
        if not gateway:
            return {"light_ttft_ms": ttft_ms}
        return {
            "light_ttft_ms": ttft_ms,
            "cpu_ms_per_light_request": 1e3 * (sum(gateway.cpu_times()[:2]) - before_s) / _LIGHT_REQUESTS,
        }


def side_by_side(turn: Callable[[bool], Measured], repeats: int) -> dict[str, Any]:
    """Both sides in turns, ABBA; each figure's spread, and that of what the gateway adds, pair by pair."""
    straight: list[Measured] = []
    through: list[Measured] = []
    for number in range(repeats):
        for is_gateway in (False, True) if number % 2 == 0 else (True, False):
            (through if is_gateway else straight).append(turn(is_gateway))
    names = straight[0].keys()
    pairs = list(zip(straight, through, strict=True))
    return {
        "repeats": repeats,
        "straight": {name: spread([one[name] for one in straight]) for name in names},
        "gateway": {name: spread([one[name] for one in through]) for name in through[0]},
        "gateway_adds": {
            name: spread([100 * (b[name] / a[name] - 1) if name == "events_per_s" else b[name] - a[name] for a, b in pairs])
            for name in names
        },
        "units": "ms, events a second (what the gateway adds to them in per cent), us of CPU an event",
    }


@contextmanager
def both(command: tuple[str, ...], script: str, **fields: Any) -> Iterator[tuple[str, str, psutil.Process]]:
    """An engine, and a gateway attached to it: addresses of both and the gateway's process."""
    port = free_port()
    with (
        tempfile.TemporaryDirectory() as name,
        running_engine(command, port, Path(name) / "engine.jsonl", script),
        attached(f"http://127.0.0.1:{port}", **fields) as scene,
    ):
        yield scene


@contextmanager
def attached(engine: str, **fields: Any) -> Iterator[tuple[str, str, psutil.Process]]:
    """A gateway attached to an engine that runs: addresses of both and the gateway's process."""
    with tempfile.TemporaryDirectory() as name, gateways(Path(name)) as start:
        quiet = {"canary_interval_s": 60, "canary_timeout_s": 60, **fields}
        gateway = start(environment={"ARD_ENGINE_KEY": ENGINE_KEY}, attach=[engine], **quiet).until_ready(300)
        yield engine, gateway.url, psutil.Process(gateway.process.pid)


def scripted(repeats: int) -> dict[str, Any]:
    """With the scripted engine: 64 streams, 50 events a second each."""
    with both(FAKE_ENGINE, '{"blocks": 4000}') as (engine, gateway, process):

        def turn(is_gateway: bool) -> Measured:
            url, watched = (gateway, process) if is_gateway else (engine, None)
            make = lambda: scripted_body(100, 0.02)  # noqa: E731
            return uvloop.run(measure(url, make, 10, 2, watched)) | uvloop.run(light(url, watched))

        turn(True)
        results = side_by_side(turn, repeats)
        results["gateway_memory_mb"] = round(process.memory_info().rss / 1e6, 1)
        return {"load": "64 streams of 100 events, one each 20 ms"} | results


def long_prompts(repeats: int) -> dict[str, Any]:
    """What a prompt's length costs on the way: one request at a time, straight and through the gateway in turns."""

    async def all_lengths(engine: str, gateway: str, process: psutil.Process) -> dict[str, Any]:
        with closing(Upstream(engine, ENGINE_KEY)) as straight, closing(Upstream(gateway, "")) as through:
            return {str(tokens): await one_length(tokens, straight, through, process) for tokens in _PROMPT_LENGTHS}

    async def one_length(tokens: int, straight: Upstream, through: Upstream, process: psutil.Process) -> dict[str, Any]:
        sides = Streams(), Streams()
        used_s = 0.0
        for number in range(_WARM_UP + repeats):
            body = long_body(tokens)
            await sides[0].one(straight, body)
            before_s = sum(process.cpu_times()[:2])
            await sides[1].one(through, body)
            used_s += sum(process.cpu_times()[:2]) - before_s if number >= _WARM_UP else 0
        engine_ms, gateway_ms = (side.ttft_ms[_WARM_UP:] for side in sides)
        added_ms = [b - a for a, b in zip(engine_ms, gateway_ms, strict=True)]
        figures = {"straight": spread(engine_ms), "gateway": spread(gateway_ms), "gateway_adds": spread(added_ms)}
        return {"body_bytes": len(long_body(tokens)), **figures, "cpu_ms_per_request": round(1e3 * used_s / repeats, 2)}

    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name) / "tiny", max_position_embeddings=1 << 16)
        window = {"model": str(model), "served_model_name": "tiny", "max_model_len": 1 << 16}
        with both(FAKE_ENGINE, '{"blocks": 8000, "window": 65536}', **window) as scene:
            results = uvloop.run(all_lengths(*scene))
    return {
        "load": "one request after another, prompts as token ids",
        "repeats": repeats,
        "units": "ms to the first event",
    } | results


def long_body(tokens: int) -> bytes:
    """A stream of the scripted engine behind a prompt of so many ids, of as many digits as most of a vocabulary have."""
    prompt = [random.randrange(10_000, 50_000) for _ in range(tokens)]
    return json.dumps({"prompt": prompt, "max_tokens": 8, "stream": True, "user": '{"tokens": 2}'}).encode()


def real(model: Path, running: str | None, tokens: int, seconds: float, repeats: int) -> dict[str, Any]:
    """With a real vLLM, the one at the address `running` or one of our own: 64 streams of `tokens`, at its speed."""
    fields: dict[str, Any] = {"model": str(model), "max_model_len": 512}
    if running:
        name = httpx.get(f"{running}/v1/models", trust_env=False, verify=NO_TLS).json()["data"][0]["id"]
        scene = attached(running, served_model_name=name, **fields)
    else:
        size = ("--max-model-len", "512", "--kv-cache-memory-bytes", str(int(_KV_GIB * 2**30)), "--max-num-seqs", "64")
        scene = both((*_VLLM, "--model", str(model), "--served-model-name", model.name, *_FLAGS, *size), "{}", **fields)
    with scene as (engine, gateway, process):

        def turn(is_gateway: bool) -> Measured:
            url, watched = (gateway, process) if is_gateway else (engine, None)
            return uvloop.run(measure(url, lambda: real_body(tokens), seconds, seconds / 4, watched))

        turn(True)
        return {"load": f"64 streams of {tokens} tokens"} | side_by_side(turn, repeats)


def start_s(model: Path, with_gateway: bool) -> Measured:
    """Seconds from the start of the process until it is ready (ours: canary answered, vLLM: /health) and until a first token.

    The second would show a /health that comes before the engine can answer. With the gateway also the two parts of its own that
    its log shows, which other work on the machine blurs less: until it starts the engine, and from the engine's last word on.
    """
    port = free_port()
    size = ("--max-model-len", "512")
    if with_gateway:
        command = [sys.executable, "-m", "ard_serve.cli", "serve", str(model), "--port", str(port), *size]
        command += ["--kv-cache-gib", str(_KV_GIB), "--", *_FLAGS]
    else:
        command = [*_VLLM, "--model", str(model), "--port", str(port), *size, *_FLAGS]
        command += ["--kv-cache-memory-bytes", str(int(_KV_GIB * 2**30)), "--load-format", "safetensors"]
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by its going
    started, began = time.perf_counter(), time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)
    family = psutil.Process(process.pid)
    try:
        while not answers(port, "/readyz" if with_gateway else "/health"):
            assert time.perf_counter() - started < 300, "not ready after 300 s"
            time.sleep(_POLL_S)
        ready_s = time.perf_counter() - started
        own = own_parts(log, began, began + ready_s) if with_gateway else {}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False, verify=NO_TLS) as client:
            name = client.get("/v1/models").json()["data"][0]["id"]
            client.post("/v1/completions", json={"model": name, "prompt": [1], "max_tokens": 1}).raise_for_status()
        return {"start_s": ready_s, "first_token_s": time.perf_counter() - started} | own
    finally:
        left = [family, *family.children(recursive=True)]
        process.terminate()
        psutil.wait_procs(left, timeout=20)
        for one in left:
            if one.is_running():
                one.kill()
        process.wait()


def own_parts(log: IO[str], began: float, ready: float) -> Measured:
    """Seconds before the engine's start and after its readiness, by the gateway's log."""
    log.seek(0)
    lines = log.readlines()

    def at(words: str) -> float:
        line = next(line for line in lines if words in line)
        return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()

    return {"before_engine_s": at("engine started") - began, "after_engine_s": ready - at("Application startup complete")}


def answers(port: int, path: str) -> bool:
    """Asked with as little work as can be: the gateway answers while its engine loads, and that must not slow the engine."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            return connection.recv(12) == b"HTTP/1.1 200"
    except OSError:
        return False


def starts(model: Path, repeats: int) -> dict[str, Any]:
    """Start-up in turns, after one start of each that fills the machine's file cache."""
    start_s(model, False), start_s(model, True)
    results = side_by_side(lambda is_gateway: start_s(model, is_gateway), repeats)
    return results | {"units": "seconds to ready and to a first token"}


def main() -> None:
    """Measure one section and put it into the results file, beside those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("what", choices=("scripted", "long", "real", "start"))
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--engine", metavar="URL", help="a vLLM that runs the model already, with room for 64 requests")
    parser.add_argument("--seconds", type=float, default=12, help="length of each turn against a real vLLM")
    parser.add_argument("--repeats", type=int, default=4, help="turns of each side with a real vLLM")
    given = parser.parse_args()
    out, what, model = given.out, given.what, given.model
    random.seed(0)
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    sections = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    section = circumstances(("httptools", "uvicorn", "uvloop", "fastapi"))
    if what == "long":
        section |= long_prompts(repeats=100)
    elif what == "scripted" or model is None:
        section |= scripted(repeats=5)
    elif what == "start":
        section |= starts(model, repeats=given.repeats)
    else:
        section |= real(model, given.engine, tokens=48, seconds=given.seconds, repeats=given.repeats)
    section["load_average_after"] = round(os.getloadavg()[0], 2)
    write(out, sections | {f"{what} {model.name if model else 'engine'}": section})


if __name__ == "__main__":
    main()
