"""Long prompts through the gateway: `python tests/bench_server_long.py MODEL OUT --window 65536 [--gpus 2] [-- vLLM's flags]`.

Prompts from 1,000 tokens to nearly the window, alone and four at once: time to the first token, tokens a second after it, the
plan's estimate beside what came, the KV ledger beside the engine's own preemptions. With `--gpus 2` over two GPUs.
With `--faults kill drain` then, under a crowd of clients, a process of the engine is killed with -9 and the gateway ended by
SIGTERM: what each request saw and how long it took. A MODEL of `helpers_random_llama.py` has its logits checked as well.
OUT is written after each part, so that an end on the way loses one part only.
"""

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx
from helpers_bench import circumstances, write
from helpers_server import Gateway, gateways, wait_for
from real_scene import engine_processes

from server.config import ServeConfig

_ANSWER_TOKENS = 64
_READY_S = 540
_CLIENTS, _CROWD_S = 8, 5


def unseen_prompt(tokens: int, seed: int) -> list[int]:
    """A prompt that no cache knows."""
    return [100 + (7919 * position + seed) % 20_000 for position in range(tokens)]


def ask(gateway: Gateway, prompt_tokens: int, seed: int) -> dict[str, float]:
    """One stream; times in seconds."""
    body = {"prompt": unseen_prompt(prompt_tokens, seed), "max_tokens": _ANSWER_TOKENS, "ignore_eos": True}
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


def lengths_within(window: int) -> list[int]:
    longest = window - 2 * _ANSWER_TOKENS
    return sorted({length for length in (1000, 8000, 32_000, 60_000) if length < longest} | {longest})


def measure(gateway: Gateway, window: int) -> dict[str, Any]:
    lengths = lengths_within(window)
    ask(gateway, 500, seed=1)
    alone = {str(length): ask(gateway, length, seed=length) for length in lengths}
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda seed: ask(gateway, lengths[-1], seed), range(10, 14)))
    with gateway.client() as client:
        preempted = preemptions(client)
    capacity = gateway.metric("ard_kv_capacity_tokens")
    return {"kv_tokens": capacity, "alone": alone, "four_at_once": at_once, "preemptions": preempted}


def beside_reference(gateway: Gateway, reference: dict[str, Any]) -> dict[str, float]:
    """How far the engine's log-probabilities of the likeliest next tokens are from those of the model's own maker."""
    wanted: dict[str, float] = reference["logprobs"]
    body = {"prompt": reference["prompt"], "max_tokens": 1, "logprobs": len(wanted), "return_tokens_as_token_ids": True}
    with gateway.client(timeout_s=120) as client:
        found = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["top_logprobs"][0]
    both = [(value, found[f"token_id:{token}"]) for token, value in wanted.items() if f"token_id:{token}" in found]
    return {"tokens": len(wanted), "in_both": len(both), "largest_difference": max((abs(a - b) for a, b in both), default=9e9)}


class Crowd:
    """Clients that ask one stream after another, of all lengths, and what became of each."""

    def __init__(self, gateway: Gateway, window: int) -> None:
        self.ends: list[tuple[float, str]] = []  # time.monotonic(), what the client saw
        self._gateway, self._lengths, self._over = gateway, lengths_within(window), threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(number,), daemon=True) for number in range(_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def since(self, moment: float) -> dict[str, int]:
        return dict(Counter(what for ended, what in self.ends if ended >= moment))

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self, number: int) -> None:
        with self._gateway.client(timeout_s=600) as client:
            for turn in count(number):
                if self._over.is_set():
                    return
                what = self._ask(client, self._lengths[turn % len(self._lengths)], seed=1000 * number + turn)
                self.ends.append((time.monotonic(), what))
                if what != "answered":
                    self._over.wait(0.2)

    @staticmethod
    def _ask(client: httpx.Client, prompt_tokens: int, seed: int) -> str:
        body = {"prompt": unseen_prompt(prompt_tokens, seed), "max_tokens": _ANSWER_TOKENS, "ignore_eos": True, "stream": True}
        text = b""
        try:
            with client.stream("POST", "/v1/completions", json=body) as response:
                for chunk in response.iter_raw():
                    text += chunk
                if response.status_code != 200:
                    return f"{response.status_code} {json.loads(text)['error']['code']}"
        except httpx.ConnectError:
            return "nobody listens"
        except httpx.TransportError as error:
            return f"cut off: {type(error).__name__}"
        if text.rstrip().endswith(b"data: [DONE]"):
            return "answered"
        last = text.rstrip().rsplit(b"\n\n", 1)[-1].removeprefix(b"data: ")
        return f"error event {json.loads(last)['error']['code']}" if b'"error"' in last else "ended without a word"


def kill_engine(gateway: Gateway, window: int, part: str) -> dict[str, Any]:
    """Kill a process of the engine while a crowd is served; seconds from then on."""
    crowd = Crowd(gateway, window)
    time.sleep(_CROWD_S)
    victim = next(process for process in engine_processes(gateway) if part in " ".join(process.cmdline()))
    killed = time.monotonic()
    victim.kill()
    away_s = wait_for(lambda: gateway.status("/readyz") == 503, 30)
    wait_for(lambda: gateway.status("/readyz") == 200, _READY_S)
    ready = time.monotonic()
    wait_for(lambda: "answered" in crowd.since(ready), 60)
    answered = time.monotonic()
    time.sleep(_CROWD_S)
    crowd.stop()
    seconds = {"not_ready_s": away_s, "ready_again_s": ready - killed, "answered_again_s": answered - killed}
    seconds = {name: round(value, 2) for name, value in seconds.items()}
    return {"killed": part, **seconds, "requests": crowd.since(0), "requests_from_then_on": crowd.since(killed)}


def drain(gateway: Gateway, window: int) -> dict[str, Any]:
    """SIGTERM while a crowd is served."""
    crowd = Crowd(gateway, window)
    time.sleep(_CROWD_S)
    asked = time.monotonic()
    code = gateway.stop(signal.SIGTERM)
    took_s = time.monotonic() - asked
    crowd.stop()
    return {"exit_code": code, "took_s": round(took_s, 2), "requests_from_then_on": crowd.since(asked)}


def main() -> None:
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--window", type=int, required=True, help="tokens")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--kv-gib", type=float, help="KV cache of each GPU; what vLLM finds free when not given")
    faults = ("kill", "drain")
    parser.add_argument(
        "--faults", nargs="+", choices=faults, default=[], help="done under load: kill -9 of the engine, SIGTERM"
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the engine")
    given = parser.parse_args(words[:cut])
    tensor_parallel = ["--tensor-parallel-size", str(given.gpus)] if given.gpus > 1 else []
    fields: dict[str, Any] = {"model": str(given.model), "max_model_len": given.window, "beyond_measured": "mark"}
    fields |= {"engine_command": (given.python, *ServeConfig.model_fields["engine_command"].default[1:])}
    fields |= {"engine_args": [*tensor_parallel, *words[cut + 1 :]], "canary_timeout_s": 60, "canary_interval_s": 5}
    results = circumstances(("uvicorn", "uvloop")) | {"model": given.model.name, "window": given.window, "gpus": given.gpus}
    reference = given.model / "reference.json"
    with tempfile.TemporaryDirectory() as name, gateways(Path(name)) as start:
        started = time.monotonic()
        gateway = start(kv_cache_gib=given.kv_gib, drain_s=60, **fields)
        try:
            gateway.until_ready(_READY_S)
            write(given.out, results := results | {"start_s": round(time.monotonic() - started, 1)})
            if reference.exists():
                results |= {"reference": beside_reference(gateway, json.loads(reference.read_text(encoding="utf-8")))}
            write(given.out, results := results | measure(gateway, given.window))
            if "kill" in given.faults:
                part = "Worker" if given.gpus > 1 else "EngineCore"
                write(given.out, results := results | {"kill": kill_engine(gateway, given.window, part)})
            if "drain" in given.faults:
                write(given.out, results := results | {"drain": drain(gateway, given.window)})
            write(given.out, results | {"exit_code": gateway.stop()})
        except BaseException:
            print(gateway.stderr[-20_000:], file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
