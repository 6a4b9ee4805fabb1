"""Gradient kernel of the attention rows' keys: each program owns columns of dK and walks the rows that see them.

Shapes: B batch, H query heads, G key heads, M rows, T columns, D head channels.

All query heads that share a key head are walked by the same program: no atomics, no copy of K, deterministic.
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
)


# A constant number of rows (Triton makes one of a 1) would unroll the loop that it is asked to pipeline.
@triton.jit(do_not_specialize=["rows"])
def _key_backward_kernel(
    q_s, k_s, q_t, k_t, grad, lse_s, lse_t, dk, peak, start, row, from_row,
    q_s_b, q_s_h, q_s_m, k_s_b, k_s_g, k_s_t, q_t_b, q_t_h, q_t_m, k_t_b, k_t_g, k_t_t, dk_b, dk_g, dk_t,
    groups, shared, rows, columns, scale_s, scale_t,
    channels: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    # Here a program's own ROWS are keys and the COLUMNS of its loop are queries.
    tiles = tl.cdiv(columns, ROWS)
    i_tile = tl.program_id(0) % tiles
    first = i_tile * ROWS
    group = tl.program_id(0) // tiles
    i_b, i_g = group // groups, group % groups
    k_s = head_start(k_s, i_b, i_g, k_s_b, k_s_g)
    k_t = head_start(k_t, i_b, i_g, k_t_b, k_t_g)
    dk = head_start(dk, i_b, i_g, dk_b, dk_g)
    c_s, c_t = scale_s * LOG2_E, scale_t * LOG2_E

    o_key = first + tl.arange(0, ROWS)
    y_s = load_tile(k_s, first, columns - 1, k_s_t, channels, ROWS, BLOCK_D)
    y_t = load_tile(k_t, first, columns - 1, k_t_t, channels, ROWS, BLOCK_D)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for member in range(shared):
        i_h = i_g * shared + member
        x_s_head = head_start(q_s, i_b, i_h, q_s_b, q_s_h)
        x_t_head = head_start(q_t, i_b, i_h, q_t_b, q_t_h)
        v_x_s_head = view(x_s_head, rows - 1, q_s_m, channels, COLUMNS, BLOCK_D, TMA)
        v_x_t_head = view(x_t_head, rows - 1, q_t_m, channels, COLUMNS, BLOCK_D, TMA)
        head = i_b.to(tl.int64) * groups * shared + i_h
        begin = first // COLUMNS * COLUMNS
        if row is not None:
            begin = tl.load(from_row + head * tiles + i_tile) // COLUMNS * COLUMNS
        for i in range(begin, rows, COLUMNS):
            o_row = i + tl.arange(0, COLUMNS)
            inside = o_row < rows
            x_s = step(v_x_s_head, i, rows - 1, q_s_m, channels, COLUMNS, BLOCK_D, TMA)
            x_t = step(v_x_t_head, i, rows - 1, q_t_m, channels, COLUMNS, BLOCK_D, TMA)
            # Beyond the last row an infinite log-sum-exp makes the tile 0.
            lse_s_i = (tl.load(lse_s + head * rows + o_row, mask=inside, other=float("inf")) * LOG2_E - SHIFT)[None, :]
            lse_t_i = (tl.load(lse_t + head * rows + o_row, mask=inside, other=float("inf")) * LOG2_E - SHIFT)[None, :]
            grad_i = tl.load(grad + head * rows + o_row, mask=inside, other=0.0)[None, :]
            s = tl.dot(y_s, tl.trans(x_s), input_precision=PRECISION)
            t = tl.dot(y_t, tl.trans(x_t), input_precision=PRECISION)
            delta = difference(s, t, lse_s_i, lse_t_i, c_s, c_t) * grad_i
            i_row = tl.minimum(o_row, rows - 1)
            if row is not None:
                i_row = tl.load(row + head * rows + i_row)
            visible = o_key[:, None] <= i_row[None, :]
            if start is not None:
                i_start = tl.load(start + i_b.to(tl.int64) * columns + i_row)
                visible &= o_key[:, None] >= i_start[None, :]
                # What padding holds, NaN included, must not reach the product.
                x_s = tl.where((i_start <= i_row)[:, None], x_s, 0.0)
            acc = tl.dot(tl.where(visible, delta, 0.0).to(x_s.dtype), x_s, acc, input_precision=PRECISION)

    unit = scale_s * tl.exp2(-1.0 * SHIFT)
    if peak is not None:
        unit *= tl.load(peak)
    o_channel = tl.arange(0, BLOCK_D)
    p_out = dk + first.to(tl.int64) * dk_t + tl.arange(0, ROWS)[:, None] * dk_t + o_channel[None, :]
    tl.store(p_out, (acc * unit).to(dk.dtype.element_ty), mask=(o_key < columns)[:, None] & (o_channel < channels)[None, :])


def key_backward(
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
    """Gradient of the student's keys, in their dtype and strides. `row_BHM` must ascend along M."""
    batch, heads, rows, _ = q_s_BHMD.shape
    groups, columns = k_s_BGTD.shape[1:3]
    inputs = unit_stride(q_s_BHMD, k_s_BGTD, q_t_BHMD, k_t_BGTD)
    grad_BHM, peak, shift = normalise(grad_BHM, q_s_BHMD)
    dk_BGTD = torch.empty_like(inputs[1])
    tile = pick("key_backward", q_s_BHMD, tile)
    tiles = triton.cdiv(columns, tile.rows)
    from_row = None
    if row_BHM is not None:
        row_BHM = row_BHM.contiguous()
        edge = torch.arange(0, tiles * tile.rows, tile.rows, device=row_BHM.device, dtype=row_BHM.dtype)
        from_row = torch.searchsorted(row_BHM, edge.expand(batch, heads, tiles).contiguous(), out_int32=True)
    arguments = (
        *inputs, grad_BHM, lse_s_BHM, lse_t_BHM, dk_BGTD, peak, None if spans is None else spans.start_BT, row_BHM, from_row,
        *(stride for tensor in (*inputs, dk_BGTD) for stride in tensor.stride()[:3]),
        groups, heads // groups, rows, columns, *scales,
    )  # fmt: skip
    launch(_key_backward_kernel, tiles * batch * groups, arguments, constants(tile, inputs) | {"SHIFT": shift}, tile)
    return dk_BGTD
