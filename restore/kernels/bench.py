"""`python -m restore.kernels.bench`: time and memory of the kernels on this GPU beside their peers, as one JSON file.

Shapes: B batch, H query heads, G key heads, T tokens, D head channels. FLOPs are counted as 8 T^2 D H for the self-relation
(2 products over half the tiles forward, 3 over all of them backward) and 8 T^2 D H for the attention rows likewise.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor

from restore.kernels import cross_relation_kl, self_relation_kl
from restore.kernels.reference import relation_rows

LENGTHS = (1024, 4096, 8192, 16384, 32768, 65536, 131072)
MIB = 1 << 20
Loss = Callable[..., Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the relation-KL kernels on this GPU.")
    parser.add_argument("--out", type=Path, default=Path("docs/results/kernel-gpu.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--reference", type=Path, help="a checkout of gracefulning/LinearARD, to run beside")
    parser.add_argument("--commit", default=_commit(), help="what the numbers belong to, where there is no git")
    options = parser.parse_args()
    matmul_tflops = measure_matmul()
    report: dict[str, Any] = {
        "commit": options.commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m restore.kernels.bench " + " ".join(sys.argv[1:]),
        "machine": {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "matmul_tflops": matmul_tflops,
        "rows": [],
    }
    for row in _rows(options.lengths, matmul_tflops, options.reference):
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        _write(options.out, report)
    report["determinism"] = check_repeats()
    report["beyond_2^31_elements"] = check_offsets()
    print(report["determinism"], report["beyond_2^31_elements"])
    _write(options.out, report)


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)  # noqa: S607
    return found.stdout.strip() or "unknown"


def _rows(lengths: list[int], matmul_tflops: float, reference: Path | None) -> Any:
    shapes = [("self_relation", 32, 32, 128), ("self_relation", 32, 32, 64), ("cross_relation", 32, 8, 128)]
    for op, heads, groups, channels in shapes:
        for tokens in lengths:
            inputs = _inputs(op, heads, groups, tokens, channels)
            row: dict[str, Any] = {"op": op, "T": tokens, "heads": heads, "kv_heads": groups, "head_dim": channels}
            row |= {"dtype": "bf16"} | measure(self_relation_kl if op == "self_relation" else cross_relation_kl, inputs)
            row["tflops"] = round(8 * tokens**2 * channels * heads / row["fwd_bwd_ms"] / 1e9, 1)
            row["matmul_tflops"], row["of_matmul"] = matmul_tflops, round(row["tflops"] / matmul_tflops, 3)
            if op == "self_relation" and channels == 128:
                for peer, loss in _peers(tokens, reference).items():
                    try:
                        row |= {f"{peer}_{key}": value for key, value in measure(loss, inputs).items()}
                    except Exception as error:  # noqa: BLE001 - a peer that cannot run is a finding too
                        row[f"{peer}_error"] = f"{type(error).__name__}: {error}"[:200]
            yield row


def _inputs(op: str, heads: int, groups: int, tokens: int, channels: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)

    def pair(count: int) -> tuple[Tensor, Tensor]:
        teacher = torch.randn(1, count, tokens, channels, device="cuda", dtype=torch.bfloat16)
        return (teacher + 0.1 * torch.randn_like(teacher)).requires_grad_(), teacher

    (q_s, q_t), (k_s, k_t) = pair(heads), pair(groups)
    return (q_s, q_t) if op == "self_relation" else (q_s, k_s, q_t, k_t)


def measure(loss: Loss, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Median milliseconds forward and forward + backward, and the peak MiB that a step needs beside its inputs."""
    leaves = [x for x in inputs if x.requires_grad]

    def both() -> None:
        torch.autograd.grad(loss(*inputs), leaves)

    both()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    extra = torch.cuda.max_memory_allocated() - before
    forward_ms, both_ms = _median_ms(lambda: loss(*inputs)), _median_ms(both)
    return {"fwd_ms": forward_ms, "fwd_bwd_ms": both_ms, "extra_mib": round(extra / MIB, 1)}


def _median_ms(work: Callable[[], object], budget_ms: float = 300) -> float:
    # Runs are queued, not waited for one by one: a training step does not wait for each loss either, and so the time
    # that Python takes to launch a kernel counts only where it exceeds the kernel's own.
    once_ms = _times_ms(work, 2)[-1]
    return round(median(_times_ms(work, max(1, min(100, int(budget_ms / once_ms))))), 3)


def _times_ms(work: Callable[[], object], repeats: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


def measure_matmul(size: int = 8192) -> float:
    """TFLOP/s of a bf16 matrix product on random data: the ceiling."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(20):
        torch.mm(a, b)
    return round(2 * size**3 / _median_ms(lambda: torch.mm(a, b)) / 1e9, 1)


def _dense(student: Tensor, teacher: Tensor) -> Tensor:
    scale = student.shape[3] ** -0.5
    return relation_rows(student, student, teacher, teacher, (scale, scale)).mean()


def _peers(tokens: int, reference: Path | None) -> dict[str, Loss]:
    peers: dict[str, Loss] = {}
    if tokens <= 4096:
        peers = {"dense": _dense, "compiled": torch.compile(_dense)}
    if reference and tokens in (4096, 16384):
        sys.path.insert(0, str(reference))
        align = import_module("kernels.attention_KL.integration").attn_kl_align
        peers["reference"] = partial(_reference, align)
    return peers


def _reference(align: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    return align(student, student, teacher, teacher)


def check_repeats(repeats: int = 250) -> dict[str, Any]:
    """How many of `repeats` runs on the same input gave the same bits, loss and gradients."""
    losses: dict[str, Loss] = {"self_relation": self_relation_kl, "cross_relation": cross_relation_kl}
    return {"repeats": repeats, "equal": {op: _count_equal(op, loss, repeats) for op, loss in losses.items()}}


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
