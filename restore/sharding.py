"""Models larger than a GPU: every layer's frozen weights spread over the processes, and whole only while the layer runs.

PyTorch's FSDP2 keeps the shards and gathers them. When it does so is told here and not left to its hooks: a layer runs as
teacher and as student, and again in backward, and stays whole as long; the next one arrives meanwhile. Adapters, embedding and
output head are held by every process, so that all that a step exchanges beside weights is what replicated training exchanges.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from restore.inspection import Checkpoint, transformers_config
from restore.parallel import World


class Shards:
    """The layers of a sharded model. All processes must ask for the same layers in the same order."""

    def __init__(self, layers: nn.ModuleList) -> None:
        """`layers` were sharded by `load_sharded`."""
        self._layers = [layer for layer in layers if isinstance(layer, FSDPModule)]
        assert len(self._layers) == len(layers), "all layers are sharded or none"

    @contextmanager
    def whole(self, number: int, again: bool) -> Iterator[None]:
        """Hold the whole weights of layer `number`, and let those of the next come: in backward (`again`) the one before."""
        self._layers[number].unshard()
        following = number + (-1 if again else 1)
        if 0 <= following < len(self._layers):
            self._layers[following].unshard(async_op=True)
        try:
            yield
        finally:
            self._layers[number].reshard()

    def idle(self, trains: bool) -> None:
        """Take part in a pass of the other processes without one of one's own: forward, and backward if it `trains`."""
        count = len(self._layers)
        for number, again in [(n, False) for n in range(count)] + [(n, True) for n in reversed(range(count))] * trains:
            with self.whole(number, again):
                pass


def load_sharded(
    base: Checkpoint, config: dict[str, Any], dtype: torch.dtype, device: torch.device, world: World
) -> PreTrainedModel:
    """Load a checkpoint with its layers sharded over all processes; each reads its own rows of every weight alone.

    Args:
        base: the checkpoint, as `inspect` returned it.
        config: replaces its config.json.
        dtype: of the weights in memory.
        device: of this process.
        world: all processes.
    """
    model = empty_sharded(config, dtype, device, world)
    _read(model, base, world)
    model.train(False)
    return model


def empty_sharded(config: dict[str, Any], dtype: torch.dtype, device: torch.device, world: World) -> PreTrainedModel:
    """The same model before anything is read: weights of whatever the memory held."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(config), dtype=dtype)  # type: ignore[no-untyped-call]
    assert isinstance(model, PreTrainedModel)
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (world.size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    model.to_empty(device=device)
    model.tie_weights()
    return model


@torch.no_grad()
def _read(model: PreTrainedModel, base: Checkpoint, world: World) -> None:
    parameters = dict(model.named_parameters())
    for file in sorted({tensor.file for tensor in base.tensors.values()}):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - no mapping
                if name in parameters:
                    _fill(parameters[name], shard.get_slice(name), world)


def _fill(parameter: nn.Parameter, stored: Any, world: World) -> None:
    if not isinstance(parameter.data, DTensor):
        parameter.copy_(stored[:])
        return
    local = parameter.data.to_local()
    # FSDP2 cuts the first dimension as torch.chunk does: equal parts, the last ones shorter or empty.
    start = min(world.rank * -(-parameter.shape[0] // world.size), parameter.shape[0])
    local.copy_(stored[start : start + len(local)])
