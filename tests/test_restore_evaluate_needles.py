"""Retrieval prompts have exactly the length and depth that were asked for, and answers are found as they should be."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ard_serve.errors import DataError
from restore import loading
from restore.evaluation import likelihood, retrieval
from restore.evaluation.config import EvalConfig, NeedleTask
from restore.evaluation.haystack import Haystack, Prompt
from restore.evaluation.likelihood import continue_greedily
from restore.evaluation.needles import needle_prompt

BOS = 256
TASKS: tuple[NeedleTask, ...] = ("single", "multi_key", "multi_value", "multi_query", "variable_tracking", "common_words")
LENGTH = 2048


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama3", seed=5)


@pytest.fixture(scope="module")
def haystack(checkpoint: Path) -> Haystack:
    tokenizer = loading.load_tokenizer(checkpoint)
    letters = "abcdefghij"
    words = ["".join(letters[int(digit)] for digit in f"{37 * i % 10000:04}") for i in range(120)]
    book = "".join(
        f"On day {i:03} the fleet lay off {word} harbour, and nothing stirred there.\n" for i, word in enumerate(words)
    )
    return Haystack(
        tokenizer, [np.array(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (book, "x")], [BOS]
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt_and_answer_fill_the_window_exactly(haystack: Haystack, task: NeedleTask, depth: float) -> None:
    prompt = needle_prompt(haystack, task, LENGTH, depth, sample=0, seed=1)
    assert len(prompt.ids) + prompt.new_tokens == LENGTH
    assert prompt.ids[0] == BOS
    assert len(haystack.encode(" " + ", ".join(prompt.answers))) < prompt.new_tokens


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_needle_lies_at_its_depth_behind_a_whole_sentence(haystack: Haystack, depth: float) -> None:
    prompt = needle_prompt(haystack, "single", LENGTH, depth, sample=2, seed=1)
    text = haystack.decode(prompt.ids[1:])
    needle = f" One of the special magic numbers for {re.findall(r'numbers for (.*?) is:', text)[0]} is: {prompt.answers[0]}."
    book = text[text.index("afterwards.\n") + len("afterwards.\n") : text.index("\nQuestion:")]
    at, size = book.index(needle), len(book) - len(needle)
    sentence = 67
    assert abs(at - depth * size) <= sentence / 2 + 1
    assert at == 0 or book[:at].endswith(".") or at == size
    assert text.endswith("mentioned in the provided text is")


def test_each_task_hides_what_it_asks_for(haystack: Haystack) -> None:
    for task, hidden in (("single", 1), ("multi_key", 4), ("multi_value", 4), ("multi_query", 4)):
        prompt = needle_prompt(haystack, task, LENGTH, 0.5, sample=0, seed=0)  # type: ignore[arg-type]
        text = haystack.decode(prompt.ids)
        statements = re.findall(r"numbers for (\w+) is: (\d{6})\.", text)
        assert len(statements) == hidden
        assert set(prompt.answers) <= {number for _, number in statements}
        asked = text[text.index("\nQuestion:") :]
        assert {key for key, number in statements if number in prompt.answers} == {key for key, _ in statements if key in asked}
        assert len(prompt.answers) == (1 if prompt.judge == "first_number" else 4)


def test_a_variable_is_handed_on_in_order(haystack: Haystack) -> None:
    prompt = needle_prompt(haystack, "variable_tracking", LENGTH, 0.4, sample=3, seed=0)
    text = haystack.decode(prompt.ids)
    assert re.findall(r"VAR (\w+) = VAR (\w+)\.", text) == list(zip(prompt.answers[1:], prompt.answers, strict=False))
    assert re.search(rf"VAR {prompt.answers[0]} = (\d+)\..*assigned the value \1 in", text, re.DOTALL)


def test_the_common_words_are_the_most_common_ones(haystack: Haystack) -> None:
    prompt = needle_prompt(haystack, "common_words", LENGTH, 0.0, sample=0, seed=0)
    listed = haystack.decode(prompt.ids).split("\n")[1].split()
    counts = {word: listed.count(word) for word in set(listed)}
    others = [count for word, count in counts.items() if word not in prompt.answers]
    assert len(prompt.answers) == 10
    assert min(counts[word] for word in prompt.answers) > max(others, default=0)


def test_prompts_repeat_by_seed_and_differ_by_sample(haystack: Haystack) -> None:
    assert needle_prompt(haystack, "single", LENGTH, 0.5, 0, seed=7) == needle_prompt(
        haystack, "single", LENGTH, 0.5, 0, seed=7
    )
    assert (
        needle_prompt(haystack, "single", LENGTH, 0.5, 0, seed=7).answers
        != needle_prompt(haystack, "single", LENGTH, 0.5, 1, seed=7).answers
    )
    assert (
        needle_prompt(haystack, "single", LENGTH, 0.5, 0, seed=7).answers
        != needle_prompt(haystack, "single", LENGTH, 0.5, 0, seed=8).answers
    )


def test_an_answer_counts_only_when_it_is_the_first_number() -> None:
    prompt = Prompt((1,), 4, ("123456",), judge="first_number")
    assert prompt.score(" 123456.\nAnd 9") == 1.0
    assert prompt.score(" 9, not 123456") == 0.0
    assert prompt.score(" 1234567") == 0.0
    assert prompt.score("nothing") == 0.0


def test_several_answers_count_by_their_share_and_as_whole_words() -> None:
    prompt = Prompt((1,), 4, ("Amber", "coral"), judge="share")
    assert prompt.score("coral, AMBER") == 1.0
    assert prompt.score("corals and amber") == 0.5


def test_any_of_several_answers_counts_on_the_first_line() -> None:
    prompt = Prompt((1,), 4, ("23 years", "23"), judge="any")
    assert prompt.score(" The 23 Years.") == 1.0
    assert prompt.score(" 230 years") == 0.0
    assert prompt.score(" unknown\n23") == 0.0


def test_text_too_short_for_the_prompt_is_refused(haystack: Haystack) -> None:
    with pytest.raises(DataError, match=r"needs \d+.*--needle-lengths"):
        needle_prompt(haystack, "single", 1 << 20, 0.5, 0, 0)
    with pytest.raises(DataError, match="32 tokens leaves no room"):
        needle_prompt(haystack, "single", 32, 0.5, 0, 0)
    with pytest.raises(DataError, match="32 tokens leaves no room"):
        needle_prompt(haystack, "common_words", 32, 0.5, 0, 0)


def test_greedy_decoding_is_that_of_transformers(checkpoint: Path) -> None:
    model = loading.load(checkpoint, torch.float32)
    ids = torch.arange(60).reshape(3, 20) % 251
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None)  # type: ignore[operator]
    assert torch.equal(continue_greedily(model, ids, 12), expected[:, 20:])


def test_batched_retrieval_scores_as_one_prompt_at_a_time(
    checkpoint: Path, haystack: Haystack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that reads its answer off the prompt's hash scores the same whichever prompts share a batch."""
    model = loading.load(checkpoint, torch.float32)
    shapes: list[tuple[int, int]] = []

    def oracle(_: PreTrainedModel, ids_BT: torch.Tensor, new_tokens: int) -> torch.Tensor:
        shapes.append((len(ids_BT), ids_BT.shape[1] + new_tokens))
        texts = [haystack.decode(row.tolist()) for row in ids_BT]
        # Right on every other prompt, so that a mixed-up order cannot go unseen.
        answers = [
            " ".join(re.findall(r"is: (\d{6})", text)) if sum(row.tolist()) % 2 else "none"
            for row, text in zip(ids_BT, texts, strict=True)
        ]
        return torch.tensor([(haystack.encode(answer) + haystack.encode(" ") * new_tokens)[:new_tokens] for answer in answers])

    monkeypatch.setattr(likelihood, "continue_greedily", oracle)
    fields = {
        "data": ("x",),
        "needle_tasks": ("single", "multi_value"),
        "needle_lengths": (600, 900),
        "needle_depths": (0.0, 0.7),
    }
    found = {}
    for batch_tokens in (1, 4096):
        config = EvalConfig.model_validate(fields | {"needle_samples": 6})
        found[batch_tokens] = retrieval.measure(likelihood.Loaded(model, batch_tokens), haystack, config, "tiny")
    assert found[1] == found[4096]
    assert [(s.task, s.length, s.depth) for s in found[1]][:3] == [
        ("single", 600, 0.0),
        ("single", 600, 0.7),
        ("single", 900, 0.0),
    ]
    assert {len(s.samples) for s in found[1]} == {6}
    assert {value for s in found[1] for value in s.samples} == {0.0, 1.0}
    assert {length for _, length in shapes} == {600, 900}
    assert max(rows for rows, _ in shapes) > 6, "prompts of other depths share a batch with a cell's six"
