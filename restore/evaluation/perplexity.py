"""Perplexity of long windows, by window length and by position.

Windows of every length end at the same places of the same documents, so what differs between two lengths is the context
and never the text that is predicted.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ard_serve.console import Bar
from ard_serve.errors import DataError
from restore.evaluation.likelihood import hidden_states, token_log_probs
from restore.evaluation.results import PerplexityScore, PositionCurve

_TAIL_TOKENS = 1024
_FIRST_EDGE = 64
_BUCKET_SAMPLES = 256


def cut_windows(documents: Sequence[np.ndarray], bos: Sequence[int], lengths: Sequence[int], count: int) -> dict[int, Tensor]:
    """Cut `count` windows [count, length] of each length, spread evenly over all places where the longest one fits.

    Args:
        documents: token ids of whole documents; a window never crosses into the next one.
        bos: what the tokenizer puts before a text, put before every window and counted in its length.

    Raises:
        DataError: no document is as long as the longest window.
    """
    longest = max(lengths) - len(bos)
    room = np.array([max(0, len(ids) - longest + 1) for ids in documents])
    if not room.any():
        most = max((len(ids) for ids in documents), default=0)
        raise DataError(
            f"the longest held-out document has {most} tokens, the longest window {max(lengths)}: "
            "give a longer document or shorter --lengths"
        )
    ends = []
    for place in ((np.arange(count) + 0.5) / count * room.sum()).astype(int):
        document = int(np.searchsorted(room.cumsum(), place, side="right"))
        ends.append((document, longest + int(place - room[:document].sum())))
    return {length: torch.stack([_cut(documents[d], bos, end, length) for d, end in ends]) for length in lengths}


def _cut(ids: np.ndarray, bos: Sequence[int], end: int, length: int) -> Tensor:
    return torch.tensor([*bos, *ids[end - length + len(bos) : end].tolist()])


@torch.inference_mode()
def measure(
    model: PreTrainedModel, windows: dict[int, Tensor], batch_tokens: int, bar: Bar
) -> tuple[list[PerplexityScore], PositionCurve]:
    """Perplexity of each length over its last min(1024, length / 2) tokens, and by position in the longest windows.

    The curve samples at most 256 positions of each bucket. `bar` advances by the tokens read.
    """
    scores, curve = [], None
    for length, ids_WT in sorted(windows.items()):
        buckets = position_buckets(length)
        tail = torch.arange(length - min(_TAIL_TOKENS, length // 2), length)
        sampled = [_spread(start, end) for start, end in pairwise(buckets)] if length == max(windows) else []
        nll = _nll(model, ids_WT, [tail, *sampled], batch_tokens, bar)
        scores.append(PerplexityScore(length=length, window_nll=tuple(nll[0].mean(1).tolist())))
        if sampled:
            curve = PositionCurve(edges=buckets, perplexity=tuple(float(part.mean().clamp(max=700).exp()) for part in nll[1:]))
    assert curve is not None, "windows hold at least one length"
    return scores, curve


def position_buckets(length: int) -> tuple[int, ...]:
    """Edges of the position buckets: 1, 64, then two an octave up to `length`."""
    octaves = np.arange(0, 2 * np.log2(max(length / _FIRST_EDGE, 1)))
    edges = {int(_FIRST_EDGE * 2 ** (step / 2)) for step in octaves}
    return (1, *sorted(edge for edge in edges if edge < length), length)


def _spread(start: int, end: int) -> Tensor:
    return torch.linspace(start, end - 1, min(_BUCKET_SAMPLES, end - start), dtype=torch.float64).long()


def _nll(model: PreTrainedModel, ids_WT: Tensor, groups: Sequence[Tensor], batch_tokens: int, bar: Bar) -> list[Tensor]:
    """Negative log-likelihood [W, len(group)] in float64 of the tokens at each group of positions."""
    positions = torch.cat(list(groups))
    rows = []
    for batch_BT in torch.split(ids_WT, max(1, batch_tokens // ids_WT.shape[1])):
        hidden_BTC = hidden_states(model, batch_BT)
        for ids_T, hidden_TC in zip(batch_BT, hidden_BTC, strict=True):
            log_probs, _ = token_log_probs(model, hidden_TC[positions.to(hidden_TC.device) - 1], ids_T[positions])
            rows.append(-log_probs.double())
        bar.advance(batch_BT.numel())
    return list(torch.split(torch.stack(rows), [len(group) for group in groups], dim=1))
