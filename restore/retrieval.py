"""Facts woven into long text and asked for later in it: what a window of books hardly ever makes a model do.

The wording, the names and the length of the numbers to find are none of the evaluation's (restore/evaluation/needles.py,
RULER), so that finding a needle there is not a matter of having seen its sentence here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ard_serve.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYLLABLES = (
    "ba", "bel", "dor", "fen", "ga", "gri", "hal", "ir", "jo", "kel", "la", "lun", "ma", "mir", "nor", "o", "pel", "qua", "ras",
    "sel", "ta", "tor", "u", "vel", "wen", "yra", "zan",
)  # fmt: skip
# What is told, and how it is asked for; the answer follows the question.
_KINDS = (
    (" The locker of {name} opens with {value}.", "\nWith what does the locker of {name} open? It opens with {value}.\n"),
    (" {name} was sent to room {value} that day.", "\nTo which room was {name} sent? {name} was sent to room {value}.\n"),
    (" In the register, {name} is entered as {value}.", "\nHow is {name} entered in the register? As {value}.\n"),
    (" A letter for {name} carries the mark {value}.", "\nWhat mark does the letter for {name} carry? The mark {value}.\n"),
    (" Remember: {name} owes {value}.", "\nAsked: what does {name} owe? Answered: {name} owes {value}.\n"),
    (" The code word of {name} is {value}.", "\nWhat is the code word of {name}, as the text above has it? It is {value}.\n"),
    (" Note that {value} stands for {name} here.", "\nAbove it says what stands for {name}. What is it? It is {value}.\n"),
    ("\n{name}: {value}\n", "\nAbove there is a line that begins with {name}. What follows in it? {name}: {value}\n"),
)
# Digits of the numbers; those that the evaluation asks for have six. Five are trained, and its variable tracking hides a number
# of five, but tells it in the question and asks for names.
_DIGITS = (2, 3, 4, 5, 7, 8)
# Half of the questions stand together at the end, as a user's question does; the others somewhere behind their fact.
_ASKED_LAST = 0.5
_MOST_OF_WINDOW = 0.5
_SENTENCE_ENDS = (".", "!", "?", '."', '!"', '?"', "\n")


class Woven(NamedTuple):
    """A window with facts in it: `ids_BT` [1, T], and `answers_N`, the places in it of the tokens of every answer."""

    ids_BT: Tensor
    answers_N: Tensor


@dataclass(frozen=True)
class _Insert:
    """Tokens that go in front of token number `at` of the text; `answer` is where in them the answer lies."""

    at: int
    ids: list[int]
    answer: range = range(0)


class Weaver:
    """Weaves one fact for each `spacing` tokens of a window."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", spacing: int) -> None:
        self._tokenizer, self._spacing = tokenizer, spacing
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self._ends_sentence = np.array([text.endswith(_SENTENCE_ENDS) for text in texts])

    def weave(self, ids_BT: Tensor, seed: tuple[int, ...]) -> Woven:
        """The window with facts and questions in it, as long as before: its own text is cut at the end.

        Raises:
            UsageError: the window is too short for a fact.
        """
        generator = np.random.default_rng(seed)
        ids = ids_BT[0].numpy()
        places = self._places(ids)
        facts: list[list[_Insert]] = []
        room = _MOST_OF_WINDOW * len(ids)
        for _ in range(max(1, len(ids) // self._spacing)):
            fact = self._fact(generator, places)
            room -= sum(len(insert.ids) for insert in fact)
            if room < 0:
                break
            facts.append(fact)
        if not facts:
            raise UsageError(
                f"long_window = {len(ids)}: too short to weave a fact and its question in; "
                "give a longer one, or a recipe without retrieval"
            )
        return _assemble(ids, sorted((insert for fact in facts for insert in fact), key=lambda insert: insert.at))

    def _places(self, ids: np.ndarray) -> np.ndarray:
        """Where something can be put in: behind the ends of sentences, or anywhere in a text that has none."""
        known = ids < len(self._ends_sentence)  # a model may have more embeddings than its tokenizer has tokens
        ends = np.flatnonzero(known & self._ends_sentence[np.where(known, ids, 0)]) + 1
        return ends if len(ends) else np.arange(1, len(ids))

    def _fact(self, generator: np.random.Generator, places: np.ndarray) -> list[_Insert]:
        told, asked = np.sort(generator.integers(0, len(places), 2))
        last = generator.random() < _ASKED_LAST
        statement, question = _KINDS[generator.integers(len(_KINDS))]
        name, value = _name(generator).capitalize(), _value(generator)
        before, after = question.split("{value}")
        start, answer = self._encode(before.format(name=name).rstrip(" ")), self._encode(f" {value}")
        return [
            _Insert(int(places[told]), self._encode(statement.format(name=name, value=value))),
            _Insert(
                np.iinfo(np.int64).max if last else int(places[asked]),
                [*start, *answer, *self._encode(after)],
                range(len(start), len(start) + len(answer)),
            ),
        ]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _assemble(ids: np.ndarray, inserts: list[_Insert]) -> Woven:
    """Cut the text to what the inserts leave, and put them in their places; what lies behind the cut goes to the end."""
    kept = len(ids) - sum(len(insert.ids) for insert in inserts)
    parts: list[np.ndarray] = []
    answers: list[int] = []
    taken = length = 0
    for insert in inserts:
        at = min(insert.at, kept)
        parts += [ids[taken:at], np.array(insert.ids, dtype=ids.dtype)]
        length += at - taken
        answers += [length + place for place in insert.answer]
        length, taken = length + len(insert.ids), at
    parts.append(ids[taken:kept])
    return Woven(torch.from_numpy(np.concatenate(parts))[None], torch.tensor(answers))


def _name(generator: np.random.Generator) -> str:
    return "".join(_syllables(generator, 3))


def _value(generator: np.random.Generator) -> str:
    kind = generator.integers(3)
    if kind == 0:
        return "".join(map(str, generator.integers(0, 10, generator.choice(_DIGITS))))
    if kind == 1:
        return f"{'ABCDEFGHKLMNPRSTUVWXYZ'[generator.integers(22)]}{generator.integers(10, 100)}-{generator.integers(10, 1000)}"
    return "".join(_syllables(generator, 2))


def _syllables(generator: np.random.Generator, count: int) -> Iterator[str]:
    return (_SYLLABLES[generator.integers(len(_SYLLABLES))] for _ in range(count))
