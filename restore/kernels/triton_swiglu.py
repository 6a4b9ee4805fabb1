"""silu(gate) * up in one kernel forward and one backward, in fp32 inside.

Shapes: N elements, of tensors of any shape that lie in memory alike.
"""

# Kernels are Triton's language, typed by its compiler.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from restore.kernels.triton_launch import launch
from restore.kernels.triton_tiles import Tile

# Each element is read and written once: 16 bytes a thread and load, and enough programs to fill any GPU.
_TILE = Tile(rows=1, columns=1024, warps=4, stages=1)


@triton.jit
def _forward_kernel(gate, up, out, elements, BLOCK: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o_n < elements
    b_gate = tl.load(gate + o_n, mask=inside, other=0.0).to(tl.float32)
    b_up = tl.load(up + o_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + o_n, (b_gate * tl.sigmoid(b_gate) * b_up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad, gate, up, of_gate, of_up, elements, BLOCK: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o_n < elements
    b_grad = tl.load(grad + o_n, mask=inside, other=0.0).to(tl.float32)
    b_gate = tl.load(gate + o_n, mask=inside, other=0.0).to(tl.float32)
    b_up = tl.load(up + o_n, mask=inside, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    b_of_gate = b_grad * b_up * (b_sigmoid + b_silu * (1.0 - b_sigmoid))
    tl.store(of_gate + o_n, b_of_gate.to(of_gate.dtype.element_ty), mask=inside)
    tl.store(of_up + o_n, (b_grad * b_silu).to(of_up.dtype.element_ty), mask=inside)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(up)
    _launch(_forward_kernel, gate, up, out)
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _launch(_backward_kernel, grad, gate, up, of_gate, of_up)
    return of_gate, of_up


def _launch(kernel: object, *tensors: Tensor) -> None:
    elements = tensors[0].numel()
    programs = triton.cdiv(elements, _TILE.columns)
    launch(kernel, programs, (*tensors, elements), {"BLOCK": _TILE.columns}, _TILE)
