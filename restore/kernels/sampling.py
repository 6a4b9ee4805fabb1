"""Random query rows for an unbiased estimate of a mean over all rows.

Shapes: B batch, H heads, T tokens, M sampled rows, D head channels.
"""

import torch
from torch import Tensor


def sample_rows(q_BHTD: Tensor, rows: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """One uniformly drawn row from each of `rows` near-equal stretches of T, for every head.

    Stratified: never a row twice, sorted, and less variance than independent draws.

    Returns:
        int32 positions [B, H, M], ascending, and the fp32 weights [M] (the lengths of the stretches) under which the sum
        over sampled rows has the sum over all T rows as its expectation.
    """
    batch, heads, tokens, _ = q_BHTD.shape
    edge = torch.arange(rows + 1, device=q_BHTD.device) * tokens // rows
    length_M = edge[1:] - edge[:-1]
    uniform_BHM = torch.rand(batch, heads, rows, device=q_BHTD.device, generator=generator)
    offset_BHM = torch.minimum((uniform_BHM * length_M).long(), length_M - 1)
    return (edge[:-1] + offset_BHM).int(), length_M.float()


def take_rows(q_BHTD: Tensor, row_BHM: Tensor) -> Tensor:
    """The rows `row_BHM` of each head: [B, H, M, D]."""
    return q_BHTD.gather(2, row_BHM.long()[..., None].expand(*row_BHM.shape, q_BHTD.shape[3]))
