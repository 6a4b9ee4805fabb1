"""Gradient kernel of the self-relation: symmetric, so that each program owns rows of the gradient and nothing is shared.

Shapes: B batch, H heads, T tokens, D head channels.

s_ij = x_i x_j appears in row i's softmax for j <= i and in row j's for i <= j. A program that owns the rows i walks all j:
left of the diagonal with row i's log-sum-exps, right of it with row j's, on it with both; it accumulates
(p_s - p_t) x_j, weighted by the gradient of the row whose softmax it was. No atomics: deterministic.
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
def _self_backward_kernel(
    x_s, x_t, grad, lse_s, lse_t, dx, peak, start, end,
    x_s_b, x_s_h, x_s_t, x_t_b, x_t_h, x_t_t, dx_b, dx_h, dx_t,
    heads, tokens, scale_s, scale_t,
    channels: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, ROWS)
    first = (tl.program_id(0) % tiles) * ROWS
    head = tl.program_id(0) // tiles
    i_b, i_h = head // heads, head % heads
    x_s = head_start(x_s, i_b, i_h, x_s_b, x_s_h)
    x_t = head_start(x_t, i_b, i_h, x_t_b, x_t_h)
    dx = head_start(dx, i_b, i_h, dx_b, dx_h)
    lse_s += head.to(tl.int64) * tokens
    lse_t += head.to(tl.int64) * tokens
    grad += head.to(tl.int64) * tokens
    v_x_s = view(x_s, tokens - 1, x_s_t, channels, COLUMNS, BLOCK_D, TMA)
    v_x_t = view(x_t, tokens - 1, x_t_t, channels, COLUMNS, BLOCK_D, TMA)
    c_s, c_t = scale_s * LOG2_E, scale_t * LOG2_E

    o_row = first + tl.arange(0, ROWS)
    i_row = tl.minimum(o_row, tokens - 1)
    lse_s_i = (tl.load(lse_s + i_row) * LOG2_E - SHIFT)[:, None]
    lse_t_i = (tl.load(lse_t + i_row) * LOG2_E - SHIFT)[:, None]
    grad_i = tl.load(grad + i_row)[:, None]
    begin, stop = 0, tokens
    plain = first // COLUMNS * COLUMNS
    beyond = tl.minimum(tl.cdiv(first + ROWS, COLUMNS) * COLUMNS, tokens)
    if start is not None:
        start += i_b.to(tl.int64) * tokens
        end += i_b.to(tl.int64) * tokens
        i_start, i_end = tl.load(start + i_row), tl.load(end + i_row)
        begin = tl.minimum(tl.min(i_start) // COLUMNS * COLUMNS, plain)
        stop = tl.max(i_end)
    y_s = load_tile(x_s, first, tokens - 1, x_s_t, channels, ROWS, BLOCK_D)
    y_t = load_tile(x_t, first, tokens - 1, x_t_t, channels, ROWS, BLOCK_D)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)

    for j in range(begin, plain, COLUMNS):
        z_s = step(v_x_s, j, tokens - 1, x_s_t, channels, COLUMNS, BLOCK_D, TMA)
        z_t = step(v_x_t, j, tokens - 1, x_t_t, channels, COLUMNS, BLOCK_D, TMA)
        s = tl.dot(y_s, tl.trans(z_s), input_precision=PRECISION)
        t = tl.dot(y_t, tl.trans(z_t), input_precision=PRECISION)
        delta = difference(s, t, lse_s_i, lse_t_i, c_s, c_t)
        if start is not None:
            o_column = j + tl.arange(0, COLUMNS)
            delta = tl.where(o_column[None, :] >= i_start[:, None], delta, 0.0)
            z_s = tl.where((tl.load(end + o_column) > 0)[:, None], z_s, 0.0)
        acc = tl.dot(delta.to(z_s.dtype), z_s, acc, input_precision=PRECISION)
    acc *= grad_i
    for j in range(plain, beyond, COLUMNS):
        o_column = j + tl.arange(0, COLUMNS)
        j_row = tl.minimum(o_column, tokens - 1)
        z_s = step(v_x_s, j, tokens - 1, x_s_t, channels, COLUMNS, BLOCK_D, TMA)
        z_t = step(v_x_t, j, tokens - 1, x_t_t, channels, COLUMNS, BLOCK_D, TMA)
        s = tl.dot(y_s, tl.trans(z_s), input_precision=PRECISION)
        t = tl.dot(y_t, tl.trans(z_t), input_precision=PRECISION)
        below = o_column[None, :] <= o_row[:, None]
        above = (o_column[None, :] >= o_row[:, None]) & (o_column < tokens)[None, :]
        if start is not None:
            below &= o_column[None, :] >= i_start[:, None]
            above &= o_column[None, :] < i_end[:, None]
            z_s = tl.where((tl.load(end + j_row) > 0)[:, None], z_s, 0.0)
        lse_s_j = (tl.load(lse_s + j_row) * LOG2_E - SHIFT)[None, :]
        lse_t_j = (tl.load(lse_t + j_row) * LOG2_E - SHIFT)[None, :]
        grad_j = tl.load(grad + j_row)[None, :]
        delta = tl.where(below, difference(s, t, lse_s_i, lse_t_i, c_s, c_t) * grad_i, 0.0)
        delta += tl.where(above, difference(s, t, lse_s_j, lse_t_j, c_s, c_t) * grad_j, 0.0)
        acc = tl.dot(delta.to(z_s.dtype), z_s, acc, input_precision=PRECISION)
    for j in range(beyond, stop, COLUMNS):
        o_column = j + tl.arange(0, COLUMNS)
        inside = o_column < tokens
        z_s = step(v_x_s, j, tokens - 1, x_s_t, channels, COLUMNS, BLOCK_D, TMA)
        z_t = step(v_x_t, j, tokens - 1, x_t_t, channels, COLUMNS, BLOCK_D, TMA)
        # Beyond the last token an infinite log-sum-exp makes the tile 0: no mask on its logits.
        lse_s_j = (tl.load(lse_s + o_column, mask=inside, other=float("inf")) * LOG2_E - SHIFT)[None, :]
        lse_t_j = (tl.load(lse_t + o_column, mask=inside, other=float("inf")) * LOG2_E - SHIFT)[None, :]
        grad_j = tl.load(grad + o_column, mask=inside, other=0.0)[None, :]
        s = tl.dot(y_s, tl.trans(z_s), input_precision=PRECISION)
        t = tl.dot(y_t, tl.trans(z_t), input_precision=PRECISION)
        delta = difference(s, t, lse_s_j, lse_t_j, c_s, c_t) * grad_j
        if start is not None:
            delta = tl.where(o_column[None, :] < i_end[:, None], delta, 0.0)
            z_s = tl.where((tl.load(end + tl.minimum(o_column, tokens - 1)) > 0)[:, None], z_s, 0.0)
        acc = tl.dot(delta.to(z_s.dtype), z_s, acc, input_precision=PRECISION)

    unit = scale_s * tl.exp2(-1.0 * SHIFT)
    if peak is not None:
        unit *= tl.load(peak)
    o_channel = tl.arange(0, BLOCK_D)
    p_out = dx + first.to(tl.int64) * dx_t + tl.arange(0, ROWS)[:, None] * dx_t + o_channel[None, :]
    tl.store(p_out, (acc * unit).to(dx.dtype.element_ty), mask=(o_row < tokens)[:, None] & (o_channel < channels)[None, :])


def self_backward(
    grad_BHT: Tensor,
    x_s_BHTD: Tensor,
    x_t_BHTD: Tensor,
    lse_s_BHT: Tensor,
    lse_t_BHT: Tensor,
    scales: tuple[float, float],
    spans: Spans | None,
    tile: Tile | None = None,
) -> Tensor:
    """Gradient of the student's tensor in a self-relation, in its dtype and strides."""
    batch, heads, tokens, _ = x_s_BHTD.shape
    x_s_BHTD, x_t_BHTD = unit_stride(x_s_BHTD, x_t_BHTD)
    grad_BHT, peak, shift = normalise(grad_BHT, x_s_BHTD)
    dx_BHTD = torch.empty_like(x_s_BHTD)
    tile = pick("self_backward", x_s_BHTD, tile)
    arguments = (
        x_s_BHTD, x_t_BHTD, grad_BHT, lse_s_BHT, lse_t_BHT, dx_BHTD, peak, *((None, None) if spans is None else spans),
        *(stride for tensor in (x_s_BHTD, x_t_BHTD, dx_BHTD) for stride in tensor.stride()[:3]),
        heads, tokens, *scales,
    )  # fmt: skip
    launch(
        _self_backward_kernel,
        triton.cdiv(tokens, tile.rows) * batch * heads,
        arguments,
        constants(tile, (x_s_BHTD, x_t_BHTD)) | {"SHIFT": shift},
        tile,
    )
    return dx_BHTD
