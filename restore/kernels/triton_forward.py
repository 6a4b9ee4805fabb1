"""Forward kernel: one pass over a row tile's causal columns, student's and teacher's softmax online side by side.

Shapes: B batch, H query heads, G key heads, M rows, T columns, D head channels.

With running maxima m, sums l and the sum a of p_t * ((t - m_t) - (s - m_s)), KL = a / l_t - log l_t + log l_s.
The four lanes of a warp that share a row of the matrix unit's result each keep maxima and sums of their own columns, merged
at the end: the loop exchanges nothing between lanes.
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
    LN_2,
    LOG2_E,
    LOWEST,
    Tile,
    constants,
    head_start,
    load_tile,
    pick,
    step,
    unit_stride,
    view,
)


@triton.jit
def _advance(s, t, m_s, l_s, m_t, l_t, a, c_s, c_t, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EDGE: tl.constexpr):
    # [row, group of 8 columns, lane, pair]: how the matrix unit spreads a tile over lanes, so that no value moves.
    s = tl.reshape(s, (ROWS, COLUMNS // 8, 4, 2))
    t = tl.reshape(t, (ROWS, COLUMNS // 8, 4, 2))
    n_s = tl.maximum(m_s, tl.max(tl.max(s, 3), 1))
    n_t = tl.maximum(m_t, tl.max(tl.max(t, 3), 1))
    e_s = s * c_s - (n_s * c_s)[:, None, :, None]
    e_t = t * c_t - (n_t * c_t)[:, None, :, None]
    fall_s, fall_t = (m_s - n_s) * c_s, (m_t - n_t) * c_t
    p_t = tl.exp2(e_t)
    apart = e_t - e_s
    if EDGE:  # the difference of two masked logits is NaN
        apart = tl.where(p_t > 0, apart, 0.0)
    shrink_t = tl.exp2(fall_t)
    # Logits count from their maxima, in `a` too: no large numbers cancel.
    a = (a + l_t * (fall_t - fall_s)) * shrink_t + tl.sum(tl.sum(p_t * apart, 3), 1)
    l_s = l_s * tl.exp2(fall_s) + tl.sum(tl.sum(tl.exp2(e_s), 3), 1)
    l_t = l_t * shrink_t + tl.sum(tl.sum(p_t, 3), 1)
    return n_s, l_s, n_t, l_t, a


@triton.jit
def _merge(m, mass, c):
    top = tl.max(m, 1)
    fall = (m - top[:, None]) * c
    return top * c, fall, tl.sum(mass * tl.exp2(fall), 1)


@triton.jit
def _forward_kernel(
    q_s, k_s, q_t, k_t, kl, lse_s, lse_t, start, row,
    q_s_b, q_s_h, q_s_m, k_s_b, k_s_g, k_s_t, q_t_b, q_t_h, q_t_m, k_t_b, k_t_g, k_t_t,
    heads, shared, rows, columns, scale_s, scale_t,
    channels: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
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
    v_k_s = view(k_s, columns - 1, k_s_t, channels, COLUMNS, BLOCK_D, TMA)
    v_k_t = view(k_t, columns - 1, k_t_t, channels, COLUMNS, BLOCK_D, TMA)
    c_s, c_t = scale_s * LOG2_E, scale_t * LOG2_E

    o_row = first + tl.arange(0, ROWS)
    o_out = head.to(tl.int64) * rows + o_row
    i_row = tl.minimum(o_row, rows - 1)
    if row is not None:
        i_row = tl.load(row + head.to(tl.int64) * rows + i_row)
    begin, end = 0, tl.max(i_row) + 1
    plain = (tl.min(i_row) + 1) // COLUMNS * COLUMNS
    if start is not None:
        i_start = tl.load(start + i_b.to(tl.int64) * columns + i_row)
        begin = tl.min(i_start) // COLUMNS * COLUMNS
        plain = begin
    x_s = load_tile(q_s, first, rows - 1, q_s_m, channels, ROWS, BLOCK_D)
    x_t = load_tile(q_t, first, rows - 1, q_t_m, channels, ROWS, BLOCK_D)
    m_s = tl.full((ROWS, 4), LOWEST, tl.float32)
    m_t = tl.full((ROWS, 4), LOWEST, tl.float32)
    l_s = tl.zeros((ROWS, 4), tl.float32)
    l_t = tl.zeros((ROWS, 4), tl.float32)
    a = tl.zeros((ROWS, 4), tl.float32)

    for j in range(begin, plain, COLUMNS):
        y_s = step(v_k_s, j, columns - 1, k_s_t, channels, COLUMNS, BLOCK_D, TMA)
        y_t = step(v_k_t, j, columns - 1, k_t_t, channels, COLUMNS, BLOCK_D, TMA)
        s = tl.dot(x_s, tl.trans(y_s), input_precision=PRECISION)
        t = tl.dot(x_t, tl.trans(y_t), input_precision=PRECISION)
        m_s, l_s, m_t, l_t, a = _advance(s, t, m_s, l_s, m_t, l_t, a, c_s, c_t, ROWS, COLUMNS, False)
    for j in range(plain, end, COLUMNS):
        y_s = step(v_k_s, j, columns - 1, k_s_t, channels, COLUMNS, BLOCK_D, TMA)
        y_t = step(v_k_t, j, columns - 1, k_t_t, channels, COLUMNS, BLOCK_D, TMA)
        s = tl.dot(x_s, tl.trans(y_s), input_precision=PRECISION)
        t = tl.dot(x_t, tl.trans(y_t), input_precision=PRECISION)
        o_column = j + tl.arange(0, COLUMNS)
        visible = o_column[None, :] <= i_row[:, None]
        if start is not None:
            visible &= o_column[None, :] >= i_start[:, None]
        s = tl.where(visible, s, float("-inf"))
        t = tl.where(visible, t, float("-inf"))
        m_s, l_s, m_t, l_t, a = _advance(s, t, m_s, l_s, m_t, l_t, a, c_s, c_t, ROWS, COLUMNS, True)

    top_s, fall_s, sum_s = _merge(m_s, l_s, c_s)
    top_t, fall_t, sum_t = _merge(m_t, l_t, c_t)
    a = tl.sum((a + l_t * (fall_t - fall_s)) * tl.exp2(fall_t), 1)
    log_s, log_t = tl.log2(sum_s), tl.log2(sum_t)
    value = a / sum_t - log_t + log_s
    log_s, log_t = log_s + top_s, log_t + top_t
    if start is not None:
        # A row that sees nothing: exp(logit - inf) is 0, which spares backward a case of its own.
        value = tl.where(i_start <= i_row, value, 0.0)
        log_s = tl.where(i_start <= i_row, log_s, float("inf"))
        log_t = tl.where(i_start <= i_row, log_t, float("inf"))
    tl.store(kl + o_out, value * LN_2, mask=o_row < rows)
    tl.store(lse_s + o_out, log_s * LN_2, mask=o_row < rows)
    tl.store(lse_t + o_out, log_t * LN_2, mask=o_row < rows)


def forward(
    q_s_BHMD: Tensor,
    k_s_BGTD: Tensor,
    q_t_BHMD: Tensor,
    k_t_BGTD: Tensor,
    scales: tuple[float, float],
    spans: Spans | None,
    row_BHM: Tensor | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL of each row and the log-sum-exps of its student and teacher logits, each [B, H, M] fp32."""
    batch, heads, rows, _ = q_s_BHMD.shape
    groups, columns = k_s_BGTD.shape[1:3]
    inputs = unit_stride(q_s_BHMD, k_s_BGTD, q_t_BHMD, k_t_BGTD)
    kl_BHM, lse_s_BHM, lse_t_BHM = (q_s_BHMD.new_empty((batch, heads, rows), dtype=torch.float32) for _ in range(3))
    tile = pick("forward", q_s_BHMD, tile)
    arguments = (
        *inputs, kl_BHM, lse_s_BHM, lse_t_BHM, None if spans is None else spans.start_BT,
        None if row_BHM is None else row_BHM.contiguous(),
        *(stride for tensor in inputs for stride in tensor.stride()[:3]),
        heads, heads // groups, rows, columns, *scales,
    )  # fmt: skip
    launch(_forward_kernel, triton.cdiv(rows, tile.rows) * batch * heads, arguments, constants(tile, inputs), tile)
    return kl_BHM, lse_s_BHM, lse_t_BHM
