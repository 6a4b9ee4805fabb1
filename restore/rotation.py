"""RoPE of queries and of keys in one kernel each, forward and backward, instead of the five and more of transformers.

Attention keeps its own forward; of the functions that it calls by name, `apply_rotary_pos_emb` alone is another one, in the
model that trains alone. On a GPU the kernel rounds once where transformers' function rounds three times; elsewhere that
function runs.

Shapes: B batch, H query heads, G key heads, T tokens, D head channels.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama

_NAME = "apply_rotary_pos_emb"
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def fuse(model: nn.Module) -> int:
    """Let the attentions of `model` that rotate as Llama's do rotate fused; returns how many did not before."""
    attentions = [module for module in model.modules() if _is_llamas(type(module)) and "forward" not in vars(module)]
    for attention in attentions:
        forward: Any = type(attention).forward
        names = forward.__globals__ | {_NAME: _fused(forward.__globals__[_NAME])}
        ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        ours.__kwdefaults__ = forward.__kwdefaults__
        attention.forward = MethodType(ours, attention)
    return len(attentions)


def _is_llamas(kind: type[nn.Module]) -> bool:
    forward = kind.forward
    if (
        not kind.__name__.endswith("Attention")
        or not isinstance(forward, FunctionType)
        or _NAME not in forward.__code__.co_names
    ):
        return False
    theirs, llamas = forward.__globals__[_NAME], getattr(modeling_llama, _NAME)
    return isinstance(theirs, FunctionType) and inspect.getsource(theirs) == inspect.getsource(llamas)


def _fused(theirs: _Rotate) -> _Rotate:
    def rotate(query_BHTD: Tensor, key_BGTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> tuple[Tensor, Tensor]:
        if not (query_BHTD.is_cuda and query_BHTD.dtype == cos_BTD.dtype and query_BHTD.dtype in _KERNEL_DTYPES):
            return theirs(query_BHTD, key_BGTD, cos_BTD, sin_BTD)
        query, key = (_Rotation.apply(x, cos_BTD, sin_BTD) for x in (query_BHTD, key_BGTD))  # type: ignore[no-untyped-call]
        return query, key

    return rotate


class _Rotation(torch.autograd.Function):
    """x cos + rotate_half(x) sin; keeps nothing but the tables, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTD, sin_BTD)
        return _rotate(x_BHTD, cos_BTD, sin_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor, None, None]:
        cos_BTD, sin_BTD = ctx.saved_tensors
        return _rotate(grad_BHTD, cos_BTD, sin_BTD, back=True), None, None


def _rotate(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, back: bool = False) -> Tensor:
    # Late: triton exists on machines with a GPU only.
    rotated: Tensor = import_module("restore.kernels.triton_rotary").rotate(x_BHTD, cos_BTD, sin_BTD, back)
    return rotated
