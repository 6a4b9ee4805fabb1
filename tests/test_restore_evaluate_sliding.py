"""Every token of a document is predicted once, with at least half a window before it once the window is full."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from ard_serve.errors import DataError
from restore.evaluation import sliding
from restore.evaluation.results import SlidingScore

BOS = 256


class Oracle:
    """A reader that notes which token it predicts after how many others; its log-probability is minus the token."""

    def __init__(self) -> None:
        self.context: dict[int, int] = {}
        self.predicted = 0

    def log_probs(self, rows: Sequence[Sequence[int]], positions: Sequence[int], advance: Callable[[int], None]) -> np.ndarray:
        for row in rows:
            for position in positions:
                self.context[row[position]] = position
                self.predicted += 1
        return -np.array([[float(row[position]) for position in positions] for row in rows])


def measure(documents: Sequence[np.ndarray], lengths: Sequence[int], count: int = 99) -> tuple[Oracle, list[SlidingScore]]:
    oracle = Oracle()
    return oracle, sliding.measure(oracle, documents, [BOS], lengths, count, "test")  # type: ignore[arg-type]


def test_a_long_document_is_read_through_a_window_that_moves_by_its_half() -> None:
    oracle, (found,) = measure([np.arange(1000, 1100)], [32])
    assert sorted(oracle.context) == list(range(1000, 1095)), "31 tokens, then 16 more for each of four windows"
    assert oracle.predicted == 95, "each once"
    assert all(context >= 16 for token, context in oracle.context.items() if token >= 1016)
    assert (found.documents, found.length) == ("long", 32)
    assert found.nll[0] == pytest.approx(np.arange(1000, 1095).mean())


def test_short_and_long_documents_are_apart() -> None:
    documents = [np.arange(0, 20), np.arange(100, 164), np.arange(1000, 1040), np.arange(0, 0)]
    short, long, longest = measure(documents, [24, 48])[1]
    assert [(score.documents, score.length, len(score.nll)) for score in (short, long, longest)] == [
        ("short", 24, 1),
        ("long", 24, 1),
        ("long", 48, 1),
    ]
    assert short.value == pytest.approx(math.exp(9.5)), "the document of 20 tokens; the one of 40 is neither"
    assert long.title == "perplexity, sliding over 24 tokens, long documents"


def test_at_most_the_asked_number_of_windows_is_read() -> None:
    oracle, _ = measure([np.arange(1000, 1100)], [32], count=2)
    assert sorted(oracle.context) == list(range(1000, 1047))


def test_a_document_that_fills_no_window_is_refused() -> None:
    with pytest.raises(DataError, match="has 21 tokens, the longest sliding window 32"):
        measure([np.arange(20)], [16, 32])
