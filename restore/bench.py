"""`python -m restore.bench`: time and memory of training steps on this machine, beside their forecast, as one JSON file.

Models of real shapes with random weights train a few steps on random tokens, by the trainer itself. Rates count model and
relation FLOPs (docs/training.md) and are held against a matrix product timed in turns with the steps, because that moves
with the card's power. Under torchrun the step is shared out as in a run.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ard_serve.errors import ResourceError
from restore import bench_reference, bench_results, devices
from restore.batches import Batch, Batches
from restore.bench_cases import SHAPES, Case, build_trainer, random_tokens
from restore.config import RECIPES
from restore.flops import Counter
from restore.forecast import forecast
from restore.model import TwoFaced
from restore.objectives import Losses
from restore.parallel import ALONE, World, joined
from restore.plan import Plan
from restore.trainer import Trainer

_GIB = 1 << 30
# The side of the square matrices whose product is the ceiling.
_PRODUCT = {"cuda": 8192, "cpu": 256}


def main() -> None:
    options = _parser().parse_args()
    kind = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    with joined(kind) as world:
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        if options.memory_gib and kind == "cuda":
            total_bytes = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gib * _GIB / total_bytes), device)
        results = bench_results.Results(options.out, options.commit, device) if world.leads else None
        for row in _rows(options, device, world):
            if results is not None:
                results.append(row)
                print(json.dumps(row), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m restore.bench", description="Time training steps on this machine.")
    parser.add_argument("--out", type=Path, required=True, help="results file; rows are appended")
    parser.add_argument("--shapes", nargs="+", default=["135m", "1.7b", "7b"], choices=SHAPES)
    parser.add_argument("--windows", nargs="+", type=int, default=[4096, 8192, 16384, 32768], metavar="TOKENS")
    parser.add_argument("--recipes", nargs="*", default=["distill", "cpt"], metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="settings of `ard restore`, such as rank=64"
    )
    parser.add_argument("--warmup", type=int, default=1, metavar="STEPS", help="steps before the clock runs")
    parser.add_argument("--steps", type=int, default=3, metavar="STEPS", help="steps that are timed; the median counts")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="also write torch.profiler's table of one step of each row"
    )
    parser.add_argument("--reference", type=Path, metavar="CHECKOUT", help="run gracefulning/LinearARD's own step beside")
    parser.add_argument("--commit", help="what the numbers belong to, where there is no git")
    parser.add_argument(
        "--memory-gib", type=float, metavar="GIB", help="take no more of the GPU's memory, as if the card were smaller"
    )
    parser.add_argument("--cpu", action="store_true", help="use no GPU, to try the bench")
    return parser


def _rows(options: argparse.Namespace, device: torch.device, world: World) -> Iterator[dict[str, Any]]:
    settings: dict[str, Any] = {"batch_tokens": 32_768} | dict(word.split("=", 1) for word in options.set)
    for shape in options.shapes:
        for window in options.windows:
            for recipe in options.recipes:
                yield measure(Case(shape, window, settings | {"recipe": recipe}), device, world, options)
            if options.reference:
                yield measure(bench_reference.case(shape, window), device, world, options)
                yield bench_reference.measure(options.reference, shape, window, options.warmup, options.steps)


def measure(case: Case, device: torch.device, world: World, options: argparse.Namespace) -> dict[str, Any]:
    """One row: rates, memory, and where a step's time goes. A case that does not fit says so in its row."""
    row = case.describe(world.size)
    if options.memory_gib:
        row["memory_gib"] = options.memory_gib
    try:
        with tempfile.TemporaryDirectory() as folder:
            row |= _measured(*build_trainer(case, device, Path(folder), world), case, device, world, options)
    except (torch.OutOfMemoryError, ResourceError) as error:
        if world.size > 1:  # the other processes wait for this one's gradients
            raise
        row["error"] = str(error).splitlines()[0][:200]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _measured(
    faces: TwoFaced, trainer: Trainer, case: Case, device: torch.device, world: World, options: argparse.Namespace
) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what building the model took
        torch.cuda.reset_peak_memory_stats(device)
    # A round is what a step is where every step reads a long window.
    plan, rounds = trainer.plan, options.warmup + options.steps
    matrix, taken = [], []
    for number in range(rounds):
        if number >= options.warmup:
            matrix.append(matrix_tflops(device))
        taken.append([trainer.step() for _ in range(plan.long_every)])
    matrix.append(matrix_tflops(device))
    times = [sum(row["seconds"] for row in steps) for steps in taken]
    seconds = median(times[options.warmup :])
    made = _Made(case, plan)
    work = [made.flops(number, faces) for number in range(options.warmup, rounds)]
    counted, executed = (
        median(flops[kind] / time for flops, time in zip(work, times[options.warmup :], strict=True)) / world.size / 1e12
        for kind in (0, 1)
    )
    ceiling = median(matrix)
    gpu = devices.named(device)
    needed = forecast(case.base, case.rope, case.config, faces.kept)
    if faces.shards:
        needed = needed.sharded(world.size)
    peak_bytes = world.most(taken[-1][-1]["peak_memory_bytes"], device)
    row: dict[str, Any] = {
        "seconds": seconds,
        "first_step_s": taken[0][0]["seconds"],
        "tokens_per_s": plan.round_tokens / seconds,
        "tflops": counted,
        "tflops_with_recomputation": executed,
        "matmul_tflops": ceiling,
        "of_matmul": counted / ceiling,
        "of_matrix_rate": counted / gpu.matrix_tflops if gpu else None,
        # Layers that kept their work until backward: in a distillation, in a long window.
        "kept": [faces.kept.distilling, faces.kept.reading],
        # Others that kept what attention returned.
        "kept_attention": [faces.kept.distilling_attention, faces.kept.reading_attention],
        "forecast_gib": needed.peak_bytes / _GIB,
        # The CPU's allocator keeps no peak.
        "peak_gib": peak_bytes / _GIB if device.type == "cuda" else None,
        # What the allocator held for that, and a card must have.
        "reserved_gib": torch.cuda.max_memory_reserved(device) / _GIB if device.type == "cuda" else None,
    }
    if not faces.shards:  # whose processes must ask for the same layers, and here each reads what is its own
        row["parts_s"] = _parts(faces, case, made.round(rounds - 1, world), device, times[-1])
    if options.profile and world.leads:
        _profile(trainer, options.profile, case, device)
    return row


def matrix_tflops(device: torch.device) -> float:
    """TFLOP/s of a bf16 product of large square matrices of random numbers, now."""
    size = _PRODUCT[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_s(lambda: torch.mm(a, b, out=out), device, repeats=15) / 1e12


class _Made:
    """The batches that the trainer of a case reads, made once more."""

    def __init__(self, case: Case, plan: Plan) -> None:
        self._plan, self._counter = plan, Counter(case.base, case.config)
        stream = random_tokens(case.base, 3 * max(plan.window, plan.long_window))
        at_once = plan.windows_at_once(case.base["hidden_size"])
        self._batches = Batches(plan, case.config, stream, case.rope.target_length, None, at_once)

    def round(self, number: int, world: World) -> list[Batch]:
        """What this process of `world` reads in round `number`."""
        steps = range(number * self._plan.long_every, (number + 1) * self._plan.long_every)
        lengths = self._batches.lengths
        return [batch for step in steps for batch in self._batches.of_step(step, world.share(lengths(step)))]

    def flops(self, number: int, faces: TwoFaced) -> tuple[float, float]:
        """FLOPs of round `number` in all processes: those that count, and with what is not kept and done again."""
        counted = executed = 0.0
        for batch in self.round(number, ALONE):
            flops = self._counter.batch(batch)
            kept, layers = faces.kept, len(faces.layers)
            whole, attention = (
                (kept.reading, kept.reading_attention) if batch.is_long else (kept.distilling, kept.distilling_attention)
            )
            texts, tokens = batch.ids_BT.shape
            counted += flops.counted
            executed += flops.executed - flops.again * whole / layers - attention * self._counter.attention(tokens) * texts
        return counted, executed


def _parts(faces: TwoFaced, case: Case, made: list[Batch], device: torch.device, taken_s: float) -> dict[str, float]:
    """Seconds of this process for the teacher alone, both faces with their losses, the optimizer; the rest is backward."""
    losses = Losses(faces, case.config.weights)
    batches = [batch.to(device) for batch in made]
    optimizer = torch.optim.AdamW(faces.adapters.parameters(), lr=0.0, fused=True)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            losses.of(batch)

    def teacher() -> None:
        for batch in batches:
            if not batch.is_long:
                _read_as_teacher(faces, batch.ids_BT)

    found = {name: median_s(work, device, 2) for name, work in (("teacher", teacher), ("forward", forward))}
    found["optimizer"] = median_s(lambda: optimizer.step(), device, 2)
    found["backward"] = taken_s - found["forward"] - found["optimizer"]
    return {name: round(value, 4) for name, value in found.items()}


@torch.no_grad()
def _read_as_teacher(faces: TwoFaced, ids_BT: torch.Tensor) -> None:
    with faces.as_teacher() as model:
        model.model(ids_BT, use_cache=False)


def median_s(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds, each run waited for, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _profile(trainer: Trainer, path: Path, case: Case, device: torch.device) -> None:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiled:
        trainer.step()
    sort_by = f"self_{device.type}_time_total"
    table = profiled.key_averages().table(sort_by=sort_by, row_limit=40, max_name_column_width=70)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{case.shape}, window {case.window}, {case.config.recipe}\n{table}\n\n")


if __name__ == "__main__":
    main()
