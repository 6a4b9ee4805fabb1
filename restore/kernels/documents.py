"""Which columns a row may see: one span of positions per token, from a padding mask or from packed documents.

Shapes: B batch, T tokens, N documents. No function here waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """The document of every token, int32: row i sees columns start[i]..i, column j is seen by rows j..end[j]-1.

    A token of no document (padding) has start = T and end = 0, so that it sees nothing and nothing sees it.
    """

    start_BT: Tensor
    end_BT: Tensor


def spans_of_mask(mask_BT: Tensor) -> Spans:
    """Each unbroken run of true values is a document; left and right padding are the common cases."""
    mask_BT = mask_BT.bool()
    before_BT = torch.nn.functional.pad(mask_BT, (1, -1))
    return _spans(mask_BT, starts_BT=mask_BT & ~before_BT)


def spans_of_lengths(cu_seqlens: Tensor, tokens: int) -> Spans:
    """Documents packed one behind the other into a batch of one, from their cumulative lengths [N + 1], first 0."""
    position_T = torch.arange(tokens, device=cu_seqlens.device)
    document_T = torch.searchsorted(cu_seqlens, position_T, right=True) - 1
    inside_T = (document_T >= 0) & (document_T < len(cu_seqlens) - 1)
    starts_T = cu_seqlens[document_T.clamp(min=0)] == position_T
    return _spans(inside_T[None], starts_BT=(inside_T & starts_T)[None])


def _spans(inside_BT: Tensor, starts_BT: Tensor) -> Spans:
    tokens = inside_BT.shape[1]
    position_T = torch.arange(tokens, device=inside_BT.device, dtype=torch.int32)
    start_BT = torch.where(starts_BT, position_T, 0).cummax(1).values
    boundary_BT = torch.where(starts_BT | ~inside_BT, position_T, tokens)
    # The first boundary strictly behind each position.
    after_BT = torch.nn.functional.pad(boundary_BT[:, 1:], (0, 1), value=tokens)
    end_BT = after_BT.flip(1).cummin(1).values.flip(1)
    return Spans(torch.where(inside_BT, start_BT, tokens).int(), torch.where(inside_BT, end_BT, 0).int())
