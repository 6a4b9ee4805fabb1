"""Forward kernel for Hopper, warp-specialised: products of one column tile run beneath the exponentials of the one before.

Shapes: B batch, H query heads, G key heads, T tokens, D head channels.

The same sums as `triton_forward`, for whole rows without masks. One warp brings tiles by the bulk copy engine, two groups of
four warps own 64 rows each. A group sends the student's product for column tile j + 1 to the matrix unit, then takes the
exponentials of tile j. Triton proper waits for every product where it is issued; Gluon, its lower level, leaves that to us.
"""

# Kernels are Triton's language, typed by its compiler.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from restore.kernels.triton_launch import Argument, launch
from restore.kernels.triton_tiles import Tile, allow_descriptors

# Renamed after triton 3.6.
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
bring = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-1e30)
# Rows of one group of warps; columns of a tile, as many as both groups have rows, so that the diagonal is one tile.
ROWS = gl.constexpr(64)
COLUMNS = gl.constexpr(128)
# Tiles that lie ready: student, teacher, student, teacher.
SLOTS = gl.constexpr(4)


@gluon.jit
def _bring(d_q_s, d_q_t, d_k_s, d_k_t, q_tiles, k_tiles, q_ready, ready, free, first, blocks):
    mbarrier.expect(q_ready, 2 * 2 * d_q_s.block_type.nbytes)
    for half in gl.static_range(2):
        bring(d_q_s, [first + half * ROWS, 0], q_ready, q_tiles.index(half))
        bring(d_q_t, [first + half * ROWS, 0], q_ready, q_tiles.index(2 + half))
    for j in range(blocks):
        for side in gl.static_range(2):
            k = 2 * j + side
            slot = k % SLOTS
            # The first time round every slot is free: the phase before the first counts as complete.
            mbarrier.wait(free.index(slot), (k // SLOTS % 2) ^ 1)
            mbarrier.expect(ready.index(slot), d_k_s.block_type.nbytes)
            source = d_k_s if side == 0 else d_k_t
            bring(source, [j * COLUMNS, 0], ready.index(slot), k_tiles.index(slot))


@gluon.jit
def _send(q_tile, k_tiles, ready, k, zero):
    slot = k % SLOTS
    mbarrier.wait(ready.index(slot), k // SLOTS % 2)
    return warpgroup_mma(q_tile, k_tiles.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def release(slot_free):
    """Every warp of the group has read a tile: one of the two arrivals that free it."""
    meet()
    mbarrier.arrive(slot_free, count=1)


@gluon.jit
def copied(x):
    """A copy of a product, so that the next may take its registers.

    A plain one would be undone or put off beyond that product's start, where reading them makes the compiler wait for every
    product; max(x, -inf) where it stands is not (NaN stays NaN).
    """
    return gl.inline_asm_elementwise("max.NaN.f32 $0, $1, 0fFF800000;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _lanes(x):
    return gl.reshape(x, (ROWS, COLUMNS // 8, 4, 2))


@gluon.jit
def _highest(x):
    return gl.max(gl.max(x, 3), 1)


@gluon.jit
def _total(x):
    return gl.sum(gl.sum(x, 3), 1)


@gluon.jit
def _student(s, m_s, l_s, c_s):
    n_s = gl.maximum(m_s, _highest(s))
    e_s = s * c_s - (n_s * c_s)[:, None, :, None]
    fall_s = (m_s - n_s) * c_s
    return e_s, fall_s, n_s, l_s * gl.exp2(fall_s) + _total(gl.exp2(e_s))


@gluon.jit
def _teacher(t, e_s, fall_s, m_t, l_t, a, c_t, EDGE: gl.constexpr):
    n_t = gl.maximum(m_t, _highest(t))
    e_t = t * c_t - (n_t * c_t)[:, None, :, None]
    fall_t = (m_t - n_t) * c_t
    p_t = gl.exp2(e_t)
    apart = e_t - e_s
    if EDGE:  # the difference of two masked logits is NaN
        apart = gl.where(p_t > 0, apart, 0.0)
    shrink_t = gl.exp2(fall_t)
    a = (a + l_t * (fall_t - fall_s)) * shrink_t + _total(p_t * apart)
    return n_t, l_t * shrink_t + _total(p_t), a


@gluon.jit
def _merge(m, mass, c):
    top = gl.max(m, 1)
    fall = (m - top[:, None]) * c
    return top * c, fall, gl.sum(mass * gl.exp2(fall), 1)


@gluon.jit
def _compare(own, HALF: gl.constexpr):
    q_tiles, k_tiles, q_ready, ready, free, kl, lse_s, lse_t, first, blocks, tokens, c_s, c_t = own
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    o_row = first + HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    i_row = gl.minimum(o_row, tokens - 1)
    zero = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
    l_s = _total(_lanes(zero))
    l_t, a = l_s, l_s
    m_s = l_s + LOWEST
    m_t = m_s
    mbarrier.wait(q_ready, 0)
    x_s, x_t = q_tiles.index(HALF), q_tiles.index(2 + HALF)

    s = warpgroup_mma_wait(0, [_send(x_s, k_tiles, ready, 0, zero)])
    for j in range(blocks - 1):
        release(free.index(2 * j % SLOTS))
        t = _send(x_t, k_tiles, ready, 2 * j + 1, zero)
        now = copied(s)
        ahead = _send(x_s, k_tiles, ready, 2 * j + 2, zero)
        e_s, fall_s, m_s, l_s = _student(_lanes(now), m_s, l_s, c_s)
        t = warpgroup_mma_wait(1, [t])
        release(free.index((2 * j + 1) % SLOTS))
        m_t, l_t, a = _teacher(_lanes(t), e_s, fall_s, m_t, l_t, a, c_t, False)
        # Left running into the next round, the compiler would no longer see what may read it, and wait for every product.
        s = warpgroup_mma_wait(0, [ahead])

    # The last tile holds the diagonal.
    j = blocks - 1
    t = _send(x_t, k_tiles, ready, 2 * j + 1, zero)
    o_column = j * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    visible = o_column[None, :] <= i_row[:, None]
    s = gl.where(visible, s, float("-inf"))
    e_s, fall_s, m_s, l_s = _student(_lanes(s), m_s, l_s, c_s)
    t = gl.where(visible, warpgroup_mma_wait(0, [t]), float("-inf"))
    m_t, l_t, a = _teacher(_lanes(t), e_s, fall_s, m_t, l_t, a, c_t, True)

    top_s, fall_s, sum_s = _merge(m_s, l_s, c_s)
    top_t, fall_t, sum_t = _merge(m_t, l_t, c_t)
    a = gl.sum((a + l_t * (fall_t - fall_s)) * gl.exp2(fall_t), 1)
    log_s, log_t = gl.log2(sum_s), gl.log2(sum_t)
    row: gl.constexpr = gl.SliceLayout(1, layout)
    gl.store(kl + o_row, gl.convert_layout((a / sum_t - log_t + log_s) * LN_2, row), mask=o_row < tokens)
    gl.store(lse_s + o_row, gl.convert_layout((log_s + top_s) * LN_2, row), mask=o_row < tokens)
    gl.store(lse_t + o_row, gl.convert_layout((log_t + top_t) * LN_2, row), mask=o_row < tokens)


@gluon.jit
def _hopper_forward_kernel(
    q_s, k_s, q_t, k_t, kl, lse_s, lse_t,
    q_s_b, q_s_h, q_s_m, k_s_b, k_s_g, k_s_t, q_t_b, q_t_h, q_t_m, k_t_b, k_t_g, k_t_t,
    heads, shared, tokens, scale_s, scale_t, channels: gl.constexpr,
):  # fmt: skip
    tiles = gl.cdiv(tokens, 2 * ROWS)
    # The longest rows first: what is left at the end is short.
    i_tile = tiles - 1 - gl.program_id(0) % tiles
    first = i_tile * 2 * ROWS
    blocks = gl.cdiv(gl.minimum(first + 2 * ROWS, tokens), COLUMNS)
    head = gl.program_id(0) // tiles
    i_b, i_h = (head // heads).to(gl.int64), head % heads
    i_g = (i_h // shared).to(gl.int64)
    i_h = i_h.to(gl.int64)
    dtype: gl.constexpr = q_s.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, channels], dtype)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, channels], dtype)
    size = [tokens, channels]
    d_q_s = tma.make_tensor_descriptor(q_s + i_b * q_s_b + i_h * q_s_h, size, [q_s_m, 1], [ROWS, channels], q_layout)
    d_q_t = tma.make_tensor_descriptor(q_t + i_b * q_t_b + i_h * q_t_h, size, [q_t_m, 1], [ROWS, channels], q_layout)
    d_k_s = tma.make_tensor_descriptor(k_s + i_b * k_s_b + i_g * k_s_g, size, [k_s_t, 1], [COLUMNS, channels], k_layout)
    d_k_t = tma.make_tensor_descriptor(k_t + i_b * k_t_b + i_g * k_t_g, size, [k_t_t, 1], [COLUMNS, channels], k_layout)

    q_tiles = gl.allocate_shared_memory(dtype, [4, ROWS, channels], q_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [SLOTS, COLUMNS, channels], k_layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)  # both groups must have read it
    kl += head.to(gl.int64) * tokens
    lse_s += head.to(gl.int64) * tokens
    lse_t += head.to(gl.int64) * tokens
    own = (q_tiles, k_tiles, q_ready, ready, free, kl, lse_s, lse_t, first, blocks, tokens, scale_s * LOG2_E, scale_t * LOG2_E)
    gl.warp_specialize(
        [
            (_compare, (own, 0)),
            (_compare, (own, 1)),
            (_bring, (d_q_s, d_q_t, d_k_s, d_k_t, q_tiles, k_tiles, q_ready, ready, free, first, blocks)),
        ],
        [4, 1],
        [240, 24],
    )


def hopper_forward(
    q_s_BHTD: Tensor, k_s_BGTD: Tensor, q_t_BHTD: Tensor, k_t_BGTD: Tensor, scales: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `triton_forward.forward` without spans and sampled rows, for 64 or 128 channels of two bytes, 16-byte strides."""
    batch, heads, tokens, channels = q_s_BHTD.shape
    inputs = (q_s_BHTD, k_s_BGTD, q_t_BHTD, k_t_BGTD)
    shape = (batch, heads, tokens)
    kl_BHT, lse_s_BHT, lse_t_BHT = (torch.empty(shape, dtype=torch.float32, device=q_s_BHTD.device) for _ in range(3))
    arguments: tuple[Argument, ...] = (
        *inputs, kl_BHT, lse_s_BHT, lse_t_BHT, *(stride for tensor in inputs for stride in tensor.stride()[:3]),
        heads, heads // k_s_BGTD.shape[1], tokens, *scales,
    )  # fmt: skip
    allow_descriptors()
    tile = Tile(2 * ROWS.value, COLUMNS.value, 4, 1)
    launch(_hopper_forward_kernel, triton.cdiv(tokens, tile.rows) * batch * heads, arguments, {"channels": channels}, tile)
    return kl_BHT, lse_s_BHT, lse_t_BHT
