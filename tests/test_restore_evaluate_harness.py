"""lm-evaluation-harness runs on our engine and agrees with our own reading of the same items."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from ard_serve.errors import UsageError
from restore import loading
from restore.evaluation import harness, tasks
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
        ours = tasks.run_task(reader, tokenizer, tmp_path / f"{score.name.removeprefix('ard_')}.jsonl")
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
    ours = tasks.run_task(spy, tokenizer, tmp_path / "mmlu_test.jsonl", shots=2)
    assert asked[0] == asked[1]
    assert theirs.correct == ours.correct
