"""Facts woven into windows: told before they are asked for, answers where they are said to be, length kept."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ard_serve.errors import UsageError
from restore import retrieval
from restore.evaluation import needles
from restore.loading import load_tokenizer
from restore.retrieval import Weaver


@pytest.fixture(scope="module")
def tokenizer(make_checkpoint: Callable[..., Path]) -> Any:
    return load_tokenizer(make_checkpoint("llama3"))


@pytest.fixture(scope="module")
def window(tokenizer: Any, texts: Path) -> torch.Tensor:
    ids = tokenizer((texts / "book-0.txt").read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor((ids * 4)[:8000])[None]


def test_every_answer_was_told_before_and_lies_where_it_is_said_to(tokenizer: Any, window: torch.Tensor) -> None:
    woven = Weaver(tokenizer, spacing=512).weave(window, (0,))
    assert woven.ids_BT.shape == window.shape
    text = tokenizer.decode(woven.ids_BT[0])
    # One byte is one token here, so that places in the text are places in the window.
    spans = np.split(woven.answers_N.numpy(), np.flatnonzero(np.diff(woven.answers_N.numpy()) > 1) + 1)
    assert len(spans) == 8000 // 512
    for span in spans:
        value = text[span[0] : span[-1] + 1]
        assert value.startswith(" ")
        assert re.search(r"\?.*$", text[: span[0]].rsplit("\n", 1)[-1]), "a question stands before the answer"
        assert f"{value}" in text[: span[0]], "and the fact before the question"


def test_facts_stand_between_sentences(tokenizer: Any, window: torch.Tensor) -> None:
    text = tokenizer.decode(Weaver(tokenizer, spacing=2000).weave(window, (1,)).ids_BT[0])
    for told in re.finditer(r" (?:The locker of|In the register,|A letter for) ", text):
        assert text[: told.start()].endswith((".", "\n"))


def test_a_seed_gives_the_same_window(tokenizer: Any, window: torch.Tensor) -> None:
    weaver = Weaver(tokenizer, spacing=512)
    first, again, other = (weaver.weave(window, seed) for seed in ((5, 0), (5, 0), (5, 1)))
    assert torch.equal(first.ids_BT, again.ids_BT)
    assert torch.equal(first.answers_N, again.answers_N)
    assert not torch.equal(first.ids_BT, other.ids_BT)


def test_a_window_too_short_for_a_fact_is_refused(tokenizer: Any, window: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="long_window = 100: too short"):
        Weaver(tokenizer, spacing=512).weave(window[:, :100], (0,))


def test_nothing_of_the_evaluations_wording_is_trained(tokenizer: Any) -> None:
    """Neither a key nor four words in a row of any needle."""
    evaluated = Path(needles.__file__).read_text().lower()
    ours = " ".join(statement + question for statement, question in retrieval._KINDS).lower()
    words = re.findall(r"[a-z]+", ours)
    grams = {" ".join(words[i : i + 4]) for i in range(len(words) - 3)}
    assert not [gram for gram in grams if gram in evaluated]
    names = {retrieval._name(np.random.default_rng(seed)) for seed in range(2000)}
    assert names.isdisjoint(needles._KEYS)
