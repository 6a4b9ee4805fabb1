"""Gradient kernel of the self-relation for Hopper, warp-specialised: products run beneath the exponentials.

Shapes: B batch, H heads, T tokens, D head channels.

The same walk as `triton_self_backward`, for whole rows without masks, arranged as in `hopper_forward`: one warp brings tiles,
two groups of four warps own 64 rows of the gradient each, twice as many as a program there, so that half as much is read.
"""

# Kernels are Triton's language, typed by its compiler.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from restore.kernels.hopper_forward import bring, copied, release
from restore.kernels.triton_launch import Argument, launch
from restore.kernels.triton_tiles import Tile, allow_descriptors, normalise

LOG2_E = gl.constexpr(1.4426950408889634)
# Rows of one group of warps, and columns of a tile.
SIDE = gl.constexpr(64)
# Tiles that lie ready: student, teacher, student, teacher and so on.
SLOTS = gl.constexpr(8)
# Where a tile lies from the rows of a program, and so whose softmax its logits belong to: the row's, both, the column's.
LEFT, DIAGONAL, RIGHT = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@gluon.jit
def _bring(d_s, d_t, own_tiles, tiles, own_ready, ready, free, first, blocks):
    mbarrier.expect(own_ready, 4 * d_s.block_type.nbytes)
    for half in gl.static_range(2):
        bring(d_s, [first + half * SIDE, 0], own_ready, own_tiles.index(half))
        bring(d_t, [first + half * SIDE, 0], own_ready, own_tiles.index(2 + half))
    # One more of the student, all zeros, for the product that is begun ahead in the last round.
    for k in range(2 * blocks + 1):
        slot = k % SLOTS
        mbarrier.wait(free.index(slot), (k // SLOTS % 2) ^ 1)
        mbarrier.expect(ready.index(slot), d_s.block_type.nbytes)
        if k % 2 == 0:
            bring(d_s, [k // 2 * SIDE, 0], ready.index(slot), tiles.index(slot))
        else:
            bring(d_t, [k // 2 * SIDE, 0], ready.index(slot), tiles.index(slot))


@gluon.jit
def _send(x_tile, tiles, ready, k, zero):
    slot = k % SLOTS
    mbarrier.wait(ready.index(slot), k // SLOTS % 2)
    return warpgroup_mma(x_tile, tiles.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _column(values, o_column, tokens, beyond):
    return gl.load(values + o_column, mask=o_column < tokens, other=beyond)[None, :]


@gluon.jit
def _round(own, rows, j, s, acc, zero, PLACE: gl.constexpr, SHIFT: gl.constexpr, HALF: gl.constexpr):
    own_tiles, tiles, ready, free, lse_s, lse_t, grad, tokens, c_s, c_t = own
    o_row, lse_s_i, lse_t_i, grad_i = rows
    o_column = j * SIDE + gl.arange(0, SIDE, layout=gl.SliceLayout(0, s.type.layout))
    if PLACE != LEFT:
        # Beyond the last token an infinite log-sum-exp makes the tile 0.
        lse_s_j = _column(lse_s, o_column, tokens, float("inf")) * LOG2_E - SHIFT
        lse_t_j = _column(lse_t, o_column, tokens, float("inf")) * LOG2_E - SHIFT
        grad_j = _column(grad, o_column, tokens, 0.0)
    t = _send(own_tiles.index(2 + HALF), tiles, ready, 2 * j + 1, zero)
    now = copied(s) * c_s
    ahead = _send(own_tiles.index(HALF), tiles, ready, 2 * j + 2, zero)
    if PLACE != RIGHT:
        by_row = gl.exp2(now - lse_s_i)
    if PLACE != LEFT:
        by_column = gl.exp2(now - lse_s_j)
    t = warpgroup_mma_wait(1, [t]) * c_t
    release(free.index((2 * j + 1) % SLOTS))
    if PLACE != RIGHT:
        delta = by_row - gl.exp2(t - lse_t_i)
    if PLACE == RIGHT:
        delta = (by_column - gl.exp2(t - lse_t_j)) * grad_j
    if PLACE == DIAGONAL:
        delta = gl.where(o_column[None, :] <= o_row[:, None], delta * grad_i, 0.0)
        above = (by_column - gl.exp2(t - lse_t_j)) * grad_j
        delta += gl.where(o_column[None, :] >= o_row[:, None], above, 0.0)
    z_tile = tiles.index(2 * j % SLOTS)
    half = gl.convert_layout(delta.to(z_tile.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    acc = warpgroup_mma(half, z_tile, acc, is_async=True)
    s, acc, half = warpgroup_mma_wait(0, [ahead, acc, half])
    release(free.index(2 * j % SLOTS))
    return s, acc


@gluon.jit
def _accumulate(own, own_ready, dx, dx_t, peak, unit, first, HALF: gl.constexpr, SHIFT: gl.constexpr, channels: gl.constexpr):
    own_tiles, tiles, ready, _free, lse_s, lse_t, grad, tokens, _c_s, _c_t = own
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, SIDE, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, channels, 16])
    o_row = first + HALF * SIDE + gl.arange(0, SIDE, layout=gl.SliceLayout(1, layout))
    i_row = gl.minimum(o_row, tokens - 1)
    lse_s_i = (gl.load(lse_s + i_row) * LOG2_E - SHIFT)[:, None]
    lse_t_i = (gl.load(lse_t + i_row) * LOG2_E - SHIFT)[:, None]
    rows = (o_row, lse_s_i, lse_t_i, gl.load(grad + i_row)[:, None])
    o_out = first + HALF * SIDE + gl.arange(0, SIDE, layout=gl.SliceLayout(1, wide))
    zero = gl.zeros((SIDE, SIDE), gl.float32, layout)
    acc = gl.zeros((SIDE, channels), gl.float32, wide)
    blocks = gl.cdiv(tokens, SIDE)
    diagonal = first // SIDE
    beyond = gl.minimum(diagonal + 2, blocks)

    mbarrier.wait(own_ready, 0)
    s = warpgroup_mma_wait(0, [_send(own_tiles.index(HALF), tiles, ready, 0, zero)])
    for j in range(diagonal):
        s, acc = _round(own, rows, j, s, acc, zero, LEFT, SHIFT, HALF)
    acc *= gl.load(grad + gl.minimum(o_out, tokens - 1))[:, None]
    for j in range(diagonal, beyond):
        s, acc = _round(own, rows, j, s, acc, zero, DIAGONAL, SHIFT, HALF)
    for j in range(beyond, blocks):
        s, acc = _round(own, rows, j, s, acc, zero, RIGHT, SHIFT, HALF)

    unit *= gl.exp2(-1.0 * SHIFT)
    if peak is not None:
        unit *= gl.load(peak)
    o_channel = gl.arange(0, channels, layout=gl.SliceLayout(0, wide))
    p_out = dx + o_out.to(gl.int64)[:, None] * dx_t + o_channel[None, :]
    gl.store(p_out, (acc * unit).to(dx.dtype.element_ty), mask=(o_out < tokens)[:, None])


@gluon.jit
def _hopper_self_backward_kernel(
    x_s, x_t, grad, lse_s, lse_t, dx, peak,
    x_s_b, x_s_h, x_s_t, x_t_b, x_t_h, x_t_t, dx_b, dx_h, dx_t,
    heads, tokens, scale_s, scale_t, channels: gl.constexpr, SHIFT: gl.constexpr,
):  # fmt: skip
    parts = gl.cdiv(tokens, 2 * SIDE)
    first = gl.program_id(0) % parts * 2 * SIDE
    head = gl.program_id(0) // parts
    i_b, i_h = (head // heads).to(gl.int64), (head % heads).to(gl.int64)
    dtype: gl.constexpr = x_s.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, channels], dtype)
    size = [tokens, channels]
    d_s = tma.make_tensor_descriptor(x_s + i_b * x_s_b + i_h * x_s_h, size, [x_s_t, 1], [SIDE, channels], layout)
    d_t = tma.make_tensor_descriptor(x_t + i_b * x_t_b + i_h * x_t_h, size, [x_t_t, 1], [SIDE, channels], layout)
    own_tiles = gl.allocate_shared_memory(dtype, [4, SIDE, channels], layout)
    tiles = gl.allocate_shared_memory(dtype, [SLOTS, SIDE, channels], layout)
    own_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(own_ready, count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)  # both groups must have read it
    row = head.to(gl.int64) * tokens
    own = (own_tiles, tiles, ready, free, lse_s + row, lse_t + row, grad + row, tokens, scale_s * LOG2_E, scale_t * LOG2_E)
    dx += i_b * dx_b + i_h * dx_h
    gl.warp_specialize(
        [
            (_accumulate, (own, own_ready, dx, dx_t, peak, scale_s, first, 0, SHIFT, channels)),
            (_accumulate, (own, own_ready, dx, dx_t, peak, scale_s, first, 1, SHIFT, channels)),
            (_bring, (d_s, d_t, own_tiles, tiles, own_ready, ready, free, first, gl.cdiv(tokens, SIDE))),
        ],
        [4, 1],
        [240, 24],
    )


def hopper_self_backward(
    grad_BHT: Tensor, x_s_BHTD: Tensor, x_t_BHTD: Tensor, lse_s_BHT: Tensor, lse_t_BHT: Tensor, scales: tuple[float, float]
) -> Tensor:
    """As `triton_self_backward.self_backward` without spans, for 64 or 128 channels of two bytes, 16-byte strides."""
    batch, heads, tokens, channels = x_s_BHTD.shape
    grad_BHT, peak, shift = normalise(grad_BHT, x_s_BHTD)
    dx_BHTD = torch.empty_like(x_s_BHTD)
    arguments: tuple[Argument, ...] = (
        x_s_BHTD, x_t_BHTD, grad_BHT, lse_s_BHT, lse_t_BHT, dx_BHTD, peak,
        *(stride for tensor in (x_s_BHTD, x_t_BHTD, dx_BHTD) for stride in tensor.stride()[:3]), heads, tokens, *scales,
    )  # fmt: skip
    allow_descriptors()
    tile = Tile(2 * SIDE.value, SIDE.value, 4, 1)
    programs = triton.cdiv(tokens, tile.rows) * batch * heads
    launch(_hopper_self_backward_kernel, programs, arguments, {"channels": channels, "SHIFT": shift}, tile)
    return dx_BHTD
