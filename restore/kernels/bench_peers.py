"""What the kernels are timed against: the same loss by other means, each called with (q_s, k_s, q_t, k_t) or (x_s, x_t).

Shapes: B batch, H query heads, G key heads, T tokens, D head channels.
"""

import sys
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from restore.kernels.reference import relation_rows

Loss = Callable[..., Tensor]
# Beyond, [T, T] of 32 heads no longer fits beside its copies.
DENSE_TOKENS = 4096
# Its time grows as the others' does: longer rows would tell nothing new.
FLEX_TOKENS = 16384
REFERENCE_TOKENS = (4096, 16384)


def peers(tokens: int, reference: Path | None) -> dict[str, Loss]:
    """The peers that can run at this length, by name; `reference` is a checkout of LinearARD."""
    # What is compiled belongs to the function, not to what torch.compile returns: after eight variants (recompile_limit) of all
    # shapes together it would run uncompiled without a word. Each call begins anew; `fullgraph` makes the limit an error.
    torch.compiler.reset()
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    found: dict[str, Loss] = {"flex": partial(flex, compiled(flex_attention))} if tokens <= FLEX_TOKENS else {}
    if tokens <= DENSE_TOKENS:
        found |= {"dense": dense, "compiled": compiled(dense)}
    if reference and tokens in REFERENCE_TOKENS:
        if str(reference) not in sys.path:
            sys.path.insert(0, str(reference))
        found["reference"] = partial(_linear_ard, import_module("kernels.attention_KL.integration").attn_kl_align)
    return found


def dense(*tensors: Tensor) -> Tensor:
    """Every [T, T] written out, in plain PyTorch."""
    q_s, k_s, q_t, k_t = _four(tensors)
    scale = q_s.shape[3] ** -0.5
    return relation_rows(q_s, k_s, q_t, k_t, (scale, scale)).mean()


def flex(attention: Callable[..., Any], *tensors: Tensor) -> Tensor:
    """By FlexAttention, exact and linear in memory too: its mean logit under the teacher is an attention output.

    sum_j p_t(i, j) q_s(i) k_s(j) = q_s(i) . attention(q_t, k_t, value = k_s)(i), so that KL follows from two attentions of the
    teacher, one of the student and the log-sum-exps that FlexAttention returns.
    """
    q_s, k_s, q_t, k_t = _four(tensors)
    scale = q_s.shape[3] ** -0.5
    options = {"block_mask": _causal(q_s.shape[2], q_s.device), "enable_gqa": q_s.shape[1] != k_s.shape[1]}
    with torch.no_grad():
        mean_k_t = attention(q_t, k_t, k_t, **options)
    mean_k_s, of_teacher = attention(q_t, k_t, k_s, **options, return_aux=AuxRequest(lse=True))
    _, of_student = attention(q_s, k_s, k_s.detach(), **options, return_aux=AuxRequest(lse=True))
    logits = (q_t.float() * mean_k_t.float()).sum(-1) - (q_s.float() * mean_k_s.float()).sum(-1)
    loss: Tensor = (scale * logits - of_teacher.lse + of_student.lse).mean()
    return loss


@cache
def _causal(tokens: int, device: torch.device) -> Any:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=str(device))


def _linear_ard(align: Loss, *tensors: Tensor) -> Tensor:
    # It knows no grouped-query heads: keys are copied for it, as its own pipeline does.
    q_s, k_s, q_t, k_t = _four(tensors)
    shared = q_s.shape[1] // k_s.shape[1]
    if shared > 1:
        k_s, k_t = k_s.repeat_interleave(shared, 1), k_t.repeat_interleave(shared, 1)
    return align(q_s, k_s, q_t, k_t)


def _four(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tensors if len(tensors) == 4 else (tensors[0], tensors[0], tensors[1], tensors[1])
