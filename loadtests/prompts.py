"""Prompts of an exact number of tokens: a random head, hay, needles at stratified depths, the question at the end.

The head differs in every request of every run, so that no prefix cache can answer. The body depends on the seed, the
length and the index alone, so that one task is asked at every concurrency and its answers can be paired.
"""

import bisect
import itertools
import random
import re
from dataclasses import dataclass

from ard_serve.errors import UsageError
from loadtests.filler import ADJECTIVES, NEEDLE, NOUNS, QUESTION, SENTENCES
from loadtests.tokens import CachedTokens, TokenSource, leading_ids

_HEAD_TOKENS = 24
_FIRST_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Prompt:
    """Token ids, the answer that is expected (empty without a needle) and the needle's depth, 0 the start and 1 the end."""

    tokens: list[int]
    expected: str = ""
    depth: float | None = None


class PromptMaker:
    """Makes the prompts of one run.

    `run_nonce` goes into every head; `keys` needles are hidden in each prompt (0 for none), in `depths` strata.
    """

    def __init__(self, source: TokenSource, seed: int, run_nonce: str, keys: int = 1, depths: int = 5) -> None:
        self._encode = CachedTokens(source).encode
        self._lead = leading_ids(source)
        self._sentences = [self._encode(" " + sentence) for sentence in SENTENCES]
        self._pool = sorted({token for sentence in self._sentences for token in sentence})
        self._seed, self._nonce, self._keys, self._depths = seed, run_nonce, keys, depths

    def make(self, length: int, index: int, label: str, needle_required: bool = True) -> Prompt:
        """A prompt of exactly `length` tokens for task `index`; `label` names the request that asks it.

        Too short for its needles, it is random words alone if `needle_required` is False, as in a replayed trace.

        Raises:
            UsageError: `length` cannot hold the head, the needles and the question.
        """
        head = random.Random(f"{self._nonce}/{label}")
        body = random.Random(f"{self._seed}/{length}/{index}")
        names = body.sample([f"{a}-{n}" for a in ADJECTIVES for n in NOUNS], max(self._keys, 1))
        values = [f"{body.randrange(100_000, 1_000_000)}" for _ in names]
        asked_depth = (index % self._depths + body.random()) / self._depths
        placed = [asked_depth, *(body.random() for _ in names[1:])]
        needles = [
            (depth, self._encode(NEEDLE.format(key=key, value=value)))
            for depth, key, value in zip(placed, names, values, strict=True)
        ][: self._keys]
        question = self._encode(QUESTION.format(key=names[0])) if self._keys else []
        start = self._lead + head.choices(self._pool, k=_HEAD_TOKENS)
        room = length - len(start) - len(question) - sum(len(ids) for _, ids in needles)
        if room < 0 and not needle_required:
            return Prompt([*self._lead, *head.choices(self._pool, k=length)][:length])
        if room < 0:
            raise UsageError(f"length {length}: too short for its needles and question; use at least {length - room} tokens")
        tokens = start + self._hay(body, room, needles) + question
        assert len(tokens) == length
        return Prompt(tokens, values[0] if self._keys else "", asked_depth if self._keys else None)

    def _hay(self, body: random.Random, room: int, needles: list[tuple[float, list[int]]]) -> list[int]:
        """`room` tokens of sentences, each needle spliced in at the sentence boundary nearest to its depth."""
        sentences: list[list[int]] = []
        left = room
        while left > 0:
            sentence = body.choice(self._sentences)[:left]
            sentences.append(sentence)
            left -= len(sentence)
        ends = list(itertools.accumulate((len(sentence) for sentence in sentences), initial=0))
        for depth, ids in sorted(needles, reverse=True):
            sentences.insert(bisect.bisect_left(ends, round(depth * room), hi=len(ends) - 1), ids)
        return list(itertools.chain.from_iterable(sentences))


def grade(answer: str, expected: str) -> bool:
    """Whether the first number in the answer is the expected one; what follows it does not count."""
    found = _FIRST_NUMBER.search(answer)
    return found is not None and found.group() == expected


class Words:
    """A stand-in for a server whose token ids are not to be had: counts words, and prompts are sent as text.

    `tokens_per_word` and `overhead_tokens` are calibrated from the usage that the server reports.
    """

    name = "text, calibrated by the server's usage"
    _SPLIT = re.compile(r"\s*[\w-]+|\s*[^\w\s]")

    def __init__(self) -> None:
        self.tokens_per_word = 1.3
        self.overhead_tokens = 0.0
        self._words: list[str] = []
        self._ids: dict[str, int] = {}

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Pseudo ids, one for each word."""
        ids = []
        for word in self._SPLIT.findall(text):
            if word not in self._ids:
                self._ids[word] = len(self._words)
                self._words.append(word)
            ids.append(self._ids[word])
        return ids

    def decode(self, tokens: list[int]) -> str:
        """The text of pseudo ids."""
        return "".join(self._words[token] for token in tokens)

    def words_for(self, prompt_tokens: int) -> int:
        """How many words the server will count as about `prompt_tokens`."""
        return max(1, round((prompt_tokens - self.overhead_tokens) / self.tokens_per_word))

    def calibrate(self, first: tuple[int, int], second: tuple[int, int]) -> None:
        """Learn from two probes, each (words sent, tokens reported)."""
        (few_words, few_tokens), (many_words, many_tokens) = first, second
        self.tokens_per_word = (many_tokens - few_tokens) / (many_words - few_words)
        self.overhead_tokens = few_tokens - self.tokens_per_word * few_words
