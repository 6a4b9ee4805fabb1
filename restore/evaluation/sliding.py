"""Sliding perplexity: every token of a document is predicted once, short documents and long ones apart."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ard_serve.console import Bar, progress
from ard_serve.errors import DataError
from restore.evaluation.reader import Reader
from restore.evaluation.results import SlidingScore


def measure(
    reader: Reader, documents: Sequence[np.ndarray], bos: Sequence[int], lengths: Sequence[int], count: int, name: str
) -> list[SlidingScore]:
    """Read documents up to the shortest length whole, and longer ones through a window of each length that moves by its half.

    A token far enough inside a long document has between half a window and a whole one before it. At most `count` windows of
    a document are read, and what is left behind its last whole window is not.

    Args:
        reader: the model.
        documents: token ids of whole documents.
        bos: what the tokenizer puts before a text, put before every window and counted in its length.
        lengths: of the windows.
        count: most windows of one document.
        name: of the model, for the progress bar.

    Raises:
        DataError: no document fills the longest window.
    """
    short, long = split(documents, bos, lengths)
    with progress(f"{name}: whole documents", len(short) + len(long) * len(lengths)) as bar:
        found = [_score("short", min(lengths), [_whole(reader, ids, bos, bar) for ids in short])] if short else []
        found += [
            _score("long", length, [_slide(reader, ids, bos, length, count, bar) for ids in long]) for length in sorted(lengths)
        ]
    return found


def split(
    documents: Sequence[np.ndarray], bos: Sequence[int], lengths: Sequence[int]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The documents that are read whole and those that are read through windows; raises what `measure` raises."""
    sizes = [len(bos) + len(ids) for ids in documents]
    short = [ids for ids, size in zip(documents, sizes, strict=True) if 1 < size < min(lengths)]
    # The same documents at every length, so that lengths compare.
    long = [ids for ids, size in zip(documents, sizes, strict=True) if size >= max(lengths)]
    if not long:
        raise DataError(
            f"the longest held-out document has {max(sizes, default=0)} tokens, the longest sliding window {max(lengths)}: "
            "give a longer document or shorter --sliding"
        )
    return short, long


def _score(documents: Literal["short", "long"], length: int, nll: Sequence[float]) -> SlidingScore:
    return SlidingScore(documents=documents, length=length, nll=tuple(nll))


def _whole(reader: Reader, ids: np.ndarray, bos: Sequence[int], bar: Bar) -> float:
    row = [*bos, *ids.tolist()]
    nll = -reader.log_probs([row], range(1, len(row)), _ignore)
    bar.advance()
    return float(nll.mean())


def _slide(reader: Reader, ids: np.ndarray, bos: Sequence[int], length: int, count: int, bar: Bar) -> float:
    """Mean negative log-likelihood of a document's tokens."""
    width, step = length - len(bos), length // 2
    rows = [[*bos, *ids[at : at + width].tolist()] for at in range(0, len(ids) - width + 1, step)][:count]
    nll = [-reader.log_probs(rows[:1], range(1, length), _ignore).ravel()]
    if rows[1:]:
        nll.append(-reader.log_probs(rows[1:], range(length - step, length), _ignore).ravel())
    bar.advance()
    return float(np.concatenate(nll).mean())


def _ignore(tokens: int) -> None:
    """Progress is counted in documents."""
