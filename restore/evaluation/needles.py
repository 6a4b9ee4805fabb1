"""Retrieval tasks after RULER (arXiv 2404.06654), in its wording.

One needle, one among several keys, several values of one key, several keys asked at once, a chain of variables, the most
common words of a list.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from ard_serve.errors import DataError
from restore.evaluation.config import NeedleTask
from restore.evaluation.haystack import Haystack, Prompt, Quiz

_KEYS = (
    "amber", "anchor", "basket", "beacon", "bridge", "candle", "canyon", "castle", "cedar", "cellar", "clover", "copper",
    "coral", "cradle", "dragon", "falcon", "feather", "forest", "garden", "goblet", "hammer", "harbor", "island", "jacket",
    "ladder", "lantern", "marble", "meadow", "mirror", "needle", "orchard", "pepper", "pillow", "planet", "ribbon", "saddle",
    "shadow", "silver", "spider", "temple", "thunder", "tunnel", "velvet", "violin", "walnut", "willow", "window", "winter",
)  # fmt: skip
_DISTRACTORS, _CHAIN = 3, 4
# A round of the list names each common word ten times and each rare one once, as RULER does.
_COMMON_WORDS, _COMMON_REPEATS, _TOKENS_PER_RARE_WORD = 10, 10, 8
_WORD_SOURCE_TOKENS = 20_000


def needle_prompt(haystack: Haystack, task: NeedleTask, length: int, depth: float, sample: int, seed: int) -> Prompt:
    """Prompt number `sample` of a task: the same for every model that shares the tokenizer.

    Raises:
        DataError: the text is too short for the length, or the length for the task.
    """
    generator = np.random.default_rng((seed, zlib.crc32(task.encode()), length, round(1000 * depth), sample))
    if task == "common_words":
        return _common_words(haystack, length, generator)
    return haystack.hide(_QUIZZES[task](generator), length, depth, generator)


def _common_words(haystack: Haystack, length: int, generator: np.random.Generator) -> Prompt:
    words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", haystack.decode(haystack.ids[:_WORD_SOURCE_TOKENS].tolist()))))
    words = [words[i] for i in generator.permutation(len(words))]
    common = words[:_COMMON_WORDS]
    quiz = Quiz(
        "Below is a list of words. Memorize the ones that appear most often in it.\n",
        (),
        f"\nQuestion: What are the {_COMMON_WORDS} most common words in the above list?\n"
        f"Answer: The {_COMMON_WORDS} most common words in the list are:",
        tuple(common),
        judge="share",
    )
    room = haystack.room(quiz, length)
    rare = words[_COMMON_WORDS : _COMMON_WORDS + max(0, room // _TOKENS_PER_RARE_WORD)]
    if not rare:
        raise DataError(
            f"a common-words prompt of {length} tokens leaves no room for a list: use longer --needle-lengths or text"
        )
    body: list[int] = []
    while len(body) < room:
        listed = [*common * _COMMON_REPEATS, *rare]
        body += haystack.encode(" " + " ".join(listed[i] for i in generator.permutation(len(listed))))
    return haystack.assemble(quiz, body[:room])


def _number(generator: np.random.Generator) -> str:
    return str(generator.integers(100_000, 1_000_000))


def _hide(key: str, number: str) -> str:
    return f" One of the special magic numbers for {key} is: {number}."


def _quiz(keys: Sequence[str], statements: Sequence[str], answers: Sequence[str]) -> Quiz:
    """The frame that all magic-number tasks share."""
    many = len(answers) > 1
    numbers, are = ("numbers", "are all the") if many else ("number", "is the")
    asked = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    verb = "are" if many else "is"
    return Quiz(
        f"Some special magic {numbers} {'are' if many else 'is'} hidden within the following text. Make sure to memorize "
        f"{'them' if many else 'it'}. I will quiz you about the {numbers} afterwards.\n",
        tuple(statements),
        f"\nQuestion: What {are} special magic {numbers} for {asked} mentioned in the provided text?\n"
        f"Answer: The special magic {numbers} for {asked} mentioned in the provided text {verb}",
        tuple(answers),
        judge="share" if many else "first_number",
    )


def _single(generator: np.random.Generator) -> Quiz:
    key, number = str(generator.choice(_KEYS)), _number(generator)
    return _quiz([key], [_hide(key, number)], [number])


def _multi_key(generator: np.random.Generator) -> Quiz:
    keys = generator.choice(_KEYS, 1 + _DISTRACTORS, replace=False).tolist()
    numbers = [_number(generator) for _ in keys]
    return _quiz(keys[:1], list(map(_hide, keys, numbers)), numbers[:1])


def _multi_value(generator: np.random.Generator) -> Quiz:
    key, numbers = str(generator.choice(_KEYS)), [_number(generator) for _ in range(1 + _DISTRACTORS)]
    return _quiz([key], [_hide(key, number) for number in numbers], numbers)


def _multi_query(generator: np.random.Generator) -> Quiz:
    keys = generator.choice(_KEYS, 1 + _DISTRACTORS, replace=False).tolist()
    numbers = [_number(generator) for _ in keys]
    return _quiz(keys, list(map(_hide, keys, numbers)), numbers)


def _variable_tracking(generator: np.random.Generator) -> Quiz:
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    names = ["".join(generator.choice(letters, 5)) for _ in range(_CHAIN)]
    number = str(generator.integers(10_000, 100_000))
    chain = [f" VAR {names[0]} = {number}."] + [f" VAR {new} = VAR {old}." for old, new in pairwise(names)]
    return Quiz(
        "Memorize and track the chain of variable assignments hidden in the following text.\n",
        tuple(chain),
        f"\nQuestion: Find all variables that are assigned the value {number} in the text above.\n"
        f"Answer: According to the chain of variable assignments, {_CHAIN} variables are assigned the value {number}, "
        "they are:",
        tuple(names),
        judge="share",
        ordered=True,
    )


_QUIZZES: dict[NeedleTask, Callable[[np.random.Generator], Quiz]] = {
    "single": _single,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
}
