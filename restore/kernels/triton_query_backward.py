"""Gradient kernel of the attention rows' queries: each program owns rows of dQ and walks their causal columns.

Shapes: B batch, H query heads, G key heads, M rows, T columns, D head channels.
"""

# Kernels are Triton's language, typed by its compiler.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from restore.kernels.documents import Spans
from restore.kernels.triton_launch import launch
from restore.kernels.triton_tiles import (
    LOG2_E,
    Tile,
    constants,
    difference,
    head_start,
    load_tile,
    normalise,
    pick,
    step,
    unit_stride,
    view,
)  # fmt: skip


@triton.jit
def _query_backward_kernel(
    q_s, k_s, q_t, k_t, grad, lse_s, lse_t, dq, peak, start, end, row,
    q_s_b, q_s_h, q_s_m, k_s_b, k_s_g, k_s_t, q_t_b, q_t_h, q_t_m, k_t_b, k_t_g, k_t_t, dq_b, dq_h, dq_m,
    heads, shared, rows, columns, scale_s, scale_t,
    channels: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, ROWS)
    # The longest rows first: what is left at the end is short.
    first = (tiles - 1 - tl.program_id(0) % tiles) * ROWS
    head = tl.program_id(0) // tiles
    i_b, i_h = head // heads, head % heads
    q_s = head_start(q_s, i_b, i_h, q_s_b, q_s_h)
    q_t = head_start(q_t, i_b, i_h, q_t_b, q_t_h)
    k_s = head_start(k_s, i_b, i_h // shared, k_s_b, k_s_g)
    k_t = head_start(k_t, i_b, i_h // shared, k_t_b, k_t_g)
    dq = head_start(dq, i_b, i_h, dq_b, dq_h)
    v_k_s = view(k_s, columns - 1, k_s_t, channels, COLUMNS, BLOCK_D, TMA)
    v_k_t = view(k_t, columns - 1, k_t_t, channels, COLUMNS, BLOCK_D, TMA)
    c_s, c_t = scale_s * LOG2_E, scale_t * LOG2_E

    o_row = first + tl.arange(0, ROWS)
    o_in = head.to(tl.int64) * rows + tl.minimum(o_row, rows - 1)
    i_row = tl.minimum(o_row, rows - 1)
    if row is not None:
        i_row = tl.load(row + o_in)
    lse_s_i = (tl.load(lse_s + o_in) * LOG2_E - SHIFT)[:, None]
    lse_t_i = (tl.load(lse_t + o_in) * LOG2_E - SHIFT)[:, None]
    begin, stop = 0, tl.max(i_row) + 1
    plain = (tl.min(i_row) + 1) // COLUMNS * COLUMNS
    if start is not None:
        i_start = tl.load(start + i_b.to(tl.int64) * columns + i_row)
        end += i_b.to(tl.int64) * columns
        begin = tl.min(i_start) // COLUMNS * COLUMNS
        plain = begin
    x_s = load_tile(q_s, first, rows - 1, q_s_m, channels, ROWS, BLOCK_D)
    x_t = load_tile(q_t, first, rows - 1, q_t_m, channels, ROWS, BLOCK_D)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)

    for j in range(begin, plain, COLUMNS):
        y_s = step(v_k_s, j, columns - 1, k_s_t, channels, COLUMNS, BLOCK_D, TMA)
        y_t = step(v_k_t, j, columns - 1, k_t_t, channels, COLUMNS, BLOCK_D, TMA)
        s = tl.dot(x_s, tl.trans(y_s), input_precision=PRECISION)
        t = tl.dot(x_t, tl.trans(y_t), input_precision=PRECISION)
        delta = difference(s, t, lse_s_i, lse_t_i, c_s, c_t)
        acc = tl.dot(delta.to(y_s.dtype), y_s, acc, input_precision=PRECISION)
    for j in range(plain, stop, COLUMNS):
        o_column = j + tl.arange(0, COLUMNS)
        y_s = step(v_k_s, j, columns - 1, k_s_t, channels, COLUMNS, BLOCK_D, TMA)
        y_t = step(v_k_t, j, columns - 1, k_t_t, channels, COLUMNS, BLOCK_D, TMA)
        s = tl.dot(x_s, tl.trans(y_s), input_precision=PRECISION)
        t = tl.dot(x_t, tl.trans(y_t), input_precision=PRECISION)
        visible = o_column[None, :] <= i_row[:, None]
        if start is not None:
            visible &= o_column[None, :] >= i_start[:, None]
            # What padding holds, NaN included, must not reach the product.
            y_s = tl.where((tl.load(end + tl.minimum(o_column, columns - 1)) > 0)[:, None], y_s, 0.0)
        delta = tl.where(visible, difference(s, t, lse_s_i, lse_t_i, c_s, c_t), 0.0)
        acc = tl.dot(delta.to(y_s.dtype), y_s, acc, input_precision=PRECISION)

    unit = tl.load(grad + o_in) * scale_s * tl.exp2(-1.0 * SHIFT)
    if peak is not None:
        unit *= tl.load(peak)
    o_channel = tl.arange(0, BLOCK_D)
    p_out = dq + first.to(tl.int64) * dq_m + tl.arange(0, ROWS)[:, None] * dq_m + o_channel[None, :]
    value = (acc * unit[:, None]).to(dq.dtype.element_ty)
    tl.store(p_out, value, mask=(o_row < rows)[:, None] & (o_channel < channels)[None, :])


def query_backward(
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
    tile: Tile | None = None,
) -> Tensor:
    """Gradient of the student's queries, in their dtype and strides."""
    batch, heads, rows, _ = q_s_BHMD.shape
    groups, columns = k_s_BGTD.shape[1:3]
    inputs = unit_stride(q_s_BHMD, k_s_BGTD, q_t_BHMD, k_t_BGTD)
    grad_BHM, peak, shift = normalise(grad_BHM, q_s_BHMD)
    dq_BHMD = torch.empty_like(inputs[0])
    tile = pick("query_backward", q_s_BHMD, tile)
    arguments = (
        *inputs, grad_BHM, lse_s_BHM, lse_t_BHM, dq_BHMD, peak, *((None, None) if spans is None else spans),
        None if row_BHM is None else row_BHM.contiguous(),
        *(stride for tensor in (*inputs, dq_BHMD) for stride in tensor.stride()[:3]),
        heads, heads // groups, rows, columns, *scales,
    )  # fmt: skip
    launch(
        _query_backward_kernel,
        triton.cdiv(rows, tile.rows) * batch * heads,
        arguments,
        constants(tile, inputs) | {"SHIFT": shift},
        tile,
    )
    return dq_BHMD
