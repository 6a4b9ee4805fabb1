"""`ard restore --estimate`: what a run would take of memory, time and disk, and on which GPU, from config.json alone."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ard_serve import console
from restore import checkpoint, devices
from restore.config import EstimateConfig
from restore.devices import GPUS, Gpu
from restore.fit import kept_within, measuring, otherwise, smaller
from restore.flops import Counter
from restore.forecast import BYTES_PER_TRAINED, Forecast, forecast
from restore.inspection import read_config, transformers_config
from restore.loading import resolve
from restore.model import Kept
from restore.plan import plan_steps
from restore.rope import RopePlan
from restore.runfolder import CHECKPOINTS
from restore.speed import Speeds

# What tests/test_restore_forecast.py allows a forecast.
_UNCERTAIN = 0.1
_Row = tuple[str, str, str]


def run(config: EstimateConfig) -> int:
    """Print the estimate; returns the exit code, 0."""
    gpus, base = _gpus(config.gpu), read_config(resolve(config.model))
    rope = config.plan_rope(base)
    plan, needed = plan_steps(config, rope), forecast(base, rope, config)
    flops = Counter(base, config).run(plan).counted
    lengths = f"{rope.native_window:,} to {rope.target_length:,} tokens"
    console.print_table(
        f"{config.model}, {lengths}: {plan}",
        ["what", "of which, or how", "how much"],
        [
            *_sizes(base, config, needed),
            *(_evaluation(base, rope, config, needed) if config.evaluate else ()),
            ("arithmetic", "model and relations, all steps", f"{flops / 1e15:,.2f} PFLOP"),
            *(_on(gpu, base, rope, config, needed, alone=len(gpus) == 1) for gpu in gpus),
            *(_filled(gpus[0], base, rope, config, needed) if len(gpus) == 1 else ()),
        ],
        text_columns=2,
    )
    return 0


def _gpus(name: str | None) -> list[Gpu]:
    """The GPU that is named, or the one here, or all that are known."""
    if name is not None:
        return [devices.lookup(name)]
    here = devices.named(torch.device("cuda")) if torch.cuda.is_available() else None
    return [here] if here else list(GPUS.values())


def _sizes(base: Mapping[str, Any], config: EstimateConfig, needed: Forecast) -> Iterator[_Row]:
    shape = transformers_config(dict(base))
    dtype = shape.dtype or torch.bfloat16  # an export keeps the base's own
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype)  # type: ignore[no-untyped-call]
    export = sum(weight.nbytes for weight in model.parameters())
    trained = needed.trained_bytes // BYTES_PER_TRAINED
    checkpoints = checkpoint.room_bytes(config.out / CHECKPOINTS, trained)
    yield "device memory, at least", "", _size(needed.peak_bytes)
    yield "", "frozen weights", _size(needed.weights_bytes)
    yield "", "adapters and optimizer", _size(needed.trained_bytes)
    yield "", "a step", _size(needed.step_bytes)
    yield "disk", "", _size(export + checkpoints)
    yield "", f"exported model in {str(dtype).removeprefix('torch.')}", _size(export)
    yield "", "checkpoints", _size(checkpoints)


def _evaluation(base: Mapping[str, Any], rope: RopePlan, config: EstimateConfig, needed: Forecast) -> Iterator[_Row]:
    """What measuring the result takes of the device once training has left it."""
    whole = forecast(base, rope, config.model_copy(update={"quantize": None})) if config.quantize else needed
    settings = config.evaluation.model_copy(update={"dtype": config.dtype})
    measured = measuring(base, whole.weights_bytes, settings.for_target(rope.target_length, rope.native_window))
    told = f"unless --no-evaluate; {_size(measured.cache_bytes)} of it for a needle prompt of {measured.prompt:,} tokens"
    yield "device memory, afterwards", f"to measure the result, {told}", _size(measured.peak_bytes)


def _on(gpu: Gpu, base: Mapping[str, Any], rope: RopePlan, config: EstimateConfig, needed: Forecast, alone: bool) -> _Row:
    """Whether the run fits `gpu`, and how long it trains there; where it is asked of it `alone`, also what smaller run fits."""
    left = gpu.usable_bytes - needed.peak_bytes
    if left < 0:
        remedies = [*otherwise(base, rope, config, needed, gpu.usable_bytes)]
        if alone:
            remedies.insert(0, smaller(base, rope, config, gpu.usable_bytes))
        return f"training on one {gpu.name}", "; ".join(remedies), "does not fit"
    free = f"{_size(left)} stay free" + (", less than a forecast may be off" if left < _UNCERTAIN * needed.peak_bytes else "")
    if config.dtype == "fp32":
        return f"training on one {gpu.name}", f"{free}; the rates known here are those of bf16", "fits"
    training = Speeds().training(gpu, base, config, plan_steps(config, rope))
    rate = f"{training.of_rate(gpu):.0%} of {gpu.matrix_tflops:g} TFLOP/s, {'; '.join(training.sources)}"
    return f"training on one {gpu.name}", f"{rate}; {free}", _duration(training.seconds)


def _filled(gpu: Gpu, base: Mapping[str, Any], rope: RopePlan, config: EstimateConfig, needed: Forecast) -> Iterator[_Row]:
    """What a run that fits will hold of `gpu` with the layers that keep their work there."""
    if needed.peak_bytes > gpu.usable_bytes:
        return
    kept = kept_within(base, rope, config, needed, gpu.usable_bytes)
    if kept != Kept():
        told = f"{kept.distilling} (to distil) and {kept.reading} (long windows) of {needed.layers} layers keep their work"
        yield f"memory taken of one {gpu.name}", told, _size(forecast(base, rope, config, kept).peak_bytes)


def _size(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
