"""The gated MLP with silu(gate) * up in one kernel, and without the products that backward's recomputation has no use for.

As two operations, silu's result stays until backward beside gate and up, which are all that the gradient needs: by the forecast
a fifth of what a layer of 7B keeps. On a GPU the kernel rounds once where the two operations round twice; elsewhere they run as
they are, and the teacher is the native model bit for bit.

Shapes: T tokens (any leading dimensions), C hidden channels, I inner channels.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaMLP

from restore.quantize import QuantizedLinear

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fuse(model: nn.Module) -> int:
    """Let the MLPs of `model` that compute what Llama's do run fused; returns how many did not before."""
    mlps = [module for module in model.modules() if _is_llamas(module) and "forward" not in vars(module)]
    for mlp in mlps:
        mlp.forward = _Gated(mlp)
    return len(mlps)


@contextmanager
def unread(layer: nn.Module) -> Iterator[None]:
    """Inside, nobody reads what the decoder layer's MLP returns, and only its gradient is right.

    That holds where a layer runs again in backward: its last product, a seventh of a 7B layer's, would only give what the next
    layer read long ago.
    """
    gated = getattr(layer.mlp, "forward", None)
    if not isinstance(gated, _Gated):
        yield
        return
    gated.is_read = False
    try:
        yield
    finally:
        gated.is_read = True


def _is_llamas(module: nn.Module) -> bool:
    kind = type(module)
    same = kind.__name__.endswith("MLP") and inspect.getsource(kind.forward) == inspect.getsource(LlamaMLP.forward)
    return same and getattr(module.config, "hidden_act", None) == "silu"


@dataclass
class _Gated:
    """Takes the place of an MLP's forward."""

    mlp: Any
    is_read: bool = True

    def __call__(self, x_TC: Tensor) -> Tensor:
        gate_TI, up_TI = self.mlp.gate_proj(x_TC), self.mlp.up_proj(x_TC)
        down = self.mlp.down_proj
        output: Tensor
        if self.is_read or type(down) not in (nn.Linear, QuantizedLinear):
            output = down(_Product.apply(gate_TI, up_TI))  # type: ignore[no-untyped-call]
        else:
            output = _Unread.apply(gate_TI, up_TI, down)  # type: ignore[no-untyped-call]
        return output


class _Product(torch.autograd.Function):
    """silu(gate) * up; keeps no more than the two."""

    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        if _has_kernel(gate_TI):
            return _kernels().forward(gate_TI, up_TI)  # type: ignore[no-any-return]
        return silu(gate_TI).mul_(up_TI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TI: Tensor) -> tuple[Tensor, Tensor]:
        return _gradients(grad_TI, *ctx.saved_tensors)


class _Unread(torch.autograd.Function):
    """The same and the frozen product behind it, for the gradient alone: what it returns is zeros that take no room."""

    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor, down: nn.Linear) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        ctx.down = down
        return gate_TI.new_zeros(()).expand(*gate_TI.shape[:-1], down.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor, Tensor, None]:
        down = ctx.down
        weight_CI = down.unpack(grad_TC.dtype) if isinstance(down, QuantizedLinear) else down.weight
        return *_gradients(grad_TC @ weight_CI, *ctx.saved_tensors), None


def _gradients(grad_TI: Tensor, gate_TI: Tensor, up_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and up, from that of silu(gate) * up."""
    if _has_kernel(gate_TI):
        return _kernels().backward(grad_TI, gate_TI, up_TI)  # type: ignore[no-any-return]
    # In place where it can be, so that a forecast sees what the kernel takes: the two results.
    of_gate_TI = grad_TI * up_TI
    torch.ops.aten.silu_backward.grad_input(of_gate_TI, gate_TI, grad_input=of_gate_TI)
    return of_gate_TI, silu(gate_TI).mul_(grad_TI)


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in _KERNEL_DTYPES


def _kernels() -> Any:
    # Late: triton exists on machines with a GPU only.
    return import_module("restore.kernels.triton_swiglu")
