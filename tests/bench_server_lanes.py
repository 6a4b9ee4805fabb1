"""A short request behind long ones, with a real model: `python tests/bench_server_lanes.py MODEL docs/results/FILE.json`.

Time to the first token of a 20-token prompt: alone, behind one prompt that nearly fills the window, and behind three. Once
through the gateway, and once straight to a vLLM with the flags that were best for this there: the same as the gateway sets.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from helpers_server import ENGINE_KEY, free_port, gateways, running_engine, wait_for

from server.config import ServeConfig

_LONG_TOKENS = 7500
_WINDOW = 8192
_KV_GIB = 2
_VLLM = ServeConfig.model_fields["engine_command"].default


def ttft_s(server: httpx.Client, prompt: list[int]) -> float:
    started = time.perf_counter()
    body = {"prompt": prompt, "max_tokens": 2, "stream": True, "ignore_eos": True}
    with server.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        next(response.iter_raw())
        return time.perf_counter() - started


def running(server: httpx.Client) -> int:
    found = re.search(r"^vllm:num_requests_running{.*} (\S+)$", server.get("/metrics").text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def behind(server: httpx.Client, longs: int, seed: int) -> dict[str, float]:
    """Start `longs` long prompts, and once the engine reads them, three short ones, one after another."""
    long_ttft_s: list[float] = []

    def read_long(index: int) -> None:
        prompt = [1000 + (seed + 31 * index + position) % 20_000 for position in range(_LONG_TOKENS)]
        long_ttft_s.append(ttft_s(server, prompt))

    threads = [threading.Thread(target=read_long, args=(index,)) for index in range(longs)]
    for thread in threads:
        thread.start()
    if longs:
        wait_for(lambda: running(server) == longs, 60)
        time.sleep(1)
    shorts = [ttft_s(server, [seed + index + position for position in range(20)]) for index in range(3)]
    for thread in threads:
        thread.join()
    return {"short_ttft_s": round(sorted(shorts)[1], 3), "longest_long_ttft_s": round(max(long_ttft_s, default=0), 1)}


@contextmanager
def through_gateway(model: Path) -> Iterator[httpx.Client]:
    with tempfile.TemporaryDirectory() as name, gateways(Path(name)) as start:
        gateway = start(
            model=str(model), engine_command=_VLLM, engine_args=["--enforce-eager"], kv_cache_gib=_KV_GIB,
            canary_interval_s=60, canary_timeout_s=60, max_model_len=_WINDOW,
        ).until_ready(300)  # fmt: skip
        with gateway.client(timeout_s=600) as client:
            yield client


@contextmanager
def bare_vllm(model: Path) -> Iterator[httpx.Client]:
    port = free_port()
    size = ("--max-model-len", str(_WINDOW), "--kv-cache-memory-bytes", str(_KV_GIB << 30))
    lanes = ("--max-num-batched-tokens", "2048", "--long-prefill-token-threshold", "512")
    command = (*_VLLM, "--model", str(model), "--served-model-name", model.name, "--enforce-eager", *size, *lanes)
    headers = {"authorization": f"Bearer {ENGINE_KEY}"}
    with (
        running_engine(command, port, Path(os.devnull)),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=600) as client,
    ):
        wait_for(lambda: is_up(client), 300)
        yield client


def is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def main(model: Path, out: Path) -> None:
    """Measure and write the results."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    results: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "model": model.name,
        "long_prompt_tokens": _LONG_TOKENS,
        "load_average_before": round(os.getloadavg()[0], 2),
    }
    for label, server in (("gateway", through_gateway), ("vllm_at_its_best", bare_vllm)):
        with server(model) as client:
            results[label] = {f"behind_{longs}": behind(client, longs, seed=100 * longs + 7) for longs in (0, 1, 3)}
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
