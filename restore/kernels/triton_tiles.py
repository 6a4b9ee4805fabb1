"""What the Triton kernels share: loads of a tile, the exponentials' units, and the tile sizes that were fastest.

Shapes: B batch, H heads, T tokens, D head channels. A tile is BLOCK tokens of one head, D filled up to a power of two.
Kernels count logits in base 2 (`exp2` is the hardware's exponential); log-sum-exps outside of them are natural.
"""

# Kernels are Triton's language, typed by its compiler.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Where running maxima begin: finite, so that what is masked (-inf) lies below them and exp2 of the difference is 0.
LOWEST = tl.constexpr(-1e30)


class Tile(NamedTuple):
    """One compiled shape of a kernel. `rows` are the tokens a program owns, `columns` those of a step of its loop."""

    rows: int
    columns: int
    warps: int
    stages: int
    bulk: bool = True
    """Read by the bulk copy engine (TMA), where device and strides allow it."""
    registers: int | None = None
    """Most registers of a thread; None leaves it to the compiler."""


# As `restore.kernels.tune` chose them on an H200 for bf16 (its search is not on record), by kernel and channels filled up to a
# power of two.
TILES = {
    ("forward", 64): Tile(64, 64, 4, 2),
    ("forward", 128): Tile(128, 128, 8, 2),
    ("forward", 256): Tile(128, 64, 8, 1),
    ("self_backward", 64): Tile(64, 64, 4, 3),
    ("self_backward", 128): Tile(64, 64, 4, 2),
    ("self_backward", 256): Tile(64, 32, 4, 2),
    ("query_backward", 64): Tile(64, 64, 4, 3),
    ("query_backward", 128): Tile(64, 64, 4, 2),
    ("query_backward", 256): Tile(64, 32, 4, 2),
    ("key_backward", 64): Tile(64, 64, 4, 3),
    ("key_backward", 128): Tile(64, 64, 4, 2),
    ("key_backward", 256): Tile(64, 32, 4, 2),
}


def pick(kernel: str, x_BHTD: Tensor, tile: Tile | None = None) -> Tile:
    """The measured tile for a kernel, shrunk until student's and teacher's tiles fit into the device's shared memory."""
    block_d = fill(x_BHTD.shape[3])
    tile = tile or TILES[kernel, max(64, block_d)]
    if not x_BHTD.is_cuda:  # the interpreter has no such limit
        return tile
    limit = _shared_bytes(x_BHTD.device)
    # Two bytes or four: fp32 products are made of three tf32 products, whose parts take as much room again.
    channel_bytes = 2 if x_BHTD.element_size() == 2 else 8
    while 2 * block_d * channel_bytes * (tile.rows + tile.stages * tile.columns) > limit and tile.rows > 16:
        if tile.stages > 1:
            tile = tile._replace(stages=tile.stages - 1)
        else:
            tile = tile._replace(rows=max(16, tile.rows // 2), columns=max(16, tile.columns // 2))
    return tile


@cache
def _shared_bytes(device: torch.device) -> int:
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin"))  # noqa: B009 - unknown to the stubs


@cache
def _has_copy_engine(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def fill(channels: int) -> int:
    """Channels filled up to what a matrix product takes: a power of two, at least 16."""
    return max(16, 1 << (channels - 1).bit_length())


def constants(tile: Tile, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """The constexpr parameters that every kernel ends with, in their order."""
    x_BHTD = inputs[0]
    return {
        "channels": x_BHTD.shape[3],
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCK_D": fill(x_BHTD.shape[3]),
        # tf32 alone would lose what fp32 inputs ask for; three of them keep it and still use the matrix units.
        "PRECISION": "tf32x3" if x_BHTD.dtype == torch.float32 else "ieee",
        "TMA": _bulk_copies(tile, inputs),
    }


def _bulk_copies(tile: Tile, inputs: tuple[Tensor, ...]) -> bool:
    if not (tile.bulk and reaches_by_bulk_copy(inputs)):
        return False
    allow_descriptors()
    return True


def reaches_by_bulk_copy(inputs: tuple[Tensor, ...]) -> bool:
    """Whether the copy engine exists here and takes these: addresses and strides of whole 16 bytes, unit stride along D."""
    if not (inputs[0].is_cuda and _has_copy_engine(inputs[0].device)):
        return False
    places = [n * x.element_size() for x in inputs for n in x.stride()[:3]] + [x.data_ptr() for x in inputs]
    return not any(place % 16 for place in places) and all(x.stride(3) == 1 for x in inputs)


def allow_descriptors() -> None:
    """Give kernels the memory in which they make the copy engine's descriptors."""
    # At every launch: Triton keeps it by thread, and autograd's threads are others.
    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, device="cuda", dtype=torch.int8))


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose channels lie side by side, as they nearly always do; any other is copied."""
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)


def normalise(grad_BHM: Tensor, x_BHTD: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Row gradients, the factor taken out of them, and the power of two by which fp16 differences are raised.

    A mean over a million rows weighs each with 1e-6, and P_s - P_t is smaller yet: fp16 has no such numbers.
    """
    grad_BHM = grad_BHM.float().contiguous()
    if x_BHTD.dtype != torch.float16:
        return grad_BHM, None, 0
    peak = grad_BHM.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    return grad_BHM / peak, peak, 10


@triton.jit
def head_start(base, batch, head, stride_b, stride_h):
    return base + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def load_tile(head, first, last, stride_t, channels: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] tokens from `first` on. Beyond `last` the last token repeats: whoever asked masks those logits."""
    # The tile's own start in 64 bits, once; within the tile 32 bits do.
    o_token = tl.minimum(tl.arange(0, BLOCK), last - first)
    o_channel = tl.arange(0, BLOCK_D)
    p_tile = head + tl.cast(first, tl.int64) * stride_t + o_token[:, None] * stride_t + o_channel[None, :]
    if channels == BLOCK_D:
        return tl.load(p_tile)
    return tl.load(p_tile, mask=o_channel[None, :] < channels, other=0.0)


@triton.jit
def view(head, last, stride_t, channels: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """What `step` reads tiles from: a descriptor for the bulk copy engine, or the plain pointer."""
    if TMA:
        source = tl.make_tensor_descriptor(head, [last + 1, channels], [tl.cast(stride_t, tl.int64), 1], [BLOCK, BLOCK_D])
    else:
        source = head
    return source


@triton.jit
def step(source, first, last, stride_t, channels: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """`load_tile` for the inner loops; where the copy engine reads, zeros stand beyond `last`."""
    return source.load([first, 0]) if TMA else load_tile(source, first, last, stride_t, channels, BLOCK, BLOCK_D)


@triton.jit
def difference(s, t, lse_s, lse_t, c_s, c_t):
    """P_student - P_teacher of a tile of dot products, from its rows' log-sum-exps in base 2 (broadcast to the tile)."""
    return tl.exp2(s * c_s - lse_s) - tl.exp2(t * c_t - lse_t)
