"""Facts woven into windows: told before they are asked for, answers where they are said to be, length kept."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ard_serve.errors import UsageError
from restore import retrieval
from restore.evaluation import needles, reading
from restore.evaluation.haystack import Quiz
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


def four_grams(text: str) -> set[str]:
    words = re.findall(r"[a-z]+", text.replace("\\n", " ").lower())
    return {" ".join(words[i : i + 4]) for i in range(len(words) - 3)}


def asked(quiz: Quiz) -> str:
    return " ".join((quiz.intro, *quiz.statements, quiz.question))


def test_nothing_of_the_evaluations_wording_is_trained() -> None:
    """Neither a key nor four words in a row of any prompt, as its program says them and as it asks them."""
    quizzes = [make(np.random.default_rng(0)) for make in needles._QUIZZES.values()]
    quizzes.append(reading._quiz({"question": "Who?", "answer": "garden", "facts": ["John."]}))
    evaluated = [*map(inspect.getsource, (needles, reading)), *map(asked, quizzes)]
    ours = " ".join(statement + question for statement, question in retrieval._KINDS)
    assert four_grams(ours).isdisjoint(set().union(*map(four_grams, evaluated)))
    names = {retrieval._name(np.random.default_rng(seed)) for seed in range(2000)}
    assert names.isdisjoint(needles._KEYS)


def test_numbers_as_long_as_a_needle_are_never_trained() -> None:
    """Those of five digits are, which variable tracking hides: it tells them in the question and asks for names."""
    generator = np.random.default_rng(0)
    trained = {len(number) for _ in range(5000) for number in re.findall(r"\d+", retrieval._value(generator))}
    answers = {task: make(generator).answers for task, make in needles._QUIZZES.items()}
    assert all(name.isalpha() for name in answers.pop("variable_tracking"))
    assert {len(number) for numbers in answers.values() for number in numbers} == {6}
    assert trained == {2, 3, 4, 5, 7, 8}
