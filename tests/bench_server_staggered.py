"""What the long lane costs and buys: `python tests/bench_server_staggered.py MODEL docs/results/server-staggered-cpu.json`.

Four clients with nothing but long prompts on one vLLM of 256 tokens a step, 64 of them for one long prompt: straight,
through a gateway that was told the same and so lets in three at once, and through one told 320, which lets in all four.
Then the same once more with a short prompt every second, whose time to the first token is what the lane is for. What counts
is the number of steps, four for each prompt, as for 8,192 tokens in steps of 2,048: small ones, so that a CPU can do many.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import tempfile
import time
from contextlib import closing
from pathlib import Path

import uvloop
from bench_server import attached
from helpers_bench import circumstances, spread, write
from helpers_server import ENGINE_KEY, free_port, running_engine
from real_faults import engine_version

from server.config import ServeConfig
from server.upstream import Upstream

_WINDOW, _STEP_TOKENS, _LONG_TOKENS = 1024, 256, 64
_CLIENTS, _PROMPT_TOKENS, _ANSWER_TOKENS, _TURN_S = 4, 250, 32, 25
_VLLM: tuple[str, ...] = ServeConfig.model_fields["engine_command"].default
_fresh = itertools.count()


def body(model: str, prompt_tokens: int, answer_tokens: int) -> bytes:
    prompt = random.Random(next(_fresh)).choices(range(1000, 20_000), k=prompt_tokens)
    fields = {"model": model, "prompt": prompt, "max_tokens": answer_tokens, "stream": True, "ignore_eos": True}
    return json.dumps(fields).encode()


async def stream(server: Upstream, request: bytes) -> tuple[float, float]:
    """Seconds to the first token and to the end."""
    started = time.perf_counter()
    with closing(await server.ask("POST", "/v1/completions", request, "bench")) as answer:
        assert answer.status == 200, await answer.read()
        await answer.piece()
        first_s = time.perf_counter() - started
        await answer.read()
    return first_s, time.perf_counter() - started


async def turn(url: str, key: str, model: str, with_short: bool) -> dict[str, list[float]]:
    """Figures in seconds of one side for a while: of each long request, and of each short one."""
    names = ("ttft", "tpot", "e2e", *(("short_ttft",) if with_short else ()))
    seen: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + _TURN_S

    async def client() -> None:
        while time.perf_counter() < end:
            first_s, whole_s = await stream(server, body(model, _PROMPT_TOKENS, _ANSWER_TOKENS))
            seen["ttft"].append(first_s)
            seen["tpot"].append((whole_s - first_s) / (_ANSWER_TOKENS - 1))
            seen["e2e"].append(whole_s)

    async def passer_by() -> None:
        while with_short and time.perf_counter() < end:
            await asyncio.sleep(1)
            seen["short_ttft"].append((await stream(server, body(model, 20, 1)))[0])

    with closing(Upstream(url, key)) as server:
        await asyncio.gather(passer_by(), *(client() for _ in range(_CLIENTS)))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=2, help="turns of each side")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    port, name = free_port(), given.model.name
    size = ("--max-model-len", str(_WINDOW), "--kv-cache-memory-bytes", str(1 << 30), "--enforce-eager")
    steps = ("--max-num-batched-tokens", str(_STEP_TOKENS), "--long-prefill-token-threshold", str(_LONG_TOKENS))
    command = (*_VLLM, "--model", str(given.model), "--served-model-name", name, *size, *steps)
    fields = {"model": str(given.model), "max_model_len": _WINDOW, "served_model_name": name, "beyond_measured": "mark"}
    results = circumstances(("uvicorn", "uvloop"))
    with tempfile.TemporaryDirectory() as folder, running_engine(command, port, Path(folder) / "engine.jsonl", "{}"):
        engine = f"http://127.0.0.1:{port}"
        with (
            attached(engine, **fields, batch_tokens=_STEP_TOKENS, long_prompt_tokens=_LONG_TOKENS) as (_, three, _process),
            attached(engine, **fields, batch_tokens=_STEP_TOKENS + _LONG_TOKENS, long_prompt_tokens=_LONG_TOKENS) as (
                _,
                four,
                _p,
            ),
        ):
            sides = {"straight": (engine, ENGINE_KEY), "three at once": (three, ""), "four at once": (four, "")}
            seen: dict[str, dict[str, list[float]]] = {}
            for number, (with_short, names) in enumerate(itertools.product((False, True), [tuple(sides)] * given.repeats)):
                for side in names if number % 2 == 0 else names[::-1]:
                    figures = seen.setdefault(f"{side}{', a short one every second' if with_short else ''}", {})
                    for figure, values in uvloop.run(turn(*sides[side], name, with_short)).items():
                        figures.setdefault(figure, []).extend(values)
    load = f"{_CLIENTS} clients, prompts of {_PROMPT_TOKENS} tokens, answers of {_ANSWER_TOKENS}; {given.repeats} x {_TURN_S} s"
    sides_seen = {
        side: {"requests": len(figures["e2e"])} | {figure: spread(values) for figure, values in figures.items()}
        for side, figures in seen.items()
    }
    write(
        given.out, results | {"engine": engine_version(), "model": name, "load": load, "units": "seconds", "sides": sides_seen}
    )


if __name__ == "__main__":
    main()
