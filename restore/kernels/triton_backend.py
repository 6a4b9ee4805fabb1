"""The Triton kernels behind the names that `chunked` gives its functions."""

from torch import Tensor

from restore.kernels.documents import Spans
from restore.kernels.triton_forward import forward
from restore.kernels.triton_key_backward import key_backward
from restore.kernels.triton_query_backward import query_backward
from restore.kernels.triton_self_backward import self_backward

__all__ = ["backward", "forward", "self_backward"]


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
