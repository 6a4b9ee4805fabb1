"""The relation KL in tiles of rows, with plain tensor operations: exact, any device and dtype, memory linear in T.

Shapes: B batch, H query heads, G key heads, M rows, T columns, D head channels; R rows of a tile (of all H/G heads that
share a key head, stacked), C columns that a tile sees.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from restore.kernels.documents import Spans

# Elements of one tile of logits: 1 MiB in fp32, so that student, teacher and their difference stay in a core's cache.
TILE_ELEMENTS = 1 << 18
# Finite: the difference of two masked logits must not be NaN. Its exponential is 0 beside any real logit.
MASKED = -1e30

P = ParamSpec("P")
R = TypeVar("R")


def _outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    # The products below are in fp32 on purpose; an autocast region around the call must not lower them.
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return call


class _Tile(NamedTuple):
    query_index: tuple[int, slice, slice]
    key_index: tuple[int, int, slice]
    row_R: Tensor
    start_R: Tensor
    hidden_from: int
    """First column (within the tile) that any of its rows may not see; all columns before are plainly visible."""


@_outside_autocast
def forward(
    q_s_BHMD: Tensor,
    k_s_BGTD: Tensor,
    q_t_BHMD: Tensor,
    k_t_BGTD: Tensor,
    scales: tuple[float, float],
    spans: Spans | None,
    row_BHM: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL of each row and the log-sum-exps of its student and teacher logits, each [B, H, M], fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(q_s_BHMD.dtype, torch.float32)
    kl_BHM, lse_s_BHM, lse_t_BHM = (q_s_BHMD.new_empty(q_s_BHMD.shape[:3], dtype=dtype) for _ in range(3))
    for tile in _tiles(q_s_BHMD, k_s_BGTD, spans, row_BHM):
        q_s_RD, k_s_CD = _load(tile, q_s_BHMD, k_s_BGTD, spans, dtype)
        q_t_RD, k_t_CD = _load(tile, q_t_BHMD, k_t_BGTD, spans, dtype)
        log_s_RC, lse_s_R = _log_softmax(tile, q_s_RD, k_s_CD, scales[0])
        log_t_RC, lse_t_R = _log_softmax(tile, q_t_RD, k_t_CD, scales[1])
        kl_R = log_s_RC.neg_().add_(log_t_RC).mul_(log_t_RC.exp_()).sum(-1)
        blind_R = tile.row_R < tile.start_R
        shape = kl_BHM[tile.query_index].shape
        kl_BHM[tile.query_index] = kl_R.masked_fill_(blind_R, 0).view(shape)
        # A row that sees nothing: exp(logit - inf) is 0, which spares backward a case of its own.
        lse_s_BHM[tile.query_index] = lse_s_R.masked_fill_(blind_R, float("inf")).view(shape)
        lse_t_BHM[tile.query_index] = lse_t_R.masked_fill_(blind_R, float("inf")).view(shape)
    return kl_BHM, lse_s_BHM, lse_t_BHM


@_outside_autocast
def backward(
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
) -> tuple[Tensor, Tensor]:
    """Gradients of the student's queries and keys, given that of each row's KL, in the inputs' dtype."""
    dtype = lse_s_BHM.dtype
    dq_BHMD = torch.empty_like(q_s_BHMD)
    dk_BGTD = torch.zeros(k_s_BGTD.shape, dtype=dtype, device=k_s_BGTD.device)
    for tile in _tiles(q_s_BHMD, k_s_BGTD, spans, row_BHM):
        q_s_RD, k_s_CD = _load(tile, q_s_BHMD, k_s_BGTD, spans, dtype)
        q_t_RD, k_t_CD = _load(tile, q_t_BHMD, k_t_BGTD, spans, dtype)
        grad_RC = _softmax(tile, q_s_RD, k_s_CD, scales[0], lse_s_BHM)
        grad_RC -= _softmax(tile, q_t_RD, k_t_CD, scales[1], lse_t_BHM)
        grad_RC *= grad_BHM[tile.query_index].reshape(-1, 1) * scales[0]
        dq_BHMD[tile.query_index] = (grad_RC @ k_s_CD).view(dq_BHMD[tile.query_index].shape).to(dq_BHMD.dtype)
        dk_BGTD[tile.key_index].addmm_(grad_RC.T, q_s_RD)
    return dq_BHMD, dk_BGTD.to(k_s_BGTD.dtype)


def self_backward(
    grad_BHT: Tensor,
    x_s_BHTD: Tensor,
    x_t_BHTD: Tensor,
    lse_s_BHT: Tensor,
    lse_t_BHT: Tensor,
    scales: tuple[float, float],
    spans: Spans | None,
) -> Tensor:
    """Gradient of the student's tensor in a self-relation, where it is both query and key, in its dtype."""
    tensors = (grad_BHT, x_s_BHTD, x_s_BHTD, x_t_BHTD, x_t_BHTD, lse_s_BHT, lse_t_BHT)
    dq_BHTD, dk_BHTD = backward(*tensors, scales, spans, None)
    return dq_BHTD.add_(dk_BHTD)


def _tiles(q_BHMD: Tensor, k_BGTD: Tensor, spans: Spans | None, row_BHM: Tensor | None) -> Iterator[_Tile]:
    batch, heads, rows, _ = q_BHMD.shape
    groups, columns = k_BGTD.shape[1:3]
    shared = heads // groups
    step = max(16, TILE_ELEMENTS // (shared * columns))
    all_rows_M = torch.arange(rows, device=q_BHMD.device)
    for b in range(batch):
        for group in range(groups):
            members = slice(group * shared, (group + 1) * shared)
            for first in range(0, rows, step):
                at = slice(first, min(first + step, rows))
                row_R = all_rows_M[at].repeat(shared) if row_BHM is None else row_BHM[b, members, at].flatten().long()
                start_R = torch.zeros_like(row_R) if spans is None else spans.start_BT[b][row_R]
                high = at.stop if row_BHM is None else int(row_R.max()) + 1
                low = 0 if spans is None else min(int(start_R.min()), high - 1)
                plain = first if spans is None and row_BHM is None else low
                yield _Tile((b, members, at), (b, group, slice(low, high)), row_R, start_R, min(plain, high) - low)


def _load(tile: _Tile, q_BHMD: Tensor, k_BGTD: Tensor, spans: Spans | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q_RD = q_BHMD[tile.query_index].to(dtype).reshape(-1, q_BHMD.shape[3])
    k_CD = k_BGTD[tile.key_index].to(dtype)
    if spans is not None:  # What padding holds, NaN included, must not reach a product.
        q_RD = q_RD.masked_fill((tile.row_R < tile.start_R)[:, None], 0)
        batch, _, seen = tile.key_index
        k_CD = k_CD.masked_fill((spans.end_BT[batch, seen] == 0)[:, None], 0)
    return q_RD, k_CD


def _log_softmax(tile: _Tile, q_RD: Tensor, k_CD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits_RC = _hide(tile, (q_RD @ k_CD.T).mul_(scale))
    log_p_RC = logits_RC.log_softmax(-1)
    # Every row sees itself, so that this one column gives the log-sum-exp without a second pass.
    own_R1 = (tile.row_R - tile.key_index[2].start).clamp_(min=0)[:, None]
    return log_p_RC, (logits_RC.gather(1, own_R1) - log_p_RC.gather(1, own_R1)).squeeze(1)


def _softmax(tile: _Tile, q_RD: Tensor, k_CD: Tensor, scale: float, lse_BHM: Tensor) -> Tensor:
    lse_R1 = lse_BHM[tile.query_index].reshape(-1, 1)
    return _hide(tile, torch.addmm(-lse_R1, q_RD, k_CD.T, alpha=scale)).exp_()


def _hide(tile: _Tile, logits_RC: Tensor) -> Tensor:
    edge_RC = logits_RC[:, tile.hidden_from :]
    column_C = torch.arange(edge_RC.shape[1], device=edge_RC.device) + (tile.key_index[2].start + tile.hidden_from)
    edge_RC.masked_fill_((column_C > tile.row_R[:, None]) | (column_C < tile.start_R[:, None]), MASKED)
    return logits_RC
