"""RoPE of queries or keys in one kernel, forward and backward: x cos + rotate_half(x) sin, in fp32 inside.

Shapes: B batch, H heads, T tokens, D head channels. A program rotates all heads of one token, which share cosines and sines.
"""

# Kernels are Triton's language, typed by its compiler.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl
from torch import Tensor

from restore.kernels.triton_launch import Argument, launch
from restore.kernels.triton_tiles import Tile, unit_stride

_TILE = Tile(rows=1, columns=1, warps=4, stages=1)


@triton.jit
def _rotate_kernel(
    x, cos, sin, out, x_b, x_h, x_t, cos_b, cos_t, sin_b, sin_t, out_b, out_h, out_t, tokens, heads, half,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // tokens).to(tl.int64)
    i_t = (tl.program_id(0) % tokens).to(tl.int64)
    o_h = tl.arange(0, HEADS)[:, None].to(tl.int64)
    o_d = tl.arange(0, HALF)[None, :]
    known = o_d < half
    inside = (o_h < heads) & known
    p_x = x + i_b * x_b + i_t * x_t + o_h * x_h + o_d
    b_low = tl.load(p_x, mask=inside, other=0.0).to(tl.float32)
    b_high = tl.load(p_x + half, mask=inside, other=0.0).to(tl.float32)
    p_cos = cos + i_b * cos_b + i_t * cos_t + o_d
    p_sin = sin + i_b * sin_b + i_t * sin_t + o_d
    b_cos_low = tl.load(p_cos, mask=known, other=0.0).to(tl.float32)
    b_cos_high = tl.load(p_cos + half, mask=known, other=0.0).to(tl.float32)
    b_sin_low = tl.load(p_sin, mask=known, other=0.0).to(tl.float32)
    b_sin_high = tl.load(p_sin + half, mask=known, other=0.0).to(tl.float32)
    if BACK:
        b_out_low = b_low * b_cos_low + b_high * b_sin_high
        b_out_high = b_high * b_cos_high - b_low * b_sin_low
    else:
        b_out_low = b_low * b_cos_low - b_high * b_sin_low
        b_out_high = b_high * b_cos_high + b_low * b_sin_high
    p_out = out + i_b * out_b + i_t * out_t + o_h * out_h + o_d
    tl.store(p_out, b_out_low.to(out.dtype.element_ty), mask=inside)
    tl.store(p_out + half, b_out_high.to(out.dtype.element_ty), mask=inside)


def rotate(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, back: bool = False) -> Tensor:
    """`x_BHTD` rotated, or `back`: the gradient of what was, [B, T, H, D] in memory as a projection takes it.

    Args:
        x_BHTD: queries or keys, of any strides.
        cos_BTD: cosines of every position, of one batch for all or of each.
        sin_BTD: sines likewise.
        back: apply the transposed rotation.
    """
    batch, heads, tokens, channels = x_BHTD.shape
    x_BHTD, cos_BTD, sin_BTD = unit_stride(x_BHTD, cos_BTD, sin_BTD)
    out_BHTD = x_BHTD.new_empty(batch, tokens, heads, channels).transpose(1, 2)
    tables = [int(stride) for x in (cos_BTD, sin_BTD) for stride in (x.stride(0) * (len(x) > 1), x.stride(1))]
    arguments: tuple[Argument, ...] = (
        x_BHTD, cos_BTD, sin_BTD, out_BHTD, *x_BHTD.stride()[:3], *tables, *out_BHTD.stride()[:3], tokens, heads, channels // 2,
    )  # fmt: skip
    constants = {"BACK": back, "HEADS": _fill(heads), "HALF": _fill(channels // 2)}
    launch(_rotate_kernel, batch * tokens, arguments, constants, _TILE)
    return out_BHTD


def _fill(count: int) -> int:
    """Filled up to a power of two, as the language asks of a tile."""
    return 1 << (count - 1).bit_length()
