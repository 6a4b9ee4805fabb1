"""Perplexity is what a direct computation over full logits gives, and windows of every length predict the same text."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ard_serve.console import progress
from ard_serve.errors import DataError
from restore import loading
from restore.evaluation import perplexity
from restore.evaluation.likelihood import Loaded
from restore.evaluation.results import PerplexityScore, PositionCurve

BOS = 256


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> PreTrainedModel:
    return loading.load(make_checkpoint("qwen3", seed=3), torch.float64)


def documents(*sizes: int) -> list[np.ndarray]:
    return [np.random.default_rng(size).integers(0, 256, size) for size in sizes]


def measure(
    model: PreTrainedModel, windows: dict[int, tuple[perplexity.Cut, ...]], batch_tokens: int = 1
) -> tuple[list[PerplexityScore], PositionCurve]:
    with progress("test", 1) as bar:
        return perplexity.measure(Loaded(model, batch_tokens), windows, bar)


@torch.no_grad()
def direct_nll(model: PreTrainedModel, ids_WT: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood [W, T - 1] of every token but the first, from full logits."""
    log_probs: torch.Tensor = model(ids_WT).logits.double().log_softmax(-1)
    return -log_probs[:, :-1].gather(-1, ids_WT[:, 1:, None])[..., 0]


def test_perplexity_is_that_of_full_logits_over_the_same_tokens_at_every_length(model: PreTrainedModel) -> None:
    windows = perplexity.cut_windows(documents(700, 1500), [BOS], [64, 512], count=3)
    scores, _ = measure(model, windows)
    longest_WT = windows[512][0].ids_WT
    for score in scores:
        # Every token of the tail in a window of its own, as far in as its cut has it.
        cuts = windows[score.length]
        nll = torch.cat([direct_nll(model, cut.ids_WT)[:, [at - 1 for at in cut.scored]] for cut in cuts], dim=1)
        assert sorted(torch.cat([cut.ids_WT[0, cut.scored] for cut in cuts]).tolist()) == sorted(longest_WT[0, -256:].tolist())
        assert score.window_nll == pytest.approx(nll.mean(1).tolist(), rel=1e-6)
        assert score.value == pytest.approx(float(nll.mean().exp()), rel=1e-6)


def test_at_most_1024_tokens_at_a_place_are_predicted(model: PreTrainedModel) -> None:
    windows = perplexity.cut_windows(documents(2600), [], [2500], count=1)
    scores, _ = measure(model, windows)
    nll = direct_nll(model, windows[2500][0].ids_WT)
    assert scores[0].window_nll[0] == pytest.approx(float(nll[:, -1024:].mean()), rel=1e-6)


@pytest.mark.parametrize(
    "lengths", [(64, 4096), (1000, 2048), (2047, 2048), (1024, 1536), (7, 100), (50, 51), (2, 3), (2048, 2500)]
)
def test_every_length_predicts_the_same_tokens_once_with_half_a_window_before_each(lengths: tuple[int, int]) -> None:
    ids = np.arange(6000)  # a token is its place
    windows = perplexity.cut_windows([ids], [], lengths, count=2)
    tail = min(1024, max(lengths) // 2)
    for length, cuts in windows.items():
        for row, longest in enumerate(windows[max(lengths)][0].ids_WT):
            predicted = [int(cut.ids_WT[row, at]) for cut in reversed(cuts) for at in cut.scored]
            assert sorted(predicted) == longest[-tail:].tolist()
            assert all(cut.ids_WT.shape == (2, length) for cut in cuts)
            assert all(int(cut.ids_WT[row, 0]) >= int(longest[0]) for cut in cuts), "inside what the longest window holds"
        assert min(cut.scored.start for cut in cuts) >= length // 2


def test_perplexity_by_position_is_that_of_full_logits(model: PreTrainedModel) -> None:
    windows = perplexity.cut_windows(documents(900), [BOS], [32, 400], count=2)
    _, curve = measure(model, windows)
    assert curve.edges == (1, 64, 90, 128, 181, 256, 362, 400)
    nll = direct_nll(model, windows[400][0].ids_WT)
    for start, end, found in zip(curve.edges, curve.edges[1:], curve.perplexity, strict=False):
        assert found == pytest.approx(float(nll[:, start - 1 : end - 1].mean().exp()), rel=1e-6)


def test_batching_changes_nothing(model: PreTrainedModel) -> None:
    windows = perplexity.cut_windows(documents(900), [BOS], [100, 300], count=5)
    one_by_one, together = measure(model, windows, 1)[0], measure(model, windows, 900)[0]
    for left, right in zip(one_by_one, together, strict=True):
        assert left.window_nll == pytest.approx(right.window_nll, rel=1e-9)


def test_logits_of_a_whole_window_never_exist(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    head = model.lm_head
    handle = head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[:-1].numel()))
    measure(model, perplexity.cut_windows(documents(1500), [BOS], [1400], count=2), 10**6)
    handle.remove()
    assert rows
    assert max(rows) <= 256


def test_windows_are_spread_over_documents_each_behind_its_bos() -> None:
    texts = documents(500, 90, 800)
    cuts = perplexity.cut_windows(texts, [BOS], [50, 200], count=6)
    windows = {length: cuts[length][0].ids_WT for length in cuts}
    drawn = [document for document, _ in perplexity.places(texts, [BOS], 200, count=6)]
    assert windows[50].shape == (6, 50)
    assert windows[200].shape == (6, 200)
    assert torch.equal(windows[50][:, 1:], windows[200][:, -49:])
    assert windows[200][:, 0].tolist() == [BOS] * 6
    joined = [text.tolist() for text in texts]
    ends = []
    for window in windows[200][:, 1:].tolist():
        places = [(d, at) for d, ids in enumerate(joined) for at in range(len(ids) - 198) if ids[at : at + 199] == window]
        assert len(places) == 1
        ends.append(places[0])
    assert {document for document, _ in ends} == {0, 2}, "spread over the documents that are long enough"
    assert drawn == [document for document, _ in ends]
    assert len(set(ends)) == 6


def test_text_shorter_than_the_longest_window_is_refused_with_both_lengths() -> None:
    with pytest.raises(DataError, match=r"has 90 tokens, the longest window 200.*--lengths"):
        perplexity.cut_windows(documents(90, 50), [], [20, 200], count=1)


def test_the_standard_error_is_that_of_the_windows() -> None:
    score = PerplexityScore(length=8, window_nll=(1.0, 2.0, 3.0))
    assert score.value == pytest.approx(np.exp(2.0))
    assert score.stderr == pytest.approx(np.exp(2.0) / np.sqrt(3))
    assert PerplexityScore(length=8, window_nll=(1.0,)).stderr is None
