"""RMSNorm in one kernel forward and one backward, instead of the six and more that transformers' module launches.

Each module also keeps its input until backward once more, in fp32: by the forecast an eighth of what a layer of 7B keeps.
PyTorch's own fused operation takes its place, in the model that trains alone: what is measured and exported is untouched. It
multiplies by the weight before it rounds, so that a teacher on a GPU is the native model up to that rounding; elsewhere the
module's own operations run, in its order, and the teacher is the native model bit for bit.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def fuse(model: nn.Module) -> int:
    """Let the norms of `model` that compute what Llama's do run fused; returns how many did not before.

    transformers gives every family a copy of that class; others, as Gemma's, stay as they are.
    """
    norms = [module for module in model.modules() if _is_llamas(type(module)) and "forward" not in vars(module)]
    for norm in norms:
        norm.forward = partial(_normalise, norm)
    return len(norms)


def _is_llamas(kind: type[nn.Module]) -> bool:
    return kind.__name__.endswith("RMSNorm") and inspect.getsource(kind.forward) == inspect.getsource(LlamaRMSNorm.forward)


def _normalise(norm: Any, hidden: Tensor) -> Tensor:
    normed: Tensor = _Norm.apply(hidden, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return normed


class _Norm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension, in fp32 inside; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Any:
        if x.is_cuda:
            normed, inverse_rms = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, epsilon)
        else:
            wide = x.float()
            inverse_rms = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
            normed = weight * (wide * inverse_rms).to(x.dtype)
        ctx.save_for_backward(x, weight, inverse_rms)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        if x.is_cuda:
            of_x, _ = torch.ops.aten._fused_rms_norm_backward(
                gradient.contiguous(), x, [x.shape[-1]], inverse_rms, weight, [True, False]
            )
            return of_x, None, None
        normed, pull = x.float() * inverse_rms, (gradient * weight).float()
        of_x = inverse_rms * (pull - normed * (pull * normed).mean(-1, keepdim=True))
        return of_x.to(x.dtype), None, None
