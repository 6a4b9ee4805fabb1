"""The relation KL as two PyTorch operators, `ard::self_relation_kl` and `ard::cross_relation_kl`, with their gradients.

Shapes: B batch, H query heads, G key heads, M rows, T columns, D head channels.

Each forward returns ([B, H, M] KL, log-sum-exp of the student's rows, of the teacher's rows): all that its gradient needs
beside its inputs, so that selective activation checkpointing can keep these O(M) outputs and never run a forward twice.
Fake and autograd registrations make them work under torch.compile, checkpointing and meta tensors.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from restore.kernels import chunked
from restore.kernels.documents import Spans

Rows = tuple[Tensor, Tensor, Tensor]


def _backend(q_BHMD: Tensor) -> ModuleType:
    if q_BHMD.is_cuda and q_BHMD.dtype != torch.float64 and q_BHMD.shape[3] <= 256:
        # Late: triton exists on machines with a GPU only.
        return import_module("restore.kernels.triton_backend")
    return chunked


def _spans(start_BT: Tensor | None, end_BT: Tensor | None) -> Spans | None:
    return None if start_BT is None or end_BT is None else Spans(start_BT, end_BT)


@custom_op("ard::self_relation_kl", mutates_args=())
def self_rows(
    x_s_BHTD: Tensor, x_t_BHTD: Tensor, scale_s: float, scale_t: float, start_BT: Tensor | None, end_BT: Tensor | None
) -> Rows:
    spans = _spans(start_BT, end_BT)
    rows: Rows = _backend(x_s_BHTD).forward(x_s_BHTD, x_s_BHTD, x_t_BHTD, x_t_BHTD, (scale_s, scale_t), spans, None)
    return rows


@custom_op("ard::self_relation_kl_backward", mutates_args=())
def self_rows_backward(
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


@custom_op("ard::cross_relation_kl", mutates_args=())
def cross_rows(
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


@custom_op("ard::cross_relation_kl_backward", mutates_args=())
def cross_rows_backward(
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


def _keep_self(ctx: Any, inputs: tuple[Any, ...], output: Rows) -> None:
    x_s_BHTD, x_t_BHTD, scale_s, scale_t, start_BT, end_BT = inputs
    _, lse_s_BHT, lse_t_BHT = output
    ctx.mark_non_differentiable(lse_s_BHT, lse_t_BHT)
    ctx.save_for_backward(x_s_BHTD, x_t_BHTD, lse_s_BHT, lse_t_BHT, start_BT, end_BT)
    ctx.scales = (scale_s, scale_t)


def _self_gradient(ctx: Any, grad_BHT: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    *tensors, start_BT, end_BT = ctx.saved_tensors
    return self_rows_backward(grad_BHT, *tensors, *ctx.scales, start_BT, end_BT), None, None, None, None, None


def _keep_cross(ctx: Any, inputs: tuple[Any, ...], output: Rows) -> None:
    *tensors, scale_s, scale_t, start_BT, end_BT, row_BHM = inputs
    _, lse_s_BHM, lse_t_BHM = output
    ctx.mark_non_differentiable(lse_s_BHM, lse_t_BHM)
    ctx.save_for_backward(*tensors, lse_s_BHM, lse_t_BHM, start_BT, end_BT, row_BHM)
    ctx.scales = (scale_s, scale_t)


def _cross_gradient(ctx: Any, grad_BHM: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    *tensors, start_BT, end_BT, row_BHM = ctx.saved_tensors
    dq_BHMD, dk_BGTD = cross_rows_backward(grad_BHM, *tensors, *ctx.scales, start_BT, end_BT, row_BHM)
    return dq_BHMD, dk_BGTD, None, None, None, None, None, None, None


self_rows.register_fake(_fake_rows)
cross_rows.register_fake(_fake_rows)
self_rows.register_autograd(_self_gradient, setup_context=_keep_self)
cross_rows.register_autograd(_cross_gradient, setup_context=_keep_cross)


@self_rows_backward.register_fake
def _(grad_BHT: Tensor, x_s_BHTD: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x_s_BHTD)


@cross_rows_backward.register_fake
def _(grad_BHM: Tensor, q_s_BHMD: Tensor, k_s_BGTD: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_s_BHMD), torch.empty_like(k_s_BGTD)
