"""The relation KL written out densely: every row's softmax at once, any dtype. The truth that the other backends are held to.

Shapes: B batch, H query heads, G key heads (H a multiple of G), M rows, T columns, D head channels.
"""

import torch
from torch import Tensor

from restore.kernels.documents import Spans


def relation_rows(
    q_s_BHMD: Tensor,
    k_s_BGTD: Tensor,
    q_t_BHMD: Tensor,
    k_t_BGTD: Tensor,
    scales: tuple[float, float],
    spans: Spans | None = None,
    row_BHM: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of each causal row: [B, H, M] in the input's dtype, 0 for a row that sees nothing.

    Memory grows with M * T; gradients come from autograd.
    """
    visible_BHMT = _visible(q_s_BHMD, k_s_BGTD.shape[2], spans, row_BHM)
    student_BHMT = _log_softmax(q_s_BHMD, k_s_BGTD, scales[0], visible_BHMT)
    teacher_BHMT = _log_softmax(q_t_BHMD, k_t_BGTD, scales[1], visible_BHMT)
    return (teacher_BHMT.exp() * (teacher_BHMT - student_BHMT)).masked_fill(~visible_BHMT, 0).sum(-1)


def _visible(q_BHMD: Tensor, columns: int, spans: Spans | None, row_BHM: Tensor | None) -> Tensor:
    batch, heads, rows, _ = q_BHMD.shape
    column_T = torch.arange(columns, device=q_BHMD.device)
    if row_BHM is None:
        row_BHM = torch.arange(rows, device=q_BHMD.device).expand(batch, heads, rows)
    visible_BHMT = column_T <= row_BHM[..., None]
    if spans is not None:
        start_BHM = spans.start_BT[:, None].expand(batch, heads, columns).gather(2, row_BHM.long())
        visible_BHMT = visible_BHMT & (column_T >= start_BHM[..., None])
    return visible_BHMT


def _log_softmax(q_BHMD: Tensor, k_BGTD: Tensor, scale: float, visible_BHMT: Tensor) -> Tensor:
    k_BHTD = k_BGTD.repeat_interleave(q_BHMD.shape[1] // k_BGTD.shape[1], dim=1)
    logits_BHMT = q_BHMD @ k_BHTD.transpose(2, 3) * scale
    # Finite, so that a row which sees nothing stays free of NaN in its gradient too.
    return logits_BHMT.masked_fill(~visible_BHMT, torch.finfo(logits_BHMT.dtype).min / 4).log_softmax(-1)
