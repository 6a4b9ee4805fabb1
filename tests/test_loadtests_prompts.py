"""Prompts: exact lengths, no shared prefix, paired tasks, needles where they are said to be, and strict grading."""

import re

import pytest

from ard_serve.errors import UsageError
from loadtests.prompts import PromptMaker, Words, grade


class WordTokens(Words):
    """A tokenizer with one id for each word and a BOS, known to this test alone."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        return ([10**6] if special else []) + super().encode(text)


@pytest.fixture
def words() -> WordTokens:
    return WordTokens()


@pytest.mark.parametrize("length", [120, 121, 500, 4096])
@pytest.mark.parametrize("keys", [0, 1, 4])
def test_length_is_exact(words: WordTokens, length: int, keys: int) -> None:
    maker = PromptMaker(words, 0, "run", keys)
    for index in range(12):
        assert len(maker.make(length, index, f"{index}").tokens) == length


def test_prompt_begins_with_the_models_bos_and_a_head_of_its_own(words: WordTokens) -> None:
    maker = PromptMaker(words, 0, "run")
    heads = {tuple(maker.make(300, 0, f"request {n}").tokens[:16]) for n in range(200)}
    assert len(heads) == 200
    assert {head[0] for head in heads} == {10**6}
    other = PromptMaker(words, 0, "another run")
    assert other.make(300, 0, "request 0").tokens[:16] != maker.make(300, 0, "request 0").tokens[:16]


def test_the_same_task_is_asked_at_every_load(words: WordTokens) -> None:
    maker = PromptMaker(words, 7, "run")
    alone, loaded = maker.make(400, 3, "400x1/3"), maker.make(400, 3, "400x8/3")
    assert alone.expected == loaded.expected
    assert alone.tokens != loaded.tokens
    assert alone.tokens[25:] == loaded.tokens[25:]
    assert maker.make(400, 4, "x").expected != alone.expected
    assert PromptMaker(words, 8, "run").make(400, 3, "400x1/3").expected != alone.expected


def test_needles_lie_in_their_strata(words: WordTokens) -> None:
    maker = PromptMaker(words, 0, "run", depths=5)
    for index in range(20):
        prompt = maker.make(2000, index, f"{index}")
        text = words.decode(prompt.tokens[1:])
        assert prompt.depth is not None
        assert int(prompt.depth * 5) == index % 5
        found = text.index(f"is: {prompt.expected}") / text.index("Question")
        assert found == pytest.approx(prompt.depth, abs=0.04)


def test_multi_key_needles_ask_for_one_of_many(words: WordTokens) -> None:
    prompt = PromptMaker(words, 0, "run", keys=4).make(1000, 5, "5")
    text = words.decode(prompt.tokens[1:])
    hidden = dict(re.findall(r"number for ([\w-]+) is: (\d{6})", text))
    asked = re.findall(r"number for ([\w-]+)\?", text)
    assert len(hidden) == 4
    assert len(asked) == 1
    assert hidden[asked[0]] == prompt.expected
    assert text.endswith(f"number for {asked[0]} is:")


def test_length_that_cannot_hold_the_question_says_which_could(words: WordTokens) -> None:
    maker = PromptMaker(words, 0, "run")
    with pytest.raises(UsageError, match="length 20: too short") as raised:
        maker.make(20, 0, "0")
    enough = int(re.findall(r"at least (\d+)", str(raised.value))[0])
    assert len(maker.make(enough, 0, "0").tokens) == enough
    plain = maker.make(20, 0, "0", needle_required=False)
    assert (len(plain.tokens), plain.expected) == (20, "")


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" 482913", True), (" 482913.\nQuestion: 111111", True), ("The number is 482913", True), (" 4829131", False),
     (" 111111 482913", False), (" 48291", False), ("", False)],
)  # fmt: skip
def test_first_number_decides(answer: str, right: bool) -> None:
    assert grade(answer, "482913") is right


def test_text_prompts_are_calibrated_from_two_probes() -> None:
    words = Words()
    words.calibrate((64, 64 * 2 + 11), (512, 512 * 2 + 11))
    assert words.words_for(2011) == 1000
    assert words.decode(words.encode("Hello, world: an amber-falcon.\nYes?")) == "Hello, world: an amber-falcon.\nYes?"
