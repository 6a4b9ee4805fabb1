"""Questions over long text: the evidence is in the prompt once, in order, and the prompt fills its window."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from ard_serve.errors import DataError
from restore import loading
from restore.evaluation import retrieval
from restore.evaluation.config import EvalConfig
from restore.evaluation.haystack import Haystack
from restore.evaluation.likelihood import Loaded
from restore.evaluation.reading import Reading

BOS = 256
LENGTH = 900


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama3", seed=5)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    return loading.load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def book(tokenizer: PreTrainedTokenizerBase) -> Haystack:
    text = "".join(f"On day {i} nothing stirred in the harbour. " for i in range(60))
    return Haystack(tokenizer, [np.array(tokenizer(text, add_special_tokens=False)["input_ids"])], [BOS])


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def paragraphs(count: int) -> list[dict[str, Any]]:
    return [
        {
            "title": f"Town {i}",
            "context": f"Town {i} was founded in the year {1000 + i} by fishermen. It has a mill and a tower.",
            "question": f"When was town {i} founded?",
            "answers": [str(1000 + i)],
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_paragraph_is_hidden_once_among_those_of_other_titles(
    tokenizer: PreTrainedTokenizerBase, book: Haystack, tmp_path: Path, depth: float
) -> None:
    reading = Reading(write(tmp_path / "towns.jsonl", paragraphs(40)), tokenizer, book)
    for sample in range(5):
        prompt = reading.prompt(LENGTH, depth, sample, seed=0)
        text = book.decode(prompt.ids)
        assert len(prompt.ids) + prompt.new_tokens == LENGTH
        assert text.count(f"founded in the year {prompt.answers[0]} by") == 1
        assert text.count("by fishermen") > 5
        assert f"When was town {int(prompt.answers[0]) - 1000} founded?" in text
        assert prompt.score(f" It was {prompt.answers[0]}.") == 1.0


def test_every_other_title_lends_its_paragraphs(tokenizer: PreTrainedTokenizerBase, book: Haystack, tmp_path: Path) -> None:
    """SQuAD's other half of titles has 64,815 tokens of SmolLM2, a study's prompt of 65,536 wanted 65,300."""
    items = paragraphs(30)
    for item in items[::3]:
        items += [item | {"context": f"A second paragraph on {item['title']} tells nothing."}]
    items += [items[1] | {"title": "Town 2"}]  # a paragraph of two titles is evidence for both
    reading = Reading(write(tmp_path / "towns.jsonl", items), tokenizer, book)
    length, own = 2700, sum(len(tokenizer.encode(str(item["context"]))) for item in items)
    assert own / 2 < length - 300 < own
    titles = set()
    for sample in range(len(items)):
        prompt = reading.prompt(length, 0.5, sample, seed=0)
        text = book.decode(prompt.ids)
        town = int(prompt.answers[0]) - 1000
        titles.add(town)
        assert len(prompt.ids) + prompt.new_tokens == length
        seen = [f"founded in the year {1000 + town} by" in text, f"A second paragraph on Town {town} tells" in text]
        assert sum(seen) == 1, "its own title's paragraphs are not in there, but for the evidence"
        assert text.count(f"founded in the year {1000 + town} by") <= 1
    assert len(titles) == 30, "every title is asked about"


def test_too_few_paragraphs_are_named_by_task_file_and_title(book: Haystack, tmp_path: Path) -> None:
    path = write(tmp_path / "towns.jsonl", paragraphs(10))
    fields = {"data": ("x",), "needle_lengths": (600, 5000), "needle_tasks": (), "reading": (str(path),)}
    expected = (
        r"^towns: .*/towns\.jsonl, paragraphs of titles other than 'Town \d': \d+ tokens are too few, a prompt of 5000 needs"
    )
    with pytest.raises(DataError, match=expected):
        retrieval.check(book, EvalConfig.model_validate(fields))
    with pytest.raises(DataError, match=r"^single: the longest document: \d+ tokens are too few, a prompt of 5000 needs"):
        retrieval.check(book, EvalConfig.model_validate(fields | {"needle_tasks": ("single",), "reading": ()}))


def test_the_same_questions_are_asked_at_every_length_and_depth(
    tokenizer: PreTrainedTokenizerBase, book: Haystack, tmp_path: Path
) -> None:
    reading = Reading(write(tmp_path / "towns.jsonl", paragraphs(40)), tokenizer, book)
    asked = {
        place: [reading.prompt(*place, sample, seed=0).answers for sample in range(6)] for place in ((700, 0.0), (900, 1.0))
    }
    assert asked[700, 0.0] == asked[900, 1.0]
    assert len(set(asked[700, 0.0])) == 6


def test_facts_are_hidden_in_the_book_in_order(tokenizer: PreTrainedTokenizerBase, book: Haystack, tmp_path: Path) -> None:
    facts = ["John went to the hall.", "John took the milk.", "John went to the garden."]
    item = {"question": "Where is John?", "answer": "garden", "facts": facts}
    reading = Reading(write(tmp_path / "qa1.jsonl", [item]), tokenizer, book)
    prompt = reading.prompt(LENGTH, 0.5, 0, seed=3)
    text = book.decode(prompt.ids)
    places = [text.index(fact) for fact in facts]
    assert places == sorted(places)
    assert "nothing stirred" in text
    assert len(prompt.ids) + prompt.new_tokens == LENGTH


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"question": "q", "answers": [], "context": "c", "title": "t"}',
        '{"question": "q", "answers": ["a"], "context": "c"}',
        '{"question": "q", "answer": "a", "facts": []}',
        '{"question": "q", "answer": "a", "facts": ["f"]}',
        '{"question": "q", "answers": "abc", "context": "c", "title": "t"}',
        "[1]",
    ],
)
def test_a_bad_question_is_named_by_file_and_line(
    tokenizer: PreTrainedTokenizerBase, book: Haystack, tmp_path: Path, line: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(paragraphs(1)[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: expected question"):
        Reading(path, tokenizer, book)


def test_blank_lines_and_separators_inside_a_paragraph_end_no_question(
    tokenizer: PreTrainedTokenizerBase, book: Haystack, tmp_path: Path
) -> None:
    path = tmp_path / "towns.jsonl"
    lines = [json.dumps(item | {"question": "a\u2028b?"}, ensure_ascii=False) for item in paragraphs(40)]
    path.write_text("\n\n".join(lines) + "\n\n", encoding="utf-8")
    assert "a\u2028b?" in book.decode(Reading(path, tokenizer, book).prompt(LENGTH, 0.5, 0, seed=0).ids)


def test_an_answer_without_words_is_not_what_a_model_that_writes_nothing_gives(
    tokenizer: PreTrainedTokenizerBase, book: Haystack, tmp_path: Path
) -> None:
    """SQuAD has questions that one annotator answered with "."."""
    items = [{"question": f"Question {i}?", "answers": ["intervention", "."], "facts": ["So it was."]} for i in range(3)]
    items[0]["answers"] = [".", "The", "…"]
    reading = Reading(write(tmp_path / "signs.jsonl", items), tokenizer, book)
    prompts = [reading.prompt(LENGTH, 0.5, sample, seed=0) for sample in range(6)]
    assert not any("Question 0?" in book.decode(prompt.ids) for prompt in prompts)
    assert {prompt.score(output) for prompt in prompts for output in ("", " .", "\n", " the")} == {0.0}
    assert {prompt.score(" Intervention.") for prompt in prompts} == {1.0}
    with pytest.raises(DataError, match="no questions with an answer of words"):
        Reading(write(tmp_path / "signs.jsonl", items[:1]), tokenizer, book)


def test_reading_is_measured_beside_the_needles(checkpoint: Path, book: Haystack, tmp_path: Path) -> None:
    path = write(tmp_path / "towns.jsonl", paragraphs(40))
    fields = {"reading": (str(path),), "needle_lengths": (600, 900), "needle_depths": (0.5,), "needle_samples": 2}
    config = EvalConfig.model_validate({"data": ("x",)} | fields)
    found = retrieval.measure(Loaded(loading.load(checkpoint, torch.float32), 4096), book, config, "tiny")
    assert [(score.task, score.length) for score in found] == [("single", 600), ("single", 900), ("towns", 600), ("towns", 900)]
    assert all(len(score.samples) == 2 for score in found)
