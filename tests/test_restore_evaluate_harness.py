"""lm-evaluation-harness runs on our engine and agrees with our own reading of the same items."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml

from ard_serve.errors import UsageError
from restore import loading
from restore.evaluation import harness, primers, tasks
from restore.evaluation.likelihood import Loaded
from restore.evaluation.reader import Likelihood, Request

YAML = """\
task: ard_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
{fields}
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
CLOZE = """\
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + continuation}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
WRITTEN = """\
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""
EXAMPLES = """\
fewshot_split: dev
num_fewshot: 2
fewshot_config: {sampler: first_n}
description: "The following are multiple choice questions (with answers) about trees.\\n\\n"
"""


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"harness = piqa: .*pip install 'ard-serve\[harness\]'"):
        harness.run_harness(None, None, ["piqa"], None)  # type: ignore[arg-type]


def test_the_harness_scores_the_same_items_alike(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")
    folder = make_checkpoint("llama3", seed=11)
    reader, tokenizer = Loaded(loading.load(folder, torch.float32), 512), loading.load_tokenizer(folder)
    items = [{"query": f"{i} and {i + 1} are", "choices": [f"{2 * i}", f"{i} less", "so"], "gold": i % 3} for i in range(12)]
    cloze = [{"context": f"{i} and {i}", "continuation": str(i)} for i in range(12)]
    for kind, rows, fields in (("choice", items, CHOICE), ("cloze", cloze, CLOZE)):
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"ard_{kind}.yaml").write_text(YAML.format(kind=kind, file=file, fields=fields))
    names = [str(tmp_path / "ard_choice.yaml"), str(tmp_path / "ard_cloze.yaml")]
    by_harness = harness.run_harness(reader, tokenizer, names, None)
    assert [score.name for score in by_harness] == ["ard_choice", "ard_cloze"]
    for score in by_harness:
        (ours,) = tasks.run_task(reader, tokenizer, tmp_path / f"{score.name.removeprefix('ard_')}.jsonl")
        assert score.correct == ours.correct
        assert score.metrics == pytest.approx({name: ours.metrics[name] for name in score.metrics})
    queries = [str(item["query"]) for item in items]
    written = reader.generate(queries, ["e"], 12, tokenizer, "test")
    rows = [{"query": q, "written": text + "x" * (i % 2)} for i, (q, text) in enumerate(zip(queries, written, strict=True))]
    file = tmp_path / "written.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ard_written.yaml").write_text(YAML.format(kind="written", file=file, fields=WRITTEN))
    (generated,) = harness.run_harness(reader, tokenizer, [str(tmp_path / "ard_written.yaml")], None)
    assert generated.correct == (1, 0) * 6
    with pytest.raises(UsageError, match="knows no task 'nonsense'"):
        harness.run_harness(reader, tokenizer, ["nonsense"], None)


def test_likelihoods_and_texts_are_those_of_the_harness_and_its_own_model_class(make_checkpoint: Callable[..., Path]) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = make_checkpoint("llama3", seed=11)
    model, tokenizer = loading.load(folder, torch.float32), loading.load_tokenizer(folder)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4)
    questions = [f"{primers.of('truthfulqa')[:50]}\n\nQ: {'how many ' * (i % 3)}oaks are {i}?\nA:" for i in range(8)]
    pairs = [(question, f" {choice}") for question in questions for choice in ("a", "an oak", "an ash", "none of these")]
    ours = Loaded(model, 1024).score(tasks.encode_pairs(tokenizer, pairs), "test")
    found = theirs.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)], disable_tqdm=True)
    assert [one.log_prob for one in ours] == pytest.approx([log_prob for log_prob, _ in found], rel=1e-5)
    assert [one.is_greedy for one in ours] == [greedy for _, greedy in found]
    settings = {"until": ["e"], "max_gen_toks": 12}
    asked = [Instance("generate_until", {}, (question, settings), n) for n, question in enumerate(questions)]
    texts = Loaded(model, 1024).generate(questions, ["e"], 12, tokenizer, "test")
    assert texts == theirs.generate_until(asked, disable_tqdm=True)


def test_examples_stand_before_a_question_as_in_the_harness(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")
    folder = make_checkpoint("llama3", seed=11)
    reader, tokenizer = Loaded(loading.load(folder, torch.float32), 4096), loading.load_tokenizer(folder)
    for name, first in (("mmlu_dev_fewshot", 100), ("mmlu_test", 0)):
        rows = [
            {"subject": "trees", "query": f"{first + i} trees?\nAnswer:", "choices": ["A", "B", "ash"], "gold": i % 3}
            for i in range(8)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = f"{tmp_path}/mmlu_test.jsonl, dev: {tmp_path}/mmlu_dev_fewshot.jsonl"
    (tmp_path / "ard_shots.yaml").write_text(YAML.format(kind="shots", file=files, fields=CHOICE + EXAMPLES))
    asked: list[tuple[Request, ...]] = []

    class Spy(Loaded):
        def score(self, requests: Sequence[Request], description: str) -> list[Likelihood]:
            asked.append(tuple(sorted(requests, key=lambda request: (request.context, request.continuation))))
            return super().score(requests, description)

    spy = Spy(reader.model, 4096)
    (theirs,) = harness.run_harness(spy, tokenizer, [str(tmp_path / "ard_shots.yaml")], None)
    (ours,) = tasks.run_task(spy, tokenizer, tmp_path / "mmlu_test.jsonl", shots=2)
    assert asked[0] == asked[1]
    assert theirs.correct == ours.correct


def test_truthfulqa_is_asked_behind_the_questions_that_the_harness_asks_it_behind() -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")
    definition = (Path(lm_eval.__file__).parent / "tasks" / "truthfulqa" / "truthfulqa_mc1.yaml").read_text(encoding="utf-8")
    asked = yaml.safe_load(definition)["doc_to_text"]
    primer = primers.of("truthfulqa_mc").removesuffix("\n\n")
    assert primer in asked.replace("\\n", "\n")
    assert primers.of("piqa") == ""
