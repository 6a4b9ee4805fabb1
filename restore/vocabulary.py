"""Losses of next-token distributions without the logits of a window: a chunk of rows at a time, gradient and all.

The output head is frozen, so all that backward needs is the gradient of the hidden states, no larger than they are. It is taken
while a chunk's logits exist; keeping or recomputing them would cost memory or the head's products once more. On a GPU, all
between a chunk's logits and their gradient is compiled: eager, it reads and writes them in fp32 again and again.

Shapes: B batch, T tokens, N rows (any tokens), C hidden channels, V vocabulary.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

# Rows of logits that exist at once: 1024 rows of a 128K vocabulary in fp32 are 0.5 GiB.
LOGIT_ROWS = 1024

# From some rows' hidden states and which rows they are: their summed loss, and the mean's gradient with respect to the logits.
_Chunk = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
# The same from logits, which the caller does not hold on to: run eagerly, it frees them as soon as they are read.
_Pointwise = Callable[..., tuple[Tensor, Tensor]]
_log = logging.getLogger(__name__)
_can_compile = True


def logits_kl(student_BTC: Tensor, teacher_BTC: Tensor, head_VC: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student) of the next-token distributions: scalar fp32, gradient to the student."""
    teacher_NC = teacher_BTC.flatten(0, 1)
    weight = _share(teacher_NC)

    def chunk(student_NC: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        kl = _fused(_kl, student_NC)
        return kl(_logits(student_NC, head_VC), _logits(teacher_NC[rows], head_VC), weight, head_VC.dtype)

    return _mean(student_BTC.flatten(0, 1), head_VC, chunk)


def logits_kl_and_lm(
    student_BTC: Tensor, teacher_BTC: Tensor, ids_BT: Tensor, head_VC: Tensor, weights: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """`logits_kl` and `lm_loss` of the same hidden states from one pass of the student's logits.

    Returns:
        Their sum by `weights`, with a gradient to the student, and each by itself without one: scalars, fp32.
    """
    teacher_NC = teacher_BTC.flatten(0, 1)
    next_N1 = ids_BT.roll(-1, dims=1).reshape(-1, 1)
    # The last token of a text has no next; the others' mean is taken over all rows.
    has_next_BT = torch.full(ids_BT.shape, ids_BT.shape[1] / (ids_BT.shape[1] - 1), device=ids_BT.device)
    has_next_BT[:, -1] = 0
    has_next_N1 = has_next_BT.reshape(-1, 1)
    of_kl, of_lm = weights
    kl_weight, lm_weight = (_share(teacher_NC, weight) for weight in weights)
    sums = torch.zeros(2, device=ids_BT.device)

    def chunk(student_NC: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        kl_lm, grad_NV = _fused(_kl_and_lm, student_NC)(
            _logits(student_NC, head_VC),
            _logits(teacher_NC[rows], head_VC),
            next_N1[rows],
            has_next_N1[rows],
            kl_weight,
            lm_weight,
            head_VC.dtype,
        )
        sums.add_(kl_lm)
        return of_kl * kl_lm[0] + of_lm * kl_lm[1], grad_NV

    loss = _mean(student_BTC.flatten(0, 1), head_VC, chunk)
    kl, lm = sums / len(teacher_NC)
    return loss, kl, lm


def lm_loss(hidden_BTC: Tensor, ids_BT: Tensor, head_VC: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of whole windows: scalar fp32."""
    return token_loss(hidden_BTC[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), head_VC)


def token_loss(hidden_NC: Tensor, next_N: Tensor, head_VC: Tensor) -> Tensor:
    """Mean cross-entropy in nats of `next_N`, each told by its row: scalar fp32."""
    weight = _share(hidden_NC)

    def chunk(rows_NC: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return _fused(_lm, rows_NC)(_logits(rows_NC, head_VC), next_N[rows, None], weight, head_VC.dtype)

    return _mean(hidden_NC, head_VC, chunk)


# From a chunk's logits: the summed loss and the gradient, weighed while it is fp32; later, a weight would cost bits.


def _kl(student_NV: Tensor, teacher_NV: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student_NV = student_NV.log_softmax(-1, dtype=torch.float32)
    teacher_NV = teacher_NV.log_softmax(-1, dtype=torch.float32)
    probs_NV = teacher_NV.exp()
    kl = teacher_NV.sub_(student_NV).mul_(probs_NV).sum(-1).sum()
    return kl, student_NV.exp_().sub_(probs_NV).mul_(weight).to(dtype)


def _lm(logits_NV: Tensor, next_N1: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits_NV = logits_NV.log_softmax(-1, dtype=torch.float32)
    at_next_N1 = logits_NV.gather(1, next_N1)
    grad_NV = logits_NV.exp_().mul_(weight).to(dtype)
    return -at_next_N1.sum(), grad_NV.scatter_(1, next_N1, (at_next_N1.expm1() * weight).to(dtype))


def _kl_and_lm(
    student_NV: Tensor,
    teacher_NV: Tensor,
    next_N1: Tensor,
    has_next_N1: Tensor,
    kl_weight: Tensor,
    lm_weight: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    student_NV = student_NV.log_softmax(-1, dtype=torch.float32)
    teacher_NV = teacher_NV.log_softmax(-1, dtype=torch.float32)
    lm_weight_N1 = lm_weight * has_next_N1
    at_next_N1 = student_NV.gather(1, next_N1)
    of_kl_N1 = kl_weight * (at_next_N1.exp() - teacher_NV.gather(1, next_N1).exp())
    grad_at_next_N1 = of_kl_N1 + lm_weight_N1 * at_next_N1.expm1()
    probs_NV = teacher_NV.exp()
    kl = teacher_NV.sub_(student_NV).mul_(probs_NV).sum(-1).sum()
    grad_NV = student_NV.exp_().mul_(kl_weight + lm_weight_N1).sub_(probs_NV.mul_(kl_weight)).to(dtype)
    kl_lm = torch.stack([kl, -(at_next_N1 * has_next_N1).sum()])
    return kl_lm, grad_NV.scatter_(1, next_N1, grad_at_next_N1.to(dtype))


def _fused(pointwise: _Pointwise, rows_NC: Tensor) -> _Pointwise:
    """`pointwise` in few kernels, where rows' logits are on a GPU."""
    # Most chunks have one shape; those of another share a kernel, whatever their number of rows.
    return _compiled(pointwise, dynamic=len(rows_NC) != LOGIT_ROWS) if _compiles(rows_NC) else pointwise


def _compiles(rows_NC: Tensor) -> bool:
    return _can_compile and rows_NC.is_cuda and not isinstance(rows_NC, FakeTensor)


@cache
def _compiled(pointwise: _Pointwise, dynamic: bool) -> _Pointwise:
    compiled: _Pointwise = torch.compile(pointwise, dynamic=dynamic)

    def run(*given: Any) -> tuple[Tensor, Tensor]:
        global _can_compile
        try:
            return compiled(*given)
        except torch.OutOfMemoryError:
            raise
        # No Triton, no C compiler, or whatever else a machine lacks: then the step is slower, not lost.
        except Exception as error:  # noqa: BLE001
            if _can_compile:
                _log.warning("next-token losses run uncompiled, slower: %s: %.300s", type(error).__name__, error)
            _can_compile = False
            return pointwise(*given)

    return run


def _share(hidden_NC: Tensor, weight: float = 1.0) -> Tensor:
    """A row's weight in the mean, where the GPU is: a number would be compiled in, and another count of rows once more."""
    return hidden_NC.new_full((), weight / max(1, len(hidden_NC)), dtype=torch.float32)


def _logits(hidden_NC: Tensor, head_VC: Tensor) -> Tensor:
    if head_VC.is_cuda and head_VC.itemsize == 2:
        # The product is summed in fp32 anyway; rounded to bf16, logits would cost the KL's gradient most of its digits.
        return torch.mm(hidden_NC, head_VC.T, out_dtype=torch.float32)
    return linear(hidden_NC, head_VC)


def _mean(hidden_NC: Tensor, head_VC: Tensor, chunk: _Chunk) -> Tensor:
    mean: Tensor = _MeanOverRows.apply(hidden_NC, head_VC, chunk)  # type: ignore[no-untyped-call]
    return mean


class _MeanOverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, head_VC: Tensor, chunk: _Chunk) -> Tensor:
        count = len(hidden_NC)
        total = hidden_NC.new_zeros((), dtype=torch.float32)
        grad_NC = torch.empty_like(hidden_NC) if ctx.needs_input_grad[0] else None
        for at in range(0, count, LOGIT_ROWS):
            rows = slice(at, at + LOGIT_ROWS)
            loss, grad_NV = chunk(hidden_NC[rows], rows)
            total += loss
            if grad_NC is not None:
                torch.mm(grad_NV, head_VC, out=grad_NC[rows])
            # Before the next chunk's logits, or they would stand beside it.
            del grad_NV
        ctx.save_for_backward(grad_NC)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (grad_NC,) = ctx.saved_tensors
        return grad_NC * grad, None, None
