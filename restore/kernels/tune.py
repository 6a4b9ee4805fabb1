"""`python -m restore.kernels.tune`: time every sensible tile of each Triton kernel on this GPU and print the table for `TILES`.

Candidates are compiled by several processes first (Triton keeps what they compile on disk), then checked against the tile in
use, then timed in turns, so that a card whose clock wanders wanders for all of them; the slower half leaves after each round.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from restore.kernels.bench import describe_run, measure_matmul
from restore.kernels.triton_forward import forward
from restore.kernels.triton_key_backward import key_backward
from restore.kernels.triton_launch import forget, last_compiled
from restore.kernels.triton_query_backward import query_backward
from restore.kernels.triton_self_backward import self_backward
from restore.kernels.triton_tiles import TILES, Tile

KERNELS = ("forward", "self_backward", "query_backward", "key_backward")
# What a Hopper program may use; a smaller card's failures are found by compiling.
SHARED_BYTES = 227 << 10
REGISTERS = 255
Run = Callable[[Tile | None], tuple[Tensor, ...]]


@dataclass
class Candidate:
    """One tile and what became of it."""

    tile: Tile
    error: str | None = None
    compiled: dict[str, int] = field(default_factory=dict)
    times_ms: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        taken = {"ms": round(median(self.times_ms), 4), "repeats": len(self.times_ms)} if self.times_ms else {}
        return self.tile._asdict() | self.compiled | taken | ({"error": self.error} if self.error else {})


def candidates(kernel: str, block_d: int) -> Iterator[Tile]:
    """Tiles that may fit: two bytes an element, student and teacher, accumulators in registers."""
    sizes = product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4), (True, False), (None, 168))
    for rows, columns, warps, stages, bulk, registers in sizes:
        shared = 2 * 2 * block_d * (rows + stages * columns)
        # Products of student and teacher, and backward the gradient rows: fp32, spread over the threads.
        held = rows * (2 * columns + (block_d if kernel != "forward" else 0)) / (32 * warps)
        # 168 registers let three programs of four warps share a multiprocessor; else the compiler's choice stands.
        crowded = registers is not None and (warps != 4 or not bulk or 3 * shared > SHARED_BYTES)
        if shared <= SHARED_BYTES and held <= 0.85 * (registers or REGISTERS) and not crowded and rows >= 16 * warps:
            yield Tile(rows, columns, warps, stages, bulk, registers)


def problem(kernel: str, tokens: int, channels: int, heads: int = 32, groups: int = 8, device: str = "cuda") -> Run:
    """Random inputs (fp32 on the CPU, else bf16) under a function that runs `kernel` on them with a given tile."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    scales = (channels**-0.5, channels**-0.5)

    def pair(count: int) -> tuple[Tensor, Tensor]:
        teacher = torch.randn(1, count, tokens, channels, device=device)
        return (teacher + 0.1 * torch.randn_like(teacher)).to(dtype), teacher.to(dtype)

    (q_s, q_t), (k_s, k_t) = pair(heads), pair(groups)
    if kernel == "forward":
        return lambda tile: forward(q_s, k_s, q_t, k_t, scales, None, None, tile)
    grad = torch.rand(1, heads, tokens, device=device)
    if kernel == "self_backward":
        _, lse_s, lse_t = forward(q_s, q_s, q_t, q_t, scales, None, None)
        return lambda tile: (self_backward(grad, q_s, q_t, lse_s, lse_t, scales, None, tile),)
    _, lse_s, lse_t = forward(q_s, k_s, q_t, k_t, scales, None, None)
    backward = query_backward if kernel == "query_backward" else key_backward
    return lambda tile: (backward(grad, q_s, k_s, q_t, k_t, lse_s, lse_t, scales, None, None, tile),)


def differs(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], limit: float = 5e-3) -> str | None:
    """The relative error when it exceeds `limit` (two roundings of bf16), NaN included; else None."""
    for ours, theirs in zip(found, expected, strict=True):
        error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        if not error <= limit:
            return f"differs from the tile in use by {error:.2g}"
    return None


def compile_tile(job: tuple[str, int, int, Tile]) -> tuple[str | None, dict[str, int]]:
    """Compile one tile in a process of a pool, on an odd length, and check it there."""
    kernel, tokens, channels, tile = job
    try:
        run = problem(kernel, tokens, channels)
        forget()
        expected = run(None)
        error = differs(run(tile), expected)
        compiled = last_compiled()
        return error, {"registers_used": compiled.n_regs, "spills": compiled.n_spills, "shared": compiled.metadata.shared}
    except Exception as failure:  # noqa: BLE001 - a tile that cannot be is a finding
        return f"{type(failure).__name__}: {failure}"[:160], {}


def time_in_turns(run: Run, contest: list[Candidate], deadline: float, rounds: int = 4, repeats: int = 5) -> None:
    """Time all, drop the slower half, again: `rounds` times or until the clock (`time.monotonic`) passes `deadline`."""
    for _ in range(rounds):
        for _ in range(repeats):
            for candidate in contest:
                candidate.times_ms.append(once_ms(partial(run, candidate.tile)))
            if time.monotonic() > deadline:
                return
        contest.sort(key=lambda candidate: median(candidate.times_ms))
        contest = contest[: max(4, len(contest) // 2)]


def once_ms(work: Callable[[], object]) -> float:
    """Milliseconds that the device takes for one run."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # Something to wait behind, so that Python's part lies hidden.
    torch.cuda._sleep(500_000)  # type: ignore[no-untyped-call]
    before.record()
    work()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after))


def tune(kernel: str, channels: int, tokens: int, seconds: float, pool: ProcessPoolExecutor) -> list[Candidate]:
    """All candidates of one kernel and head size, fastest first, failures last."""
    block_d = 1 << (channels - 1).bit_length()
    found = [Candidate(tile) for tile in {TILES[kernel, max(64, block_d)], *candidates(kernel, block_d)}]
    jobs = [(kernel, 1031, channels, candidate.tile) for candidate in found]
    for candidate, (error, compiled) in zip(found, pool.map(compile_tile, jobs), strict=True):
        candidate.error, candidate.compiled = error, compiled
        if compiled.get("spills", 0) > 64:
            candidate.error = candidate.error or "spills registers"
    run = problem(kernel, tokens, channels)
    contest = [candidate for candidate in found if candidate.error is None]
    for candidate in contest:
        run(candidate.tile)  # loads it
    time_in_turns(run, contest, time.monotonic() + seconds)
    return sorted(found, key=lambda c: (c.error is not None, -len(c.times_ms), median(c.times_ms or [float("inf")])))


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the fastest tiles of the relation-KL kernels on this GPU.")
    parser.add_argument("--out", type=Path, default=Path("docs/results/kernel-tiles.json"))
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--channels", nargs="+", type=int, default=[128, 64, 256])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=20, help="for the timing of each kernel and head size")
    parser.add_argument("--processes", type=int, default=12, help="that compile")
    options = parser.parse_args()
    report: dict[str, Any] = describe_run("restore.kernels.tune") | {"tokens": options.tokens, "results": []}
    best: dict[tuple[str, int], Tile] = {}
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for channels, kernel in product(options.channels, options.kernels):
            found = tune(kernel, channels, options.tokens, options.seconds, pool)
            best[kernel, channels] = found[0].tile
            result = {"kernel": kernel, "channels": channels, "matmul_tflops": measure_matmul()}
            report["results"].append(result | {"tiles": [candidate.row() for candidate in found]})
            report["best"] = [f"({name!r}, {width}): {tile}" for (name, width), tile in best.items()]
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(kernel, channels, *(candidate.row() for candidate in found[:4]), sep="\n  ", flush=True)
    print("TILES:", *report["best"], sep="\n    ")


if __name__ == "__main__":
    main()
