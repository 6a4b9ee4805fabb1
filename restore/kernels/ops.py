"""The relation KL as two PyTorch operators, `ard::self_relation_kl` and `ard::cross_relation_kl`, with their gradients.

Shapes: B batch, H query heads, G key heads, M rows, T columns, D head channels.

Each forward returns ([B, H, M] KL, log-sum-exp of the student's rows, of the teacher's rows): all that its gradient needs
beside its inputs, so that selective activation checkpointing can keep these O(M) outputs and never run a forward twice.
Fake and autograd registrations make them work under torch.compile, checkpointing and meta tensors.

`Library` and two `autograd.Function`s rather than `custom_op` and `register_autograd`: on short windows a call costs what
Python around the kernels takes, and this takes less of it, and no zeros are written for outputs without a gradient.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_fake

from ard_serve.errors import UsageError
from restore.kernels import chunked
from restore.kernels.documents import Spans

Rows = tuple[Tensor, Tensor, Tensor]

_LIBRARY = Library("ard", "DEF")  # type: ignore[no-untyped-call]


def _backend(q_BHMD: Tensor) -> ModuleType:
    if q_BHMD.is_cuda and q_BHMD.dtype != torch.float64 and q_BHMD.shape[3] <= 256:
        # Late: triton exists on machines with a GPU only.
        return import_module("restore.kernels.triton_backend")
    return chunked


def _spans(start_BT: Tensor | None, end_BT: Tensor | None) -> Spans | None:
    return None if start_BT is None or end_BT is None else Spans(start_BT, end_BT)


def _self_relation_kl(
    x_s_BHTD: Tensor, x_t_BHTD: Tensor, scale_s: float, scale_t: float, start_BT: Tensor | None, end_BT: Tensor | None
) -> Rows:
    spans = _spans(start_BT, end_BT)
    rows: Rows = _backend(x_s_BHTD).forward(x_s_BHTD, x_s_BHTD, x_t_BHTD, x_t_BHTD, (scale_s, scale_t), spans, None)
    return rows


def _self_relation_kl_backward(
    grad_BHT: Tensor,
    x_s_BHTD: Tensor,
    x_t_BHTD: Tensor,
    lse_s_BHT: Tensor,
    lse_t_BHT: Tensor,
    scale_s: float,
    scale_t: float,
    start_BT: Tensor | None,
    end_BT: Tensor | None,
) -> Tensor:
    backend, spans, scales = _backend(x_s_BHTD), _spans(start_BT, end_BT), (scale_s, scale_t)
    dx_BHTD: Tensor = backend.self_backward(grad_BHT, x_s_BHTD, x_t_BHTD, lse_s_BHT, lse_t_BHT, scales, spans)
    return dx_BHTD


def _cross_relation_kl(
    q_s_BHMD: Tensor,
    k_s_BGTD: Tensor,
    q_t_BHMD: Tensor,
    k_t_BGTD: Tensor,
    scale_s: float,
    scale_t: float,
    start_BT: Tensor | None,
    end_BT: Tensor | None,
    row_BHM: Tensor | None,
) -> Rows:
    spans, scales = _spans(start_BT, end_BT), (scale_s, scale_t)
    rows: Rows = _backend(q_s_BHMD).forward(q_s_BHMD, k_s_BGTD, q_t_BHMD, k_t_BGTD, scales, spans, row_BHM)
    return rows


def _cross_relation_kl_backward(
    grad_BHM: Tensor,
    q_s_BHMD: Tensor,
    k_s_BGTD: Tensor,
    q_t_BHMD: Tensor,
    k_t_BGTD: Tensor,
    lse_s_BHM: Tensor,
    lse_t_BHM: Tensor,
    scale_s: float,
    scale_t: float,
    start_BT: Tensor | None,
    end_BT: Tensor | None,
    row_BHM: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tensors = (grad_BHM, q_s_BHMD, k_s_BGTD, q_t_BHMD, k_t_BGTD, lse_s_BHM, lse_t_BHM)
    spans, scales = _spans(start_BT, end_BT), (scale_s, scale_t)
    grads: tuple[Tensor, Tensor] = _backend(q_s_BHMD).backward(*tensors, scales, spans, row_BHM)
    return grads


def _fake_rows(q_BHMD: Tensor, *_: object) -> Rows:
    dtype = torch.promote_types(q_BHMD.dtype, torch.float32)
    first, second, third = (q_BHMD.new_empty(q_BHMD.shape[:3], dtype=dtype) for _ in range(3))
    return first, second, third


def _fake_self_gradient(grad_BHT: Tensor, x_s_BHTD: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x_s_BHTD)


def _fake_cross_gradient(grad_BHM: Tensor, q_s_BHMD: Tensor, k_s_BGTD: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_s_BHMD), torch.empty_like(k_s_BGTD)


def _define(function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = function.__name__.removeprefix("_")
    _LIBRARY.define(name + infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    register_fake(f"ard::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ard, name).default


self_rows = _define(_self_relation_kl, _fake_rows)
self_rows_backward = _define(_self_relation_kl_backward, _fake_self_gradient)
cross_rows = _define(_cross_relation_kl, _fake_rows)
cross_rows_backward = _define(_cross_relation_kl_backward, _fake_cross_gradient)


def _keep(
    ctx: Any, rows: Rows, tensors: tuple[Tensor, ...], scales: tuple[float, float], where: tuple[Tensor | None, ...]
) -> Rows:
    _, lse_s_BHM, lse_t_BHM = rows
    ctx.mark_non_differentiable(lse_s_BHM, lse_t_BHM)
    # Else autograd would write zeros, [B, H, M] each, for the two outputs that have no gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, lse_s_BHM, lse_t_BHM, *where)
    ctx.scales = scales
    return rows


def _refuse_second_order() -> None:
    if torch.is_grad_enabled():  # within a backward: create_graph
        raise UsageError("create_graph=True through a relation KL: it has a first derivative only; leave create_graph out")


class _SelfRelation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_s: Tensor, x_t: Tensor, scale_s: float, scale_t: float, *spans: Tensor | None) -> Rows:
        with torch._C._AutoDispatchBelowAutograd():
            rows = self_rows(x_s, x_t, scale_s, scale_t, *spans)
        return _keep(ctx, rows, (x_s, x_t), (scale_s, scale_t), spans)

    @staticmethod
    def backward(ctx: Any, grad_BHT: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_BHT is None:
            return (None,) * 6
        _refuse_second_order()
        *tensors, start_BT, end_BT = ctx.saved_tensors
        return self_rows_backward(grad_BHT, *tensors, *ctx.scales, start_BT, end_BT), None, None, None, None, None


class _CrossRelation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, scale_s: float, scale_t: float, *where: Tensor | None
    ) -> Rows:
        with torch._C._AutoDispatchBelowAutograd():
            rows = cross_rows(q_s, k_s, q_t, k_t, scale_s, scale_t, *where)
        return _keep(ctx, rows, (q_s, k_s, q_t, k_t), (scale_s, scale_t), where)

    @staticmethod
    def backward(ctx: Any, grad_BHM: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_BHM is None:
            return (None,) * 9
        _refuse_second_order()
        *tensors, start_BT, end_BT, row_BHM = ctx.saved_tensors
        dq_BHMD, dk_BGTD = cross_rows_backward(grad_BHM, *tensors, *ctx.scales, start_BT, end_BT, row_BHM)
        return dq_BHMD, dk_BGTD, None, None, None, None, None, None, None


_LIBRARY.impl("self_relation_kl", _SelfRelation.apply, "Autograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("cross_relation_kl", _CrossRelation.apply, "Autograd")  # type: ignore[no-untyped-call]
