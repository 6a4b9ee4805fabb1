"""Checkpointing of one layer: what stays until backward is what the layer read, and a few numbers a relation row.

Where there is memory to spare, a layer keeps its graph instead, and backward runs nothing again.

PyTorch's own selective checkpointing can do the same, but sends every operation of a layer through Python, forward and again
in backward, and builds the graph twice. On a small model that takes longer than the arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

import restore.kernels  # noqa: F401 - registers torch.ops.ard

_KEPT_OPERATIONS = (torch.ops.ard.self_relation_kl.default, torch.ops.ard.cross_relation_kl.default)


class KeptRows:
    """What the relation kernels of one layer returned, so that backward need not run their forward again."""

    def __init__(self, tensors: Sequence[Tensor] | None = None) -> None:
        """Without tensors, the operations inside `around` run and are noted; with them, they return these in order."""
        self.tensors = list(tensors or ())
        self._replays = tensors is not None

    @contextmanager
    def around(self) -> Iterator[None]:
        """Note or replay the relation kernels that run inside; every other operation runs as it is."""
        with _Mode(self.tensors, self._replays):
            yield


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, tensors: list[Tensor], replays: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors, self._left = tensors, iter(tensors) if replays else None

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation not in _KEPT_OPERATIONS:
            return operation(*args, **(kwargs or {}))
        if self._left is not None:
            return tuple(next(self._left).detach() for _ in operation._schema.returns)
        rows = operation(*args, **(kwargs or {}))
        self._tensors.extend(rows)
        return rows


# What a layer gives: the student's hidden states, the layer's losses as one vector, the teacher's hidden states.
Outputs = tuple[Tensor, Tensor | None, Tensor | None]


class Layer(Protocol):
    """One decoder layer as `recomputed` runs it: now, and `again` in backward, where the teacher's output is not needed."""

    def __call__(self, student_BTC: Tensor, teacher_BTC: Tensor | None, rows: KeptRows | None, again: bool, /) -> Outputs: ...


# Entered around all work on a layer, forward and (true) backward: its weights are there inside.
Present = Callable[[bool], AbstractContextManager[None]]


def recomputed(
    layer: Layer,
    student_BTC: Tensor,
    teacher_BTC: Tensor | None,
    parameters: Sequence[nn.Parameter],
    present: Present = lambda _again: nullcontext(),
) -> Outputs:
    """Run `layer` without a graph now and with one in backward; gradients reach `student_BTC` and `parameters`.

    Args:
        layer: what to run.
        student_BTC: hidden states that may carry a gradient.
        teacher_BTC: hidden states that carry none.
        parameters: every parameter that learns in this layer.
        present: makes the layer's weights be there while it runs.
    """
    outputs: Outputs = _Recomputed.apply(layer, present, student_BTC, teacher_BTC, *parameters)  # type: ignore[no-untyped-call]
    return outputs


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        present: Present,
        student_BTC: Tensor,
        teacher_BTC: Tensor | None,
        *parameters: nn.Parameter,
    ) -> Outputs:
        rows = KeptRows()
        with present(False):
            outputs = layer(student_BTC, teacher_BTC, rows, False)
        ctx.layer, ctx.present, ctx.parameters = layer, present, parameters
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student_BTC, teacher_BTC, *rows.tensors)
        if outputs[2] is not None:
            ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        student_BTC, teacher_BTC, *rows = ctx.saved_tensors
        needs_student: bool = ctx.needs_input_grad[2]
        student_BTC = student_BTC.detach().requires_grad_(needs_student)
        wanted = [student_BTC, *ctx.parameters] if needs_student else list(ctx.parameters)
        with ctx.present(True):
            with torch.enable_grad():
                outputs = ctx.layer(student_BTC, teacher_BTC, KeptRows(rows), True)
            told = [(output, grad) for output, grad in zip(outputs[:2], grads[:2], strict=True) if grad is not None]
            found = torch.autograd.grad([o for o, _ in told], wanted, [g for _, g in told], allow_unused=True)
        of_student = found[0] if needs_student else None
        return None, None, of_student, None, *found[needs_student:]
