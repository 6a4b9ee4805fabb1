"""Short tasks score as a plain loop over items does, whatever shares a batch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ard_serve.errors import DataError
from restore import loading
from restore.evaluation import likelihood, tasks

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
    found = tasks.run_task(model, tokenizer, write(tmp_path / "quiz.jsonl", CHOICES), None, batch_tokens)
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
    found = tasks.run_task(model, tokenizer, write(tmp_path / "hellaswag.jsonl", CHOICES), None, 4096)
    assert found.metric == "acc_norm"
    assert found.value == pytest.approx(found.metrics["acc_norm"])


def test_partial_context_is_the_context_that_makes_the_continuation_likeliest(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    found = tasks.run_task(model, tokenizer, write(tmp_path / "winogrande.jsonl", CONTEXTS), None, 4096)
    sums = [[naive(model, tokenizer, c, f" {i['continuation']}")[0] for c in i["context_options"]] for i in CONTEXTS]
    assert found.correct == tuple(int(row.index(max(row)) == i["gold"]) for row, i in zip(sums, CONTEXTS, strict=True))


def test_a_cloze_is_right_when_it_is_what_greedy_decoding_writes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    items = []
    for start in range(40):
        context = words(start, 4)
        greedy = likelihood.continue_greedily(model, torch.tensor([tokenizer(context + " ")["input_ids"]]), 1)
        items.append({"context": context, "continuation": str(tokenizer.decode(greedy[0].tolist())) if start % 2 else "a"})
    items = [item for item in items if item["continuation"].isalnum()]
    found = tasks.run_task(model, tokenizer, write(tmp_path / "cloze.jsonl", items), None, 4096)
    expected = [naive(model, tokenizer, item["context"], " " + item["continuation"]) for item in items]
    assert found.correct == tuple(int(greedy) for _, greedy in expected)
    assert found.metrics["perplexity"] == pytest.approx(
        float(torch.tensor([-log_prob for log_prob, _ in expected], dtype=torch.float64).mean().exp())
    )


def test_letters_of_one_question_share_a_forward_pass(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = likelihood.hidden_states

    def counted(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
        rows.append(len(ids_BT))
        return original(model, ids_BT)

    monkeypatch.setattr(likelihood, "hidden_states", counted)
    requests = [likelihood.Request((1, 2, 3), (letter,)) for letter in range(65, 69)]
    scored = likelihood.score(model, requests, 4096, "letters")
    assert rows == [1]
    assert len({value.log_prob for value in scored}) == 4


def test_spaces_that_end_a_context_belong_to_the_continuation(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tasks.encode_pair(tokenizer, "a  ", "b") == tasks.encode_pair(tokenizer, "a", "  b")


def test_a_limit_takes_items_from_the_whole_file(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"context": f"c{i}", "continuation": "x"} for i in range(11)])
    assert [item.pairs[0][0] for item in tasks.read_items(path, 3)] == ["c0", "c5", "c10"]
    assert len(tasks.read_items(path)) == 11


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
    ],
)
def test_a_bad_item_is_named_by_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"context": "c", "continuation": "x"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:3: expected"):
        tasks.read_items(path)


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
    with pytest.raises(DataError, match="no items"):
        tasks.read_items(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="UTF-8"):
        tasks.read_items(tmp_path / "binary.jsonl")


def test_the_demo_task_is_whole() -> None:
    items = tasks.read_items(Path(__file__).parent.parent / "examples" / "tasks" / "lambada.jsonl")
    assert len(items) == 200
    assert all(item.cloze for item in items)
