"""Short tasks score as a plain loop over items does, whatever shares a batch."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ard_serve.errors import DataError
from restore import loading
from restore.evaluation import items, likelihood, primers, tasks
from restore.evaluation.likelihood import Loaded
from restore.evaluation.reader import Likelihood, Request

WORDS = ["the", "harbour", "lay", "quiet", "under", "rain", "while", "ships", "came", "home", "from", "islands", "far", "away"]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama3", seed=11)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return loading.load(checkpoint, torch.float64)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    return loading.load_tokenizer(checkpoint)


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count))


CHOICES: list[dict[str, Any]] = [
    {"query": words(i, 2 + i % 5), "choices": [words(i + k, 1 + (i + 3 * k) % 4) for k in range(2 + i % 3)], "gold": i % 2}
    for i in range(17)
]
CONTEXTS: list[dict[str, Any]] = [
    {"context_options": [words(i, 3), words(i + 4, 5)], "continuation": words(i + 2, 2), "gold": i % 2} for i in range(9)
]


@torch.no_grad()
def naive(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[float, bool]:
    read = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    log_probs = model(ids).logits[0].log_softmax(-1)
    targets = ids[0, read:]
    rows = log_probs[read - 1 : -1]
    return float(rows.gather(-1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_multiple_choice_is_the_likeliest_choice(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, batch_tokens: int
) -> None:
    (found,) = tasks.run_task(Loaded(model, batch_tokens), tokenizer, write(tmp_path / "quiz.jsonl", CHOICES))
    sums = [[naive(model, tokenizer, i["query"], " " + c)[0] for c in i["choices"]] for i in CHOICES]
    by_character = [
        [value / len(c) for value, c in zip(row, i["choices"], strict=True)] for row, i in zip(sums, CHOICES, strict=True)
    ]
    right = [int(row.index(max(row)) == i["gold"]) for row, i in zip(sums, CHOICES, strict=True)]
    right_norm = [int(row.index(max(row)) == i["gold"]) for row, i in zip(by_character, CHOICES, strict=True)]
    assert found.correct == tuple(right)
    assert found.metrics == pytest.approx({"acc": sum(right) / 17, "acc_norm": sum(right_norm) / 17})
    assert right != right_norm, "the items must tell the two metrics apart"


def test_hellaswag_is_judged_by_characters(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (found,) = tasks.run_task(Loaded(model, 4096), tokenizer, write(tmp_path / "hellaswag.jsonl", CHOICES))
    assert found.metric == "acc_norm"
    assert found.value == pytest.approx(found.metrics["acc_norm"])


def test_truthfulqa_is_scored_by_its_choices_and_by_the_share_of_true_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    truths = [{**item, "mc2_correct": [words(i, 2), words(i, 3)], "mc2_incorrect": [words(i + 7, 3)]} for i, item in
              enumerate(CHOICES[:6])]  # fmt: skip
    primer = primers.of("truthfulqa_mc")
    by_choice, by_share = tasks.run_task(Loaded(model, 4096), tokenizer, write(tmp_path / "truthfulqa_mc.jsonl", truths))
    assert (by_choice.name, by_choice.metric) == ("truthfulqa_mc", "acc")
    assert (by_share.name, by_share.metric) == ("truthfulqa_mc2", "mc2")
    for item, correct, share in zip(truths, by_choice.correct, by_share.correct, strict=True):
        choices, true, false = (
            [naive(model, tokenizer, primer + item["query"], f" {text}")[0] for text in item[name]]
            for name in ("choices", "mc2_correct", "mc2_incorrect")
        )
        assert correct == int(choices.index(max(choices)) == item["gold"])
        weights = [math.exp(value) for value in (*true, *false)]
        assert share == pytest.approx(sum(weights[: len(true)]) / sum(weights))
    assert by_share.value == pytest.approx(sum(by_share.correct) / 6)


def test_partial_context_is_the_context_that_makes_the_continuation_likeliest(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (found,) = tasks.run_task(Loaded(model, 4096), tokenizer, write(tmp_path / "winogrande.jsonl", CONTEXTS))
    sums = [[naive(model, tokenizer, c, f" {i['continuation']}")[0] for c in i["context_options"]] for i in CONTEXTS]
    assert found.correct == tuple(int(row.index(max(row)) == i["gold"]) for row, i in zip(sums, CONTEXTS, strict=True))


def test_a_cloze_is_right_when_it_is_what_greedy_decoding_writes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = []
    for start in range(40):
        context = words(start, 4)
        greedy = likelihood.continue_greedily(model, torch.tensor([tokenizer(context + " ")["input_ids"]]), 1)
        rows.append({"context": context, "continuation": str(tokenizer.decode(greedy[0].tolist())) if start % 2 else "a"})
    rows = [row for row in rows if row["continuation"].isalnum()]
    (found,) = tasks.run_task(Loaded(model, 4096), tokenizer, write(tmp_path / "cloze.jsonl", rows))
    expected = [naive(model, tokenizer, item["context"], " " + item["continuation"]) for item in rows]
    assert found.correct == tuple(int(greedy) for _, greedy in expected)
    assert found.metrics["perplexity"] == pytest.approx(
        float(torch.tensor([-log_prob for log_prob, _ in expected], dtype=torch.float64).mean().exp())
    )


def test_spaces_that_end_a_context_belong_to_the_continuation(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tasks.encode_pairs(tokenizer, [("a  ", "b")]) == tasks.encode_pairs(tokenizer, [("a", "  b")])


def test_a_limit_takes_items_from_the_whole_file(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"context": f"c{i}", "continuation": "x"} for i in range(11)])
    assert [item.pairs[0][0] for item in items.read_items(path, 3)] == ["c0", "c5", "c10"]
    assert len(items.read_items(path)) == 11


@pytest.mark.parametrize(
    "line",
    [
        "{not json",
        '{"query": "q", "choices": ["a", "b"], "gold": 2}',
        '{"query": "q", "choices": ["a", "b"]}',
        '{"query": "q", "choices": ["a", " "], "gold": 0}',
        '{"context": "c"}',
        "[1]",
        '{"context": 1, "continuation": "x"}',
        '{"query": "q", "choices": "yes", "gold": 0}',
        '{"context_options": "no", "continuation": "x", "gold": 0}',
    ],
)
def test_a_bad_item_is_named_by_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"context": "c", "continuation": "x"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:3: expected"):
        items.read_items(path)


def test_a_separator_inside_a_string_and_a_byte_order_mark_end_no_item(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('\ufeff{"context": "c\u2028\x85d", "continuation": "x"}\n', encoding="utf-8")
    assert [item.pairs[0][0] for item in items.read_items(path)] == ["c\u2028\x85d"]
    path.write_text('{"context": "c\\ud83d", "continuation": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"t\.jsonl:1: holds half a character \(.ud83d alone\)"):
        items.read_items(path)


def test_task_files_are_found_and_pools_of_examples_are_not(tmp_path: Path) -> None:
    for name in ("b", "a", "gsm8k_train_fewshot"):
        write(tmp_path / f"{name}.jsonl", [{"context": "c", "continuation": "x"}])
    assert [path.stem for path in tasks.find_tasks([str(tmp_path)])] == ["a", "b"]
    with pytest.raises(DataError, match=r"named a\.jsonl"):
        tasks.find_tasks([str(tmp_path), str(tmp_path / "a.jsonl")])
    with pytest.raises(DataError, match="nowhere"):
        tasks.find_tasks([str(tmp_path / "nowhere")])


def test_an_empty_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="the file is empty"):
        items.read_items(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="UTF-8"):
        items.read_items(tmp_path / "binary.jsonl")


def test_the_demo_task_is_whole() -> None:
    found = items.read_items(Path(__file__).parent.parent / "examples" / "tasks" / "lambada.jsonl")
    assert len(found) == 200
    assert {item.kind for item in found} == {"cloze"}


def test_a_problem_is_right_when_its_number_is_stated() -> None:
    problem = items.Item((("Question: q\nAnswer:", " 1,000 + 8 = 1,008\n#### 1,008"),), 0, "problem", final="1008")
    assert problem.judge_text(" It is 1,008.\n#### 1,008\n\n") == {"exact_match": 1.0, "flexible_match": 1.0}
    assert problem.judge_text(" so that makes $1,008.") == {"exact_match": 0.0, "flexible_match": 1.0}
    assert problem.judge_text(" #### 10081") == {"exact_match": 0.0, "flexible_match": 0.0}
    assert problem.judge_text("") == {"exact_match": 0.0, "flexible_match": 0.0}


def test_problems_are_written_out_as_one_at_a_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of unequal lengths share a batch, end at a stop string, and are judged in their order."""
    prompts = [words(i, 1 + 3 * i % 7) for i in range(6)]
    stops = ["e"]
    together = Loaded(model, 10_000).generate(prompts, stops, 24, tokenizer, "test")
    for prompt, text in zip(prompts, together, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)  # type: ignore[operator]
        assert text == str(tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)).split("e")[0]
    path = write(tmp_path / "sums.jsonl", [{"question": str(i), "answer": f"#### {i}", "final": str(i)} for i in range(5)])
    monkeypatch.setattr(Loaded, "generate", lambda self, prompts, *_: [f"#### {len(p) and p[10]}" for p in prompts[:4]] + [""])
    (found,) = tasks.run_task(Loaded(model, 1), tokenizer, path)
    assert (found.metric, found.correct) == ("exact_match", (1, 1, 1, 1, 0))


def test_examples_of_the_subject_stand_before_a_question(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for subject, name in (("sea_life", "mmlu_dev_fewshot"), ("trees", "mmlu_dev_fewshot"), ("trees", "mmlu_test")):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"subject": subject, "query": f"{subject} {i}?", "choices": ["A", "B"], "gold": i % 2} for i in range(3)]
        path.write_text((path.read_text() if path.exists() else "") + "".join(json.dumps(row) + "\n" for row in rows))
    asked: list[Request] = []
    original = Loaded.score

    def spied(self: Loaded, requests: Sequence[Request], description: str) -> list[Likelihood]:
        asked.extend(requests)
        return original(self, requests, description)

    monkeypatch.setattr(Loaded, "score", spied)
    tasks.run_task(Loaded(model, 4096), tokenizer, tmp_path / "mmlu_test.jsonl", shots=2)
    about = "The following are multiple choice questions (with answers) about trees.\n\n"
    assert tokenizer.decode(list(asked[0].context[1:])) == f"{about}trees 0? A\n\ntrees 1? B\n\ntrees 0?"
    asked.clear()
    tasks.run_task(Loaded(model, 4096), tokenizer, tmp_path / "mmlu_test.jsonl", shots=0)
    assert tokenizer.decode(list(asked[0].context[1:])) == "trees 0?"


def test_a_file_of_two_kinds_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.jsonl", [CHOICES[0], {"context": "c", "continuation": "x"}])
    with pytest.raises(DataError, match=r"mixed\.jsonl: holds items of the kinds choice and cloze"):
        items.read_items(path)
