"""The Triton kernels behind the names that `chunked` gives its functions."""

import torch
from torch import Tensor

from restore.kernels import triton_forward, triton_self_backward
from restore.kernels.documents import Spans
from restore.kernels.triton_key_backward import key_backward
from restore.kernels.triton_query_backward import query_backward
from restore.kernels.triton_tiles import reaches_by_bulk_copy

__all__ = ["backward", "forward", "self_backward"]


# Where the kernels for Hopper are faster, by `python -m restore.kernels.tune_hopper` (docs/results/kernel-hopper-h100.json): at
# 64 channels a tile's products are too short to hide anything behind.
_HOPPER_CHANNELS = 128


def forward(
    q_s_BHMD: Tensor,
    k_s_BGTD: Tensor,
    q_t_BHMD: Tensor,
    k_t_BGTD: Tensor,
    scales: tuple[float, float],
    spans: Spans | None,
    row_BHM: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL of each row and the log-sum-exps of its student and teacher logits, by the fastest kernel that can."""
    tensors = (q_s_BHMD, k_s_BGTD, q_t_BHMD, k_t_BGTD)
    if spans is None and row_BHM is None and _suits_hopper(tensors):
        # Late: Gluon is a younger part of triton than the rest.
        from restore.kernels.hopper_forward import hopper_forward

        return hopper_forward(*tensors, scales)
    return triton_forward.forward(*tensors, scales, spans, row_BHM)


def self_backward(
    grad_BHT: Tensor,
    x_s_BHTD: Tensor,
    x_t_BHTD: Tensor,
    lse_s_BHT: Tensor,
    lse_t_BHT: Tensor,
    scales: tuple[float, float],
    spans: Spans | None,
) -> Tensor:
    """Gradient of the student's tensor in a self-relation, by the fastest kernel that can."""
    tensors = (grad_BHT, x_s_BHTD, x_t_BHTD, lse_s_BHT, lse_t_BHT)
    if spans is None and _suits_hopper((x_s_BHTD, x_t_BHTD)):
        from restore.kernels.hopper_self_backward import hopper_self_backward

        return hopper_self_backward(*tensors, scales)
    return triton_self_backward.self_backward(*tensors, scales, spans)


def _suits_hopper(tensors: tuple[Tensor, ...]) -> bool:
    x_BHTD = tensors[0]
    fits = x_BHTD.dtype in (torch.bfloat16, torch.float16) and x_BHTD.shape[3] == _HOPPER_CHANNELS
    return fits and reaches_by_bulk_copy(tensors) and torch.cuda.get_device_capability(x_BHTD.device)[0] == 9


def backward(
    grad_BHM: Tensor,
    q_s_BHMD: Tensor,
    k_s_BGTD: Tensor,
    q_t_BHMD: Tensor,
    k_t_BGTD: Tensor,
    lse_s_BHM: Tensor,
    lse_t_BHM: Tensor,
    scales: tuple[float, float],
    spans: Spans | None,
    row_BHM: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the student's queries and keys, each by its own kernel."""
    tensors = (grad_BHM, q_s_BHMD, k_s_BGTD, q_t_BHMD, k_t_BGTD, lse_s_BHM, lse_t_BHM)
    return query_backward(*tensors, scales, spans, row_BHM), key_backward(*tensors, scales, spans, row_BHM)
