"""Losses of next-token distributions without the logits of a window: a chunk of rows at a time, gradient and all.

The output head is frozen, so all that backward needs is the gradient of the hidden states, no larger than they are. It is taken
while a chunk's logits exist; keeping or recomputing them would cost memory or the head's products once more.

Shapes: B batch, T tokens, N rows (any tokens), C hidden channels, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

# Rows of logits that exist at once: 1024 rows of a 128K vocabulary in fp32 are 0.5 GiB.
LOGIT_ROWS = 1024

# From log-probabilities of some rows (fp32, may be overwritten) and which rows they are: the summed loss, and its gradient with
# respect to the logits.
_Chunk = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def logits_kl(student_BTC: Tensor, teacher_BTC: Tensor, head_VC: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student) of the next-token distributions: scalar fp32, gradient to the student."""
    teacher_NC = teacher_BTC.flatten(0, 1)

    def chunk(student_NV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        teacher_NV = _log_probs(teacher_NC[rows], head_VC)
        probs_NV = teacher_NV.exp()
        loss = teacher_NV.sub_(student_NV).mul_(probs_NV).sum()
        return loss, student_NV.exp_().sub_(probs_NV)

    return _mean(student_BTC.flatten(0, 1), head_VC, chunk)


def logits_kl_and_lm(
    student_BTC: Tensor, teacher_BTC: Tensor, ids_BT: Tensor, head_VC: Tensor, weights: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """`logits_kl` and `lm_loss` of the same hidden states from one pass of the student's logits.

    Returns:
        Their sum by `weights`, with a gradient to the student, and each by itself without one: scalars, fp32.
    """
    teacher_NC = teacher_BTC.flatten(0, 1)
    # The last token of a text has no next; the others' mean is taken over all rows.
    next_N1 = ids_BT.roll(-1, dims=1).reshape(-1, 1)
    has_next_BT = torch.full(ids_BT.shape, ids_BT.shape[1] / (ids_BT.shape[1] - 1), device=ids_BT.device)
    has_next_BT[:, -1] = 0
    has_next_N1 = has_next_BT.reshape(-1, 1)
    of_kl, of_lm = weights
    sums = torch.zeros(2, device=ids_BT.device)

    def chunk(student_NV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        teacher_NV = _log_probs(teacher_NC[rows], head_VC)
        reads_N1 = has_next_N1[rows]
        lm = -(student_NV.gather(1, next_N1[rows]) * reads_N1).sum()
        probs_NV = teacher_NV.exp()
        kl = teacher_NV.sub_(student_NV).mul_(probs_NV).sum()
        sums.add_(torch.stack([kl, lm]))
        grad_NV = student_NV.exp_().mul_(of_kl + of_lm * reads_N1).sub_(probs_NV, alpha=of_kl)
        return of_kl * kl + of_lm * lm, grad_NV.scatter_add_(1, next_N1[rows], -of_lm * reads_N1)

    loss = _mean(student_BTC.flatten(0, 1), head_VC, chunk)
    kl, lm = sums / len(teacher_NC)
    return loss, kl, lm


def lm_loss(hidden_BTC: Tensor, ids_BT: Tensor, head_VC: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of whole windows: scalar fp32."""
    return token_loss(hidden_BTC[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), head_VC)


def token_loss(hidden_NC: Tensor, next_N: Tensor, head_VC: Tensor) -> Tensor:
    """Mean cross-entropy in nats of `next_N`, each told by its row: scalar fp32."""

    def chunk(log_probs_NV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        next_N1 = next_N[rows, None]
        loss = -log_probs_NV.gather(1, next_N1).sum()
        minus_one_N1 = torch.full_like(next_N1, -1, dtype=log_probs_NV.dtype)
        return loss, log_probs_NV.exp_().scatter_add_(1, next_N1, minus_one_N1)

    return _mean(hidden_NC, head_VC, chunk)


def _mean(hidden_NC: Tensor, head_VC: Tensor, chunk: _Chunk) -> Tensor:
    mean: Tensor = _MeanOverRows.apply(hidden_NC, head_VC, chunk)  # type: ignore[no-untyped-call]
    return mean


def _log_probs(hidden_NC: Tensor, head_VC: Tensor) -> Tensor:
    return linear(hidden_NC, head_VC).log_softmax(-1, dtype=torch.float32)


class _MeanOverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, head_VC: Tensor, chunk: _Chunk) -> Tensor:
        count = len(hidden_NC)
        total = hidden_NC.new_zeros((), dtype=torch.float32)
        grad_NC = torch.empty_like(hidden_NC) if ctx.needs_input_grad[0] else None
        for at in range(0, count, LOGIT_ROWS):
            rows = slice(at, at + LOGIT_ROWS)
            loss, grad_NV = chunk(_log_probs(hidden_NC[rows], head_VC), rows)
            total += loss
            if grad_NC is not None:
                # Divided while it is fp32: the mean's weight of a row would cost bits later.
                torch.mm(grad_NV.div_(count).to(head_VC.dtype), head_VC, out=grad_NC[rows])
        ctx.save_for_backward(grad_NC)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (grad_NC,) = ctx.saved_tensors
        return grad_NC * grad, None, None
