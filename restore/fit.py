"""Whether a run fits the memory there is, before it starts; whether sharded; if neither, what would; and when it ran out."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from ard_serve.errors import ResourceError, UsageError
from restore import devices
from restore.config import RestoreConfig
from restore.evaluation.config import EvalConfig
from restore.forecast import Forecast, forecast, most_kept
from restore.inspection import read_config, transformers_config
from restore.loading import resolve
from restore.model import Kept
from restore.parallel import ALONE, World
from restore.plan import Plan, plan_steps
from restore.quantize import is_available
from restore.rope import RopePlan, head_dim

# Below these, a run would teach nothing worth having.
_SHORTEST_WINDOW, _LOWEST_RANK = 512, 8
_PROCESSES = (2, 4, 8, 16)
_LONGEST_QUADRATIC = 4096


def check_memory(
    base: Mapping[str, Any], rope: RopePlan, config: RestoreConfig, device: torch.device, world: World = ALONE
) -> tuple[RestoreConfig, Forecast]:
    """Refuse a run that cannot fit on `device`, and name one that would.

    Returns:
        The run with `shard` "on" or "off", whatever it was, and what it needs.

    Raises:
        UsageError: one process cannot shard.
        ResourceError: it does not fit, with the sizes and the settings that would.
    """
    if config.shard == "on" and world.size == 1:
        raise UsageError("shard = on: one process has nobody to share with; start several with torchrun (docs/training.md)")
    ways = _ways(config, world)
    world.any(False, device)  # the first message makes NCCL's own buffers, which are not free afterwards
    whole, free_bytes = forecast(base, rope, config), _free_bytes(device)
    for shard in ways:
        needed = whole.sharded(world.size) if shard == "on" else whole
        # Devices need not be equally free, and all processes must come to the same end.
        if not world.any(needed.peak_bytes > free_bytes, device):
            return config.model_copy(update={"shard": shard}), needed
    remedy = smaller(base, rope, config, free_bytes, world.size if "on" in ways else 1)
    told = "; ".join([remedy, *otherwise(base, rope, config, whole, free_bytes)])
    raise ResourceError(f"{device}: this run needs about {needed}, {free_bytes / 1e9:.1f} GB are free; {told}")


@dataclass(frozen=True)
class Measuring:
    """Bytes of device memory that an evaluation takes at its peak: one model, and the longest needle prompt's tokens."""

    prompt: int
    weights_bytes: int
    cache_bytes: int
    work_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.work_bytes


def measuring(base: Mapping[str, Any], weights_bytes: int, settings: EvalConfig) -> Measuring:
    """What an evaluation takes.

    Args:
        base: config.json of the model.
        weights_bytes: of the whole model in the evaluation's dtype.
        settings: what is to be measured, its lengths stated.
    """
    config, size = transformers_config(dict(base)), {"bf16": 2, "fp32": 4}[settings.dtype]
    prompt = max(settings.needle_lengths) if settings.needle_samples else 0
    longest = max(*settings.lengths, *settings.sliding, prompt, settings.batch_tokens)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(dict(base)) * size * prompt
    # Of one layer at a time: the inside of its MLP and some hidden states.
    work = longest * (3 * config.intermediate_size + 6 * config.hidden_size) * size
    return Measuring(prompt, weights_bytes, cache, work)


def check_evaluation(base: Mapping[str, Any], weights_bytes: int, settings: EvalConfig, device: torch.device) -> None:
    """Refuse an evaluation that cannot fit on `device` once training has left it, before hours go into that.

    Raises:
        ResourceError: it does not fit, with the sizes and what would.
    """
    needed, free_bytes = measuring(base, weights_bytes, settings), _free_bytes(device)
    if needed.peak_bytes > free_bytes:
        sizes = (needed.peak_bytes, needed.weights_bytes, needed.cache_bytes, needed.work_bytes, free_bytes)
        peak, weights, cache, work, free = (f"{number / 1e9:.1f} GB" for number in sizes)
        raise ResourceError(
            f"{device}: measuring the result needs about {peak} (weights {weights}, the cache of a needle prompt of "
            f"{needed.prompt} tokens {cache}, a layer's work {work}), {free} are free; add --no-evaluate and measure it served "
            f"(ard eval --server), or state shorter evaluation.needle_lengths"
        )


def refuse_quadratic(config: RestoreConfig, plan: Plan, device_type: str) -> None:
    """Refuse bit-equal fp32 over long windows on a GPU, where only the attention that makes [T, T] of each head gives that."""
    longest = max(plan.window, plan.long_window)
    if config.deterministic and config.dtype == "fp32" and device_type == "cuda" and longest > _LONGEST_QUADRATIC:
        raise UsageError(
            f"deterministic: a GPU's attention in fp32 over {longest} tokens would take memory by their square; "
            f"use --dtype bf16, or --window and --long-window of at most {_LONGEST_QUADRATIC}"
        )


def kept_layers(base: Mapping[str, Any], rope: RopePlan, config: RestoreConfig, needed: Forecast, device: torch.device) -> Kept:
    """How many layers keep their work until backward on this device: `config.recompute` says, "auto" as many as fit a GPU."""
    if config.recompute == "auto" and device.type == "cpu":
        return Kept()
    return kept_within(base, rope, config, needed, _free_bytes(device))


def kept_within(base: Mapping[str, Any], rope: RopePlan, config: RestoreConfig, needed: Forecast, free_bytes: int) -> Kept:
    """The same on a GPU with so much memory to itself."""
    if config.recompute == "all" or config.shard == "on":
        return Kept()
    if config.recompute == "none":
        return Kept(needed.layers, needed.layers)
    return most_kept(base, rope, config, needed, int(config.gpu_memory_utilization * free_bytes))


def _ways(config: RestoreConfig, world: World) -> tuple[str, ...]:
    """Whether to shard, in the order in which it is tried."""
    if config.shard != "auto":
        return (config.shard,)
    return ("off", "on") if world.size > 1 and config.quantize is None else ("off",)


def smaller(base: Mapping[str, Any], rope: RopePlan, config: RestoreConfig, free_bytes: int, processes: int = 1) -> str:
    """The largest run of ever smaller ones that fits on one of the `processes`."""
    choices = list(_shrinking(config, plan_steps(config, rope)))

    def fits(index: int) -> bool:
        needed = forecast(base, rope, config.model_copy(update=choices[index]))
        return (needed.sharded(processes) if processes > 1 else needed).peak_bytes <= free_bytes

    # Each needs less than the one before, and a forecast takes seconds.
    first = bisect_left(range(len(choices)), True, key=fits)
    if first == len(choices):
        return "no smaller window or rank would fit: use a smaller model or another device"
    told = {name: value for name, value in choices[first].items() if name != "batch_tokens" or value != config.batch_tokens}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in told.items())
    return f"{flags} would fit"


def _shrinking(config: RestoreConfig, plan: Plan) -> Iterator[dict[str, int]]:
    """Halve the long window, then the window, then the rank; with the window the step, or more windows were read at once."""
    window, long_window, rank, batch_tokens = plan.window, plan.long_window, config.rank, config.batch_tokens
    while True:
        if long_window > window and plan.long_windows:
            long_window //= 2
        elif window > _SHORTEST_WINDOW and plan.short_windows:
            window, batch_tokens = window // 2, max(1, batch_tokens // 2)
        elif batch_tokens > 2 * window and plan.short_windows:
            batch_tokens //= 2
        elif rank > _LOWEST_RANK and config.trainable == "lora":
            rank //= 2
        else:
            return
        yield {"window": window, "long_window": long_window, "rank": rank, "batch_tokens": batch_tokens}


def otherwise(
    base: Mapping[str, Any], rope: RopePlan, config: RestoreConfig, whole: Forecast, free_bytes: int
) -> Iterator[str]:
    """What would fit with the windows and the rank as they are."""
    if config.quantize:
        return
    if config.trainable == "lora" and is_available():
        packed = config.model_copy(update={"quantize": "4bit", "shard": "off"})
        if forecast(base, rope, packed).peak_bytes <= free_bytes:
            yield "--quantize 4bit would fit"
    for processes in _PROCESSES:
        if whole.sharded(processes).peak_bytes <= free_bytes:
            yield f"{processes} devices as this one would share it (torchrun)"
            return


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        # A process may have been told to take no more than a share of the card.
        allowed_bytes = torch.cuda.get_per_process_memory_fraction(device) * total_bytes
        return int(min(free_bytes, allowed_bytes - torch.cuda.memory_reserved(device)))
    return int(psutil.virtual_memory().available)


@contextmanager
def memory_errors(config: RestoreConfig, device_type: str, remedy: str = "") -> Iterator[None]:
    """Turn running out of memory, on the device or the host, into one line that says what to shrink, or gives the `remedy`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (reason := devices.full(error)) is None:
            raise
        if remedy:
            raise ResourceError(f"out of memory ({reason}); {remedy}") from None
        plan = plan_steps(config, config.plan_rope(read_config(resolve(config.model))))
        halves = f"--window {plan.window // 2} --long-window {plan.long_window // 2}"
        keeps = config.recompute == "none" or (config.recompute == "auto" and device_type == "cuda")
        halves += ", and less with --recompute all" if keeps else ""
        raise ResourceError(
            f"out of memory ({reason}) with windows of {plan.window} and {plan.long_window} tokens and rank {config.rank}; "
            f"about half is needed with {halves}"
        ) from None
