"""Checkpointing of one layer: what stays until backward is what the layer read, a few numbers a relation row, and where there
is memory for it what attention returned.

Where there is memory to spare, a layer keeps its graph instead, and backward runs nothing again.

PyTorch's own selective checkpointing can do the same, but sends every operation of a layer through Python, forward and again
in backward, and builds the graph twice. On a small model that takes longer than the arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

import restore.kernels  # noqa: F401 - registers torch.ops.ard

_RELATIONS = (torch.ops.ard.self_relation_kl.default, torch.ops.ard.cross_relation_kl.default)
# What PyTorch's attention may come down to, by device and shape; made of plain products, it is run again.
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


class KeptRows:
    """What the relation kernels of one layer returned, and attention where asked to, so that backward need not run them again.

    Inside `around`, those operations run and are noted, or, once it `replays`, return what they returned; every other
    operation runs as it is.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        # Of every call its operation and what it returned; a tensor by its place among `tensors`.
        self._calls: list[tuple[OpOverload, list[Any]]] = []
        self._left: list[tuple[OpOverload, list[Any]]] | None = None

    @contextmanager
    def around(self) -> Iterator[None]:
        """Note or replay what runs inside; entered once or more."""
        with _Mode(self):
            yield

    def replays(self, tensors: Sequence[Tensor]) -> "KeptRows":
        """The same, to be replayed with `tensors`, which were `self.tensors`."""
        again = KeptRows()
        again.tensors, again._left = list(tensors), list(self._calls)
        return again

    def run(self, operation: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `operation` returns, now or the first time."""
        if self._left is None:
            returned = operation(*_with_gradient(operation, args), **kwargs)
            self._calls.append((operation, [self._note(part) for part in returned]))
            return returned
        for at, (noted, returned) in enumerate(self._left):
            if noted == operation:
                del self._left[at]
                return tuple(self.tensors[part.at].detach() if isinstance(part, _Place) else part for part in returned)
        # With a gradient, PyTorch may choose another attention than it did without one.
        return operation(*args, **kwargs)

    def _note(self, part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        self.tensors.append(part)
        return _Place(len(self.tensors) - 1)


@dataclass(frozen=True)
class _Place:
    at: int


def _with_gradient(operation: OpOverload, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments, and the log-sum-exp that attention leaves out where nothing asks for a gradient yet."""
    names = [argument.name for argument in operation._schema.arguments]
    if "compute_log_sumexp" not in names:
        return args
    at = names.index("compute_log_sumexp")
    return (*args[:at], True, *args[at + 1 :])


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, rows: KeptRows) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows = rows

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in _RELATIONS or operation in _ATTENTION:
            return self._rows.run(operation, args, kwargs or {})
        return operation(*args, **(kwargs or {}))


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
        ctx.layer, ctx.present, ctx.parameters, ctx.rows = layer, present, parameters, rows
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student_BTC, teacher_BTC, *rows.tensors)
        rows.tensors.clear()  # they are autograd's to keep and to free
        if outputs[2] is not None:
            ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        student_BTC, teacher_BTC, *kept = ctx.saved_tensors
        needs_student: bool = ctx.needs_input_grad[2]
        student_BTC = student_BTC.detach().requires_grad_(needs_student)
        wanted = [student_BTC, *ctx.parameters] if needs_student else list(ctx.parameters)
        with ctx.present(True):
            with torch.enable_grad():
                outputs = ctx.layer(student_BTC, teacher_BTC, ctx.rows.replays(kept), True)
            told = [(output, grad) for output, grad in zip(outputs[:2], grads[:2], strict=True) if grad is not None]
            found = torch.autograd.grad([o for o, _ in told], wanted, [g for _, g in told], allow_unused=True)
        of_student = found[0] if needs_student else None
        return None, None, of_student, None, *found[needs_student:]
