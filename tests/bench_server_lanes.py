"""A short request behind long ones, with a real model: `python tests/bench_server_lanes.py MODEL docs/results/FILE.json`.

Time to the first token of a 20-token prompt: alone, behind one prompt that nearly fills the window, and behind three.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from helpers_server import Gateway, gateways, wait_for

from server.config import ServeConfig

_LONG_TOKENS = 7500


def ttft_s(gateway: Gateway, prompt: list[int]) -> float:
    started = time.perf_counter()
    body = {"prompt": prompt, "max_tokens": 2, "stream": True, "ignore_eos": True}
    with gateway.client(timeout_s=600) as client, client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        next(response.iter_raw())
        return time.perf_counter() - started


def behind(gateway: Gateway, longs: int, seed: int) -> dict[str, float]:
    """Start `longs` long prompts, and once the engine reads them, three short ones, one after another."""
    long_ttft_s: list[float] = []

    def read_long(index: int) -> None:
        prompt = [1000 + (seed + 31 * index + position) % 20_000 for position in range(_LONG_TOKENS)]
        long_ttft_s.append(ttft_s(gateway, prompt))

    threads = [threading.Thread(target=read_long, args=(index,)) for index in range(longs)]
    for thread in threads:
        thread.start()
    if longs:
        wait_for(lambda: gateway.metric("ard_long_prefills") == longs, 30)
        time.sleep(1)
    shorts = [ttft_s(gateway, [seed + index + position for position in range(20)]) for index in range(3)]
    for thread in threads:
        thread.join()
    return {"short_ttft_s": round(sorted(shorts)[1], 3), "longest_long_ttft_s": round(max(long_ttft_s, default=0), 1)}


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
    command = ServeConfig.model_fields["engine_command"].default
    with tempfile.TemporaryDirectory() as name, gateways(Path(name)) as start:
        gateway = start(
            environment={"OMP_NUM_THREADS": "2"}, model=str(model), engine_command=command, engine_args=["--enforce-eager"],
            kv_cache_gib=2, canary_interval_s=60, canary_timeout_s=60, max_model_len=8192,
        ).until_ready(300)  # fmt: skip
        for longs in (0, 1, 3):
            results[f"behind_{longs}"] = behind(gateway, longs, seed=100 * longs + 7)
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
