"""Statements hidden in long text, in prompts that fill a window to the token, and how an answer is judged."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ard_serve.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# first_number: the first number written is the answer; share: the share of answers written; any: one of them is written.
Judge = Literal["first_number", "share", "any"]

_SLACK_TOKENS = 4
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*$")


@dataclass(frozen=True)
class Quiz:
    """What is hidden, in order, and what is asked; the first statement lies at the depth asked for, the others anywhere."""

    intro: str
    statements: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    judge: Judge
    ordered: bool = False


@dataclass(frozen=True)
class Prompt:
    """One prompt: `ids` and `new_tokens` of answer fill the window exactly."""

    ids: tuple[int, ...]
    new_tokens: int
    answers: tuple[str, ...]
    judge: Judge

    def score(self, output: str) -> float:
        """How right a model's continuation is, from 0 to 1."""
        if self.judge == "first_number":
            numbers = re.findall(r"\d+", output)
            return float(bool(numbers) and numbers[0] == self.answers[0])
        written = _normalized(output if self.judge == "share" else output.strip().partition("\n")[0])
        found = [_normalized(answer) in written for answer in self.answers]
        return sum(found) / len(found) if self.judge == "share" else float(any(found))


class Haystack:
    """Text as tokens, with the places where a sentence ends."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        documents: Sequence[np.ndarray],
        bos: Sequence[int],
        origin: str = "the longest document",
    ) -> None:
        """Use the longest document, so that no prompt changes its book half-way; `origin` is what errors call it."""
        self.tokenizer, self.bos, self._origin = tokenizer, list(bos), origin
        self.ids = max(documents, key=len, default=np.zeros(0, dtype=np.int64))
        distinct = np.unique(self.ids)
        ends = [bool(_SENTENCE_END.search(text)) for text in tokenizer.batch_decode([[i] for i in distinct.tolist()])]
        self._ends_sentence = np.array(ends)[np.searchsorted(distinct, self.ids)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def hide(self, quiz: Quiz, length: int, depth: float, generator: np.random.Generator) -> Prompt:
        """Hide the quiz's statements behind whole sentences of a random stretch of text.

        Args:
            quiz: what to hide.
            length: tokens of the prompt and of its answer together.
            depth: where the first statement lies; 0 is the beginning of the text, 1 its end.
            generator: chooses the stretch and the other statements' depths.

        Raises:
            DataError: the text is too short for the length, or the length for the quiz.
        """
        statements = [self.encode(statement) for statement in quiz.statements]
        text = self._stretch(self.room(quiz, length) - sum(map(len, statements)), length, generator)
        depths = np.array([depth, *generator.random(len(statements) - 1)])
        places = self._sentence_ends(text, np.sort(depths) if quiz.ordered else depths)
        body: list[int] = []
        cursor = text.start
        for place, statement in sorted(zip(places, statements, strict=True), key=lambda pair: pair[0]):
            body += [*self.ids[cursor:place].tolist(), *statement]
            cursor = place
        return self.assemble(quiz, [*body, *self.ids[cursor : text.stop].tolist()])

    def room(self, quiz: Quiz, length: int) -> int:
        """Tokens between intro and question when prompt and answer fill `length`."""
        frame = len(self.bos) + len(self.encode(quiz.intro)) + len(self.encode(quiz.question))
        return length - frame - self._answer_tokens(quiz)

    def assemble(self, quiz: Quiz, body: Sequence[int]) -> Prompt:
        """The prompt around a body of tokens."""
        ids = (*self.bos, *self.encode(quiz.intro), *body, *self.encode(quiz.question))
        return Prompt(ids, self._answer_tokens(quiz), quiz.answers, quiz.judge)

    def _answer_tokens(self, quiz: Quiz) -> int:
        if quiz.judge == "any":
            return _SLACK_TOKENS + max(len(self.encode(f" The answer is {answer}.")) for answer in quiz.answers)
        return _SLACK_TOKENS + len(self.encode(" " + ", ".join(quiz.answers) + "."))

    def _stretch(self, tokens: int, length: int, generator: np.random.Generator) -> slice:
        if tokens < 1:
            raise DataError(f"a needle prompt of {length} tokens leaves no room for text: use longer --needle-lengths")
        if tokens > len(self.ids):
            raise DataError(
                f"{self._origin}: {len(self.ids)} tokens are too few, a prompt of {length} needs {tokens}; "
                "give a longer text or shorter --needle-lengths"
            )
        start = int(generator.integers(0, len(self.ids) - tokens + 1))
        return slice(start, start + tokens)

    def _sentence_ends(self, text: slice, depths: np.ndarray) -> list[int]:
        """For each depth the nearest place in the stretch behind a finished sentence; its very edges count as such."""
        ends = np.concatenate(([text.start], text.start + np.flatnonzero(self._ends_sentence[text]) + 1, [text.stop]))
        wanted = text.start + depths * (text.stop - text.start)
        return [int(ends[np.abs(ends - place).argmin()]) for place in wanted]


def has_words(answer: str) -> bool:
    """Whether anything of an answer can be found; one of punctuation or articles alone is in the output that writes nothing."""
    return bool(_normalized(answer).strip())


def _normalized(text: str) -> str:
    """Words in lower case without articles and punctuation, as SQuAD compares answers, with a space around each."""
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(word for word in words if word not in ('a', 'an', 'the'))} "
