"""`python -m restore.kernels.bench`: time and memory of the kernels on this GPU beside their peers, as one JSON file.

Shapes: B batch, H query heads, G key heads, T tokens, D head channels. FLOPs are counted as 8 T^2 D H for the self-relation
(2 products over half the tiles forward, 3 over all of them backward) and as many for the attention rows. Each row has
the same loss of 1,024 sampled rows beside it, whose time grows with T and not with T^2.
The matrix product that a row's rate is a share of is timed in turns with the row: it moves with the card's power.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from restore.kernels import cross_relation_kl, self_relation_kl
from restore.kernels.bench_peers import peers
from restore.kernels.bench_profile import profile

LENGTHS = (1024, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
MIB = 1 << 20
PRODUCT_SIZE = 8192
SAMPLED_ROWS = 1024
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {"self_relation": self_relation_kl, "cross_relation": cross_relation_kl}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the relation-KL kernels on this GPU.")
    parser.add_argument("--out", type=Path, default=Path("docs/results/kernel-gpu.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--reference", type=Path, help="a checkout of gracefulning/LinearARD, to run beside")
    parser.add_argument("--commit", help="what the numbers belong to, where there is no git")
    parser.add_argument("--ncu", action="store_true", help="profile each kernel with Nsight Compute, which must be on the PATH")
    parser.add_argument("--once", type=int, metavar="T", help="run forward and backward once at this length, for a profiler")
    options = parser.parse_args()
    if options.once:
        run_once(options.once)
        return
    report = describe_run("restore.kernels.bench", options.commit) | {"rows": []}
    for row in _rows(options.lengths, options.reference):
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        _write(options.out, report)
    report["memory_fit"] = fit_memory(report["rows"])
    report["host_us"] = {op: measure_host(op) for op in LOSSES}
    report["determinism"] = check_repeats()
    report["beyond_2^31_elements"] = check_offsets()
    if options.ncu:
        report["profile"] = profile([sys.executable, "-m", "restore.kernels.bench", "--once", "8192"])
    print({key: value for key, value in report.items() if key != "rows"})
    _write(options.out, report)


def describe_run(module: str, commit: str | None = None) -> dict[str, Any]:
    """What every results file begins with: commit, date, command, machine."""
    return {
        "commit": commit or _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "machine": {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
    }


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)  # noqa: S607
    return found.stdout.strip() or "unknown"


def _rows(lengths: list[int], reference: Path | None) -> Iterator[dict[str, Any]]:
    shapes = [("self_relation", 32, 32, 128), ("self_relation", 32, 32, 64), ("cross_relation", 32, 8, 128)]
    for op, heads, groups, channels in shapes:
        for tokens in lengths:
            inputs = _inputs(op, heads, groups, tokens, channels)
            row: dict[str, Any] = {"op": op, "T": tokens, "heads": heads, "kv_heads": groups, "head_dim": channels}
            row |= {"dtype": "bf16"} | measure(LOSSES[op], inputs, share=True)
            row["tflops"] = round(8 * tokens**2 * channels * heads / row["fwd_bwd_ms"] / 1e9, 1)
            row["of_matmul"] = round(row["tflops"] / row["matmul_tflops"], 3)
            sampled = measure(partial(LOSSES[op], rows=SAMPLED_ROWS), inputs)
            row |= {f"{SAMPLED_ROWS}_rows_{key}": value for key, value in sampled.items()}
            for peer, loss in peers(tokens, reference if channels == 128 else None).items():
                try:
                    row |= {f"{peer}_{key}": value for key, value in measure(loss, inputs).items()}
                except Exception as error:  # noqa: BLE001 - a peer that cannot run is a finding too
                    row[f"{peer}_error"] = f"{type(error).__name__}: {error}"[:200]
                    torch.cuda.empty_cache()
            yield row


def _inputs(op: str, heads: int, groups: int, tokens: int, channels: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)

    def pair(count: int) -> tuple[Tensor, Tensor]:
        teacher = torch.randn(1, count, tokens, channels, device="cuda", dtype=torch.bfloat16)
        return (teacher + 0.1 * torch.randn_like(teacher)).requires_grad_(), teacher

    (q_s, q_t), (k_s, k_t) = pair(heads), pair(groups)
    return (q_s, q_t) if op == "self_relation" else (q_s, k_s, q_t, k_t)


def measure(loss: Loss, inputs: tuple[Tensor, ...], share: bool = False) -> dict[str, float]:
    """Median milliseconds forward and forward + backward, and the peak MiB that a step needs beside its inputs.

    With `share` also the TFLOP/s of a matrix product timed in turns with them.
    """
    leaves = [x for x in inputs if x.requires_grad]

    def both() -> None:
        torch.autograd.grad(loss(*inputs), leaves)

    both()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    extra = torch.cuda.max_memory_allocated() - before
    work: dict[str, Callable[[], object]] = {"fwd_ms": lambda: loss(*inputs), "fwd_bwd_ms": both}
    if share:
        work["matmul_tflops"] = _product()
    taken_ms = _medians_ms(work)
    if share:
        taken_ms["matmul_tflops"] = round(2 * PRODUCT_SIZE**3 / taken_ms["matmul_tflops"] / 1e9, 1)
    return taken_ms | {"extra_mib": round(extra / MIB, 1)}


def _medians_ms(work: dict[str, Callable[[], object]], rounds: int = 4, budget_ms: float = 100) -> dict[str, float]:
    # Runs are queued, not waited for one by one: a training step does not wait for each loss either, and so the time
    # that Python takes to launch a kernel counts only where it exceeds the kernel's own.
    times_ms: dict[str, list[float]] = {name: [] for name in work}
    counts = {name: max(1, min(50, int(budget_ms / _times_ms(call, 2)[-1]))) for name, call in work.items()}
    for _ in range(rounds):
        for name, call in work.items():
            times_ms[name] += _times_ms(call, counts[name])
    return {name: round(median(times), 3) for name, times in times_ms.items()}


def _times_ms(work: Callable[[], object], repeats: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


def _product() -> Callable[[], Tensor]:
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return lambda: torch.mm(a, b)


def measure_matmul() -> float:
    """TFLOP/s of a bf16 matrix product on random data: the ceiling."""
    return round(2 * PRODUCT_SIZE**3 / _medians_ms({"product": _product()})["product"] / 1e9, 1)


def measure_host(op: str, repeats: int = 200) -> dict[str, float]:
    """Microseconds until Python has queued one forward + backward on 64 tokens: median and least of nine times `repeats`."""
    inputs = _inputs(op, 32, 32 if op == "self_relation" else 8, 64, 128)
    leaves = [x for x in inputs if x.requires_grad]
    times_us = []
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            torch.autograd.grad(LOSSES[op](*inputs), leaves)
        times_us.append((time.perf_counter() - begin) / repeats * 1e6)
    return {"median": round(median(times_us[1:]), 1), "least": round(min(times_us[1:]), 1)}


def fit_memory(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """A straight line through each operator's extra memory over T: KiB a token, KiB at 0, largest distance from it in %."""
    fits = {}
    for op, channels in dict.fromkeys((row["op"], row["head_dim"]) for row in rows):
        points = [(row["T"], row["extra_mib"] * 1024) for row in rows if (row["op"], row["head_dim"]) == (op, channels)]
        if len(points) < 3:
            continue
        tokens, kib = np.array(points, dtype=float).T
        slope, begin = np.polyfit(tokens, kib, 1)
        off = 100 * np.abs(slope * tokens + begin - kib) / kib
        line = {"kib_per_token": slope, "kib_at_0": begin, "largest_distance_percent": off.max()}
        fits[f"{op} {channels}"] = {key: round(float(value), 3) for key, value in line.items()}
    return fits


def run_once(tokens: int) -> None:
    """Forward and backward of both operators, twice: caches are cold the first time."""
    for op, loss in LOSSES.items():
        inputs = _inputs(op, 32, 32 if op == "self_relation" else 8, tokens, 128)
        for _ in range(2):
            torch.autograd.grad(loss(*inputs), [x for x in inputs if x.requires_grad])
    torch.cuda.synchronize()


def check_repeats(repeats: int = 250) -> dict[str, Any]:
    """How many of `repeats` runs on the same input gave the same bits, loss and gradients."""
    return {"repeats": repeats, "equal": {op: _count_equal(op, loss, repeats) for op, loss in LOSSES.items()}}


def _count_equal(op: str, loss: Loss, repeats: int) -> int:
    inputs = _inputs(op, 32, 8, 2048, 128)
    leaves = [x for x in inputs if x.requires_grad]

    def run() -> list[Tensor]:
        value = loss(*inputs)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    first = run()
    return sum(all(map(torch.equal, first, run())) for _ in range(repeats))


def check_offsets(heads: int = 260, tokens: int = 65536, channels: int = 128) -> dict[str, Any]:
    """A tensor of more than 2^31 elements: its last head must come out as if it were alone."""
    student, teacher = _inputs("self_relation", heads, heads, tokens, channels)
    rows = self_relation_kl(student, teacher, reduction="none")
    (gradient,) = torch.autograd.grad(rows, student, torch.ones_like(rows))
    last = student[:, -1:].detach().clone().requires_grad_()
    alone = self_relation_kl(last, teacher[:, -1:], reduction="none")
    (alone_gradient,) = torch.autograd.grad(alone, last, torch.ones_like(alone))
    same = torch.equal(rows[:, -1:], alone) and torch.equal(gradient[:, -1:], alone_gradient)
    return {"elements": student.numel(), "heads": heads, "T": tokens, "last_head_bit_equal": same}


if __name__ == "__main__":
    main()
