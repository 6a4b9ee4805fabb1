"""Several processes, one run: each takes a share of every step's windows, and gradients and losses are summed.

Adapters are small beside the frozen model, so that every process holds a whole model, and what travels is one adapter's
gradient a step. Started by torchrun; alone, a process is a world of one and nothing travels.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from ard_serve import console


@dataclass(frozen=True)
class World:
    """The processes of a run; the one that leads holds the output folder, writes to it and publishes."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, tokens: Sequence[int]) -> list[int]:
        """Which of some windows, given by their lengths, are this process's: the longest first, each to whom has least."""
        loads, mine = [0] * self.size, []
        for window in sorted(range(len(tokens)), key=lambda window: -tokens[window]):
            taker = loads.index(min(loads))
            loads[taker] += tokens[window]
            if taker == self.rank:
                mine.append(window)
        return sorted(mine)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all processes, in one message."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, total in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def add_up_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients; a parameter that got none in one process may have got one in another."""
        if self.size > 1:
            self.add_up([_gradient(parameter) for parameter in parameters])

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether it holds in any process."""
        return self.most(float(here), device) > 0

    def most(self, here: float, device: torch.device) -> float:
        """The greatest of every process's number."""
        value = torch.tensor([here], dtype=torch.float64, device=device)
        if self.size > 1:
            distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return float(value)


ALONE = World()


@contextmanager
def joined(device_type: str) -> Iterator[World]:
    """The world that torchrun started this process in, or a world of one; only the process that leads is heard."""
    if device_type == "cuda" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Windows of two kinds by turns leave holes in memory of fixed blocks: 78 GiB were held for a peak of 65 (7B, H100).
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device_type == "cuda" else "gloo")
    world = World(distributed.get_rank(), size)
    if not world.leads:
        console.err.quiet = console.out.quiet = True
        logging.getLogger().setLevel(logging.ERROR)
    yield world
    # Not where this process fails: NCCL waits there for the others, and those wait for this one in their step. The command line
    # ends the process at once, which torchrun sees.
    distributed.destroy_process_group()


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
