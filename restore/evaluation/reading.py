"""Questions over long text, from local JSONL files.

A file is one task; its items are of one kind, told by their fields:
  {"question", "answers", "context", "title"}   the paragraph is hidden among paragraphs of other titles (SQuAD, NQ-open)
  {"question", "answer", "facts"}               the facts are hidden, in order, in book text (bAbI, as BABILong does)
An answer of punctuation or articles alone, as SQuAD has ".", is left out, and a question that has no other is not asked.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ard_serve.errors import DataError
from restore.data import json_lines, parse_line
from restore.evaluation.haystack import Haystack, Prompt, Quiz, has_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEPARATOR = "\n\n"
_INTRO = "Answer the question from the following text. Give only the answer and no other words.\n\n"


class Reading:
    """One task: questions, and the text their evidence is hidden in."""

    def __init__(self, path: Path, tokenizer: "PreTrainedTokenizerBase", book: Haystack) -> None:
        """Read a file.

        Raises:
            DataError: names the file and the line that is of no known kind.
        """
        self.name, self._path, self._tokenizer, self._book = path.stem, path, tokenizer, book
        self._items = _read(path)
        self._titles: dict[str, set[str]] = {}  # of each paragraph, in the file's order
        for item in self._items:
            if "facts" not in item:
                self._titles.setdefault(item["context"].strip(), set()).add(item["title"])
        self._ids = [np.array(book.encode(_SEPARATOR + paragraph)) for paragraph in self._titles]
        self._among: dict[str, Haystack] = {}

    def prompt(self, length: int, depth: float, sample: int, seed: int) -> Prompt:
        """Prompt number `sample`; the same question at every length and depth.

        Raises:
            DataError: the text is too short for the length, or the length for the question.
        """
        order = np.random.default_rng((seed, zlib.crc32(self.name.encode()))).permutation(len(self._items))
        item = self._items[order[sample % len(order)]]
        generator = np.random.default_rng((seed, length, round(1000 * depth), sample))
        haystack = self._book if "facts" in item else self._others(item["title"])
        return haystack.hide(_quiz(item), length, depth, generator)

    def _others(self, title: str) -> Haystack:
        """The paragraphs of every other title, so that the evidence is in the prompt once.

        Also what other questions ask about: half of SQuAD's titles, kept apart as distractors, are too few for 65,536 tokens.
        What is still too short is refused. Repeated paragraphs, or a book behind them, would make the long prompts another task
        than the short ones: evidence that is in there once stands out among copies, as an encyclopedia's does in a novel.
        """
        if title not in self._among:
            others = [ids for ids, titles in zip(self._ids, self._titles.values(), strict=True) if title not in titles]
            text = np.concatenate(others) if others else np.zeros(0, dtype=np.int64)
            origin = f"{self._path}, paragraphs of titles other than '{title}'"
            self._among[title] = Haystack(self._tokenizer, [text], self._book.bos, origin)
        return self._among[title]


def _read(path: Path) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    for number, line in json_lines(path):
        try:
            item = parse_line(path, number, line)
            quiz = _quiz(item)
            kind = "facts" in item
            usable = kind == ("facts" in (items or [item])[0]) and (kind or isinstance(item["title"], str))
        except (ValueError, KeyError, TypeError, AttributeError):
            usable = False
        if not usable:
            raise DataError(f"{path}:{number}: expected question, answers, context and title, or question, answer and facts")
        if quiz.answers:
            items.append(item)
    if not items:
        raise DataError(f"{path}: the file holds no questions with an answer of words or numbers")
    return items


def _quiz(item: dict[str, Any]) -> Quiz:
    scattered = "facts" in item
    if isinstance(item.get("facts"), str) or isinstance(item.get("answers"), str):
        raise ValueError("a list, not the letters of a text")
    evidence: Sequence[str] = item["facts"] if scattered else [item["context"]]
    answers = tuple(item["answers"]) if "answers" in item else (item["answer"],)
    if not answers or not evidence or not all(isinstance(text, str) and text.strip() for text in (*answers, *evidence)):
        raise ValueError("an item needs an answer and evidence")
    return Quiz(
        _INTRO,
        tuple(f" {text.strip()}" if scattered else _SEPARATOR + text.strip() + _SEPARATOR for text in evidence),
        f"\n\nQuestion: {item['question']}\nAnswer:",
        tuple(filter(has_words, answers)),
        judge="any",
        ordered=True,
    )
