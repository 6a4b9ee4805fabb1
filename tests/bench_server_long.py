"""Long prompts through the gateway: `python tests/bench_server_long.py MODEL OUT --window 65536 [--gpus 2] [-- vLLM's flags]`.

Prompts from 1,000 tokens to nearly the window, alone and four at once: time to the first token, tokens a second after it, the
plan's estimate beside what came, the KV ledger beside the engine's own preemptions. With `--gpus 2` over two GPUs.
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from helpers_bench import circumstances, write
from helpers_server import Gateway, gateways

from server.config import ServeConfig

_ANSWER_TOKENS = 64


def ask(gateway: Gateway, prompt_tokens: int, seed: int) -> dict[str, float]:
    """One stream of a prompt that no cache knows; times in seconds."""
    prompt = [100 + (7919 * position + seed) % 20_000 for position in range(prompt_tokens)]
    body = {"prompt": prompt, "max_tokens": _ANSWER_TOKENS, "ignore_eos": True}
    with gateway.client(timeout_s=600) as client:
        plan = client.post("/v1/plan", json=body).json()
        started, first_s, text = time.monotonic(), None, b""
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            response.raise_for_status()
            for chunk in response.iter_raw():
                first_s = first_s or time.monotonic() - started
                text += chunk
        whole_s = time.monotonic() - started
    assert text.rstrip().endswith(b"data: [DONE]"), text[-300:]
    assert first_s is not None
    rate = (_ANSWER_TOKENS - 1) / max(whole_s - first_s, 1e-6)
    return {"ttft_s": round(first_s, 3), "planned_ttft_s": plan["estimated_first_token_s"], "tokens_per_s": round(rate, 1)}


def preemptions(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_preemptions_total{"))


def measure(gateway: Gateway, window: int) -> dict[str, Any]:
    lengths = sorted({length for length in (1000, 8000, 32_000, 60_000) if length < window} | {window - 2 * _ANSWER_TOKENS})
    ask(gateway, 500, seed=1)
    alone = {str(length): ask(gateway, length, seed=length) for length in lengths}
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda seed: ask(gateway, lengths[-1], seed), range(10, 14)))
    with gateway.client() as client:
        preempted = preemptions(client)
    capacity = gateway.metric("ard_kv_capacity_tokens")
    return {"kv_tokens": capacity, "alone": alone, "four_at_once": at_once, "preemptions": preempted}


def main() -> None:
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--window", type=int, required=True, help="tokens")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the engine")
    given = parser.parse_args(words[:cut])
    tensor_parallel = ["--tensor-parallel-size", str(given.gpus)] if given.gpus > 1 else []
    fields: dict[str, Any] = {"model": str(given.model), "max_model_len": given.window, "beyond_measured": "mark"}
    fields |= {"engine_command": (given.python, *ServeConfig.model_fields["engine_command"].default[1:])}
    fields |= {"engine_args": [*tensor_parallel, *words[cut + 1 :]], "canary_timeout_s": 60, "canary_interval_s": 5}
    results = circumstances(("uvicorn", "uvloop")) | {"model": given.model.name, "window": given.window, "gpus": given.gpus}
    with tempfile.TemporaryDirectory() as name, gateways(Path(name)) as start:
        started = time.monotonic()
        gateway = start(kv_cache_gib=None, **fields).until_ready(540)
        results |= {"start_s": round(time.monotonic() - started, 1)} | measure(gateway, given.window)
        results["exit_code"] = gateway.stop()
    write(given.out, results)


if __name__ == "__main__":
    main()
