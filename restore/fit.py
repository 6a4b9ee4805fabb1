"""Whether a run fits the memory there is, before it starts; whether sharded; and if neither, what would."""

from collections.abc import Mapping
from typing import Any

import psutil
import torch

from ard_serve.errors import ResourceError, UsageError
from restore.config import RestoreConfig
from restore.forecast import Forecast, forecast
from restore.parallel import ALONE, World
from restore.plan import plan_steps
from restore.rope import RopePlan

# Below these, a run would teach nothing worth having.
_SHORTEST_WINDOW, _LOWEST_RANK = 512, 8


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
    choices = ("off", "on") if config.shard == "auto" and world.size > 1 else ("on" if config.shard == "on" else "off",)
    free_bytes = _free_bytes(device)
    for shard in choices:
        settled = config.model_copy(update={"shard": shard})
        needed = forecast(base, rope, settled, world.size)
        # Devices need not be equally free, and all processes must come to the same end.
        if not world.any(needed.peak_bytes > free_bytes, device):
            return settled, needed
    remedy = _what_fits(base, rope, settled, free_bytes, world.size)
    raise ResourceError(f"{device}: this run needs about {needed}, {free_bytes / 1e9:.1f} GB are free; {remedy}")


def _what_fits(base: Mapping[str, Any], rope: RopePlan, config: RestoreConfig, free_bytes: int, processes: int) -> str:
    """Halve the windows, the long one first, then the rank, until a run fits."""
    plan = plan_steps(config, rope)
    window, long_window, rank = plan.window, plan.long_window, config.rank
    while True:
        if long_window > window and plan.long_windows:
            long_window //= 2
        elif window > _SHORTEST_WINDOW and plan.short_windows:
            window //= 2
        elif rank > _LOWEST_RANK and config.trainable == "lora":
            rank //= 2
        else:
            return "no smaller window or rank would fit: use a smaller model or another device"
        smaller = config.model_copy(update={"window": window, "long_window": long_window, "rank": rank})
        if forecast(base, rope, smaller, processes).peak_bytes <= free_bytes:
            return f"--window {window} --long-window {long_window} --rank {rank} would fit"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
