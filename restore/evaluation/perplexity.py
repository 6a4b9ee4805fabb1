"""Perplexity of long windows, by window length and by position.

The same tokens are predicted at every length, by windows of that length: what differs between two lengths is the context and
never the text. A short window predicts its last half alone, so that several of them predict what one long window does.

Shapes: W windows, T tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Cut:
    """Windows of one length and the positions that are predicted in each."""

    ids_WT: Tensor
    scored: range


def cut_windows(
    documents: Sequence[np.ndarray], bos: Sequence[int], lengths: Sequence[int], count: int
) -> dict[int, tuple[Cut, ...]]:
    """Cut windows [count, length] of each length, spread evenly over all places where the longest one fits.

    The cuts of a length predict the same min(1024, longest / 2) tokens at each place, the last of the longest window.

    Args:
        documents: token ids of whole documents; a window never crosses into the next one.
        bos: what the tokenizer puts before a text, put before every window and counted in its length.
        lengths: tokens of a window.
        count: places.

    Raises:
        DataError: no document is as long as the longest window.
    """
    longest = max(lengths)
    ends = places(documents, bos, longest, count)
    return {
        length: tuple(
            Cut(torch.stack([_cut(documents[d], bos, end - before, length) for d, end in ends]), scored)
            for before, scored in _cuts(length, longest)
        )
        for length in lengths
    }


def _cuts(length: int, longest: int) -> Iterator[tuple[int, range]]:
    """How far before the end of the longest window each window ends, and what it predicts."""
    tail, most = min(_TAIL_TOKENS, longest // 2), length // 2
    for stop in range(tail, 0, -most):  # of what is predicted, in tokens from the start of the tail
        before = min(tail - stop, longest - length)  # none begins before the longest does
        last = length - (tail - stop - before)
        yield before, range(last - min(most, stop), last)


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


def measure(reader: Reader, windows: dict[int, tuple[Cut, ...]], bar: Bar) -> tuple[list[PerplexityScore], PositionCurve]:
    """Perplexity of each length over the tokens that its cuts predict, and by position in the longest windows.

    The curve samples at most 256 positions of each bucket. `bar` advances by the tokens read.
    """
    *shorter, (longest, (whole,)) = sorted(windows.items())
    scores = []
    for length, cuts in shorter:
        nll_WT = np.concatenate([-reader.log_probs(cut.ids_WT.tolist(), cut.scored, bar.advance) for cut in cuts], axis=1)
        scores.append(_score(length, nll_WT))
    edges = position_buckets(longest)
    groups = [np.array(whole.scored), *(_spread(start, end) for start, end in pairwise(edges))]
    nll_WT = -reader.log_probs(whole.ids_WT.tolist(), np.concatenate(groups).tolist(), bar.advance)
    last_WT, *sampled = np.split(nll_WT, np.cumsum([len(group) for group in groups])[:-1], axis=1)
    curve = PositionCurve(edges=edges, perplexity=tuple(math.exp(min(part_WT.mean(), 700)) for part_WT in sampled))
    return [*scores, _score(longest, last_WT)], curve


def _score(length: int, nll_WT: np.ndarray) -> PerplexityScore:
    return PerplexityScore(length=length, window_nll=tuple(nll_WT.mean(1).tolist()))


def position_buckets(length: int) -> tuple[int, ...]:
    """Edges of the position buckets: 1, 64, then two an octave up to `length`."""
    octaves = np.arange(0, 2 * np.log2(max(length / _FIRST_EDGE, 1)))
    edges = {int(_FIRST_EDGE * 2 ** (step / 2)) for step in octaves}
    return (1, *sorted(edge for edge in edges if edge < length), length)


def _spread(start: int, end: int) -> np.ndarray:
    return np.linspace(start, end - 1, min(_BUCKET_SAMPLES, end - start)).astype(int)
