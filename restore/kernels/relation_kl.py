"""The public functions: how far a student's attention relations are from a teacher's.

A relation is a causal row softmax of scaled dot products: P = softmax(X X^T * scale) for one tensor with itself (LinearARD,
arXiv 2604.00004), or softmax(Q K^T * scale) for the attention rows. The loss is KL(P_teacher || P_student) of each row.
[T, T] is never stored: memory is linear in T. CPU tensors are computed in chunks, CUDA tensors by Triton kernels.

Shapes: B batch, H query heads, G key heads (H a multiple of G), T tokens, M sampled rows, D head channels.
"""

from typing import Literal

import torch
from torch import Tensor

from ard_serve.errors import UsageError
from restore.kernels import ops
from restore.kernels.documents import Spans, spans_of_lengths, spans_of_mask
from restore.kernels.sampling import sample_rows, take_rows

Reduction = Literal["mean", "sum", "head", "none"]


def self_relation_kl(
    x_s_BHTD: Tensor,
    x_t_BHTD: Tensor,
    *,
    scale: float | None = None,
    teacher_scale: float | None = None,
    reduction: Reduction = "mean",
    mask_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rows: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """KL between the self-relations of a teacher's and a student's tensor: queries, keys or values.

    Args:
        x_s_BHTD: the student's [B, H, T, D], any strides; the gradient has its shape and dtype.
        x_t_BHTD: the teacher's, same shape; no gradient reaches it.
        scale: factor on the dot products; default D**-0.5.
        teacher_scale: the same for the teacher; default `scale`.
        reduction: "mean" over all heads and valid rows (scalar); "sum"; "head" means over valid rows ([H]);
            "none" ([B, H, T] in nats, 0 at rows that are padding).
        mask_BT: true at tokens, false at padding, left or right; every unbroken run of true is a document of its own.
        cu_seqlens: instead of a mask, [N + 1] cumulative lengths of documents packed into a batch of one.
        rows: compute this many random rows of each head only (one from each of as many equal stretches of T): an unbiased
            estimate in O(rows * T).
        generator: the random numbers for `rows`.

    Returns:
        The loss in nats: fp32, or fp64 for fp64 inputs.

    Raises:
        UsageError: shapes, mask, lengths or sample size that do not fit together.
    """
    if rows is not None:
        return cross_relation_kl(
            x_s_BHTD, x_s_BHTD, x_t_BHTD, x_t_BHTD, scale=scale, teacher_scale=teacher_scale, reduction=reduction,
            mask_BT=mask_BT, cu_seqlens=cu_seqlens, rows=rows, generator=generator,
        )  # fmt: skip
    _check(x_s_BHTD, x_s_BHTD, x_t_BHTD, x_t_BHTD, reduction)
    scales = _scales(scale, teacher_scale, x_s_BHTD.shape[3])
    spans = _spans(x_s_BHTD, mask_BT, cu_seqlens)
    x_s_BHTD, x_t_BHTD = _one_dtype(x_s_BHTD, x_t_BHTD.detach())
    kl_BHT, _, _ = ops.self_rows(x_s_BHTD, x_t_BHTD, *scales, *_parts(spans))
    return _reduce(kl_BHT, reduction, spans)


def cross_relation_kl(
    q_s_BHTD: Tensor,
    k_s_BGTD: Tensor,
    q_t_BHTD: Tensor,
    k_t_BGTD: Tensor,
    *,
    scale: float | None = None,
    teacher_scale: float | None = None,
    reduction: Reduction = "mean",
    mask_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rows: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """KL between the attention rows of a teacher and a student, softmax(Q K^T * scale), with grouped-query heads.

    Args:
        q_s_BHTD: the student's queries [B, H, T, D], any strides.
        k_s_BGTD: the student's keys [B, G, T, D]; query head h reads key head h // (H / G), and no key is copied.
        q_t_BHTD: the teacher's queries; no gradient reaches them.
        k_t_BGTD: the teacher's keys; no gradient reaches them.
        scale: as in `self_relation_kl`, and so are all further arguments, the result and the errors.
    """
    _check(q_s_BHTD, k_s_BGTD, q_t_BHTD, k_t_BGTD, reduction)
    scales = _scales(scale, teacher_scale, q_s_BHTD.shape[3])
    spans = _spans(q_s_BHTD, mask_BT, cu_seqlens)
    q_s_BHTD, k_s_BGTD, q_t_BHTD, k_t_BGTD = _one_dtype(q_s_BHTD, k_s_BGTD, q_t_BHTD.detach(), k_t_BGTD.detach())
    if rows is None:
        kl_BHT, _, _ = ops.cross_rows(q_s_BHTD, k_s_BGTD, q_t_BHTD, k_t_BGTD, *scales, *_parts(spans), None)
        return _reduce(kl_BHT, reduction, spans)
    tokens = q_s_BHTD.shape[2]
    if not 1 <= rows <= tokens or reduction == "none":
        raise UsageError(f'rows = {rows}, reduction = "{reduction}": sample 1 to {tokens} rows, and reduce them')
    row_BHM, weight_M = sample_rows(q_s_BHTD, rows, generator)
    q_s_BHMD, q_t_BHMD = take_rows(q_s_BHTD, row_BHM), take_rows(q_t_BHTD, row_BHM)
    kl_BHM, _, _ = ops.cross_rows(q_s_BHMD, k_s_BGTD, q_t_BHMD, k_t_BGTD, *scales, *_parts(spans), row_BHM)
    return _reduce(kl_BHM * weight_M, reduction, spans, tokens)


def _reduce(kl_BHM: Tensor, reduction: Reduction, spans: Spans | None, tokens: int | None = None) -> Tensor:
    if reduction == "none":
        return kl_BHM
    if reduction == "sum":
        return kl_BHM.sum()
    batch, heads, rows = kl_BHM.shape
    tokens = tokens or rows
    if spans is None and tokens == rows:  # one operation less each way, on the host and on the device
        return kl_BHM.mean((0, 2)) if reduction == "head" else kl_BHM.mean()
    valid = batch * tokens if spans is None else (spans.end_BT > 0).sum().clamp(min=1)
    return kl_BHM.sum((0, 2)) / valid if reduction == "head" else kl_BHM.sum() / (valid * heads)


def _scales(scale: float | None, teacher_scale: float | None, channels: int) -> tuple[float, float]:
    student = channels**-0.5 if scale is None else float(scale)
    return student, student if teacher_scale is None else float(teacher_scale)


def _spans(q_BHTD: Tensor, mask_BT: Tensor | None, cu_seqlens: Tensor | None) -> Spans | None:
    batch, _, tokens, _ = q_BHTD.shape
    if mask_BT is not None and cu_seqlens is not None:
        raise UsageError("mask_BT and cu_seqlens given: both say where documents are; give one")
    if mask_BT is not None:
        if mask_BT.shape != (batch, tokens):
            raise UsageError(f"mask_BT {list(mask_BT.shape)}: must be [{batch}, {tokens}], one value per token")
        return spans_of_mask(mask_BT)
    if cu_seqlens is None:
        return None
    if batch != 1 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        shape = list(cu_seqlens.shape)
        raise UsageError(f"cu_seqlens {shape} with batch {batch}: needs [documents + 1] lengths and a batch of 1")
    return spans_of_lengths(cu_seqlens, tokens)


def _parts(spans: Spans | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if spans is None else (spans.start_BT, spans.end_BT)


def _one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _check(q_s_BHTD: Tensor, k_s_BGTD: Tensor, q_t_BHTD: Tensor, k_t_BGTD: Tensor, reduction: str) -> None:
    shapes = [list(tensor.shape) for tensor in (q_s_BHTD, k_s_BGTD, q_t_BHTD, k_t_BGTD)]
    query, key = shapes[:2]
    fits = len(query) == 4 and len(key) == 4 and query[0] == key[0] and query[2:] == key[2:] and all(query) and all(key)
    if shapes[2:] != shapes[:2] or not fits or query[1] % key[1]:
        raise UsageError(
            f"relation tensors {shapes}: student and teacher need the same [batch, heads, tokens, channels], none of them 0, "
            "with as many query heads as key heads or a multiple"
        )
    if not all(tensor.is_floating_point() for tensor in (q_s_BHTD, k_s_BGTD, q_t_BHTD, k_t_BGTD)):
        raise UsageError(f"relation tensors of {q_s_BHTD.dtype}: must be floating point")
    if reduction not in ("mean", "sum", "head", "none"):
        raise UsageError(f'reduction = "{reduction}": must be "mean", "sum", "head" or "none"')
