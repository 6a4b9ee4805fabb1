"""Perplexity of long windows, by window length and by position.

Windows of every length end at the same places of the same documents, so what differs between two lengths is the context
and never the text that is predicted.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ard_serve.console import Bar
from ard_serve.errors import DataError
from restore.evaluation.reader import Reader
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
    longest = max(lengths)
    ends = places(documents, bos, longest, count)
    return {length: torch.stack([_cut(documents[d], bos, end, length) for d, end in ends]) for length in lengths}


def places(documents: Sequence[np.ndarray], bos: Sequence[int], length: int, count: int) -> list[tuple[int, int]]:
    """Number and end of the document's part that each of `count` windows of `length` tokens holds, spread evenly.

    Raises:
        DataError: no document is as long as one.
    """
    longest = length - len(bos)
    room = np.array([max(0, len(ids) - longest + 1) for ids in documents])
    if not room.any():
        most = max((len(ids) for ids in documents), default=0)
        raise DataError(
            f"the longest held-out document has {most} tokens, the longest window {length}: "
            "give a longer document or shorter --lengths"
        )
    ends = []
    for place in ((np.arange(count) + 0.5) / count * room.sum()).astype(int):
        document = int(np.searchsorted(room.cumsum(), place, side="right"))
        ends.append((document, longest + int(place - room[:document].sum())))
    return ends


def _cut(ids: np.ndarray, bos: Sequence[int], end: int, length: int) -> Tensor:
    return torch.tensor([*bos, *ids[end - length + len(bos) : end].tolist()])


def measure(reader: Reader, windows: dict[int, Tensor], bar: Bar) -> tuple[list[PerplexityScore], PositionCurve]:
    """Perplexity of each length over its last min(1024, length / 2) tokens, and by position in the longest windows.

    The curve samples at most 256 positions of each bucket. `bar` advances by the tokens read.
    """
    scores, curve = [], None
    for length, ids_WT in sorted(windows.items()):
        buckets = position_buckets(length)
        tail = np.arange(length - min(_TAIL_TOKENS, length // 2), length)
        sampled = [_spread(start, end) for start, end in pairwise(buckets)] if length == max(windows) else []
        groups = [tail, *sampled]
        nll = -reader.log_probs(ids_WT.tolist(), np.concatenate(groups).tolist(), bar.advance)
        last_nll, *sampled_nll = np.split(nll, np.cumsum([len(group) for group in groups])[:-1], axis=1)
        scores.append(PerplexityScore(length=length, window_nll=tuple(last_nll.mean(1).tolist())))
        if sampled:
            curve = PositionCurve(edges=buckets, perplexity=tuple(math.exp(min(part.mean(), 700)) for part in sampled_nll))
    assert curve is not None, "windows hold at least one length"
    return scores, curve


def position_buckets(length: int) -> tuple[int, ...]:
    """Edges of the position buckets: 1, 64, then two an octave up to `length`."""
    octaves = np.arange(0, 2 * np.log2(max(length / _FIRST_EDGE, 1)))
    edges = {int(_FIRST_EDGE * 2 ** (step / 2)) for step in octaves}
    return (1, *sorted(edge for edge in edges if edge < length), length)


def _spread(start: int, end: int) -> np.ndarray:
    return np.linspace(start, end - 1, min(_BUCKET_SAMPLES, end - start)).astype(int)
