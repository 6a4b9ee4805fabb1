"""lm-evaluation-harness runs on our engine and agrees with our own reading of the same items."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ard_serve.errors import UsageError
from restore import loading
from restore.evaluation import harness, tasks

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


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"harness = piqa: .*pip install 'ard-serve\[harness\]'"):
        harness.run_harness(None, None, ["piqa"], None, 1)  # type: ignore[arg-type]


def test_the_harness_scores_the_same_items_alike(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")
    folder = make_checkpoint("llama3", seed=11)
    model, tokenizer = loading.load(folder, torch.float32), loading.load_tokenizer(folder)
    items = [{"query": f"{i} and {i + 1} are", "choices": [f"{2 * i}", f"{i} less", "so"], "gold": i % 3} for i in range(12)]
    cloze = [{"context": f"{i} and {i}", "continuation": str(i)} for i in range(12)]
    for kind, rows, fields in (("choice", items, CHOICE), ("cloze", cloze, CLOZE)):
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"ard_{kind}.yaml").write_text(YAML.format(kind=kind, file=file, fields=fields))
    names = [str(tmp_path / "ard_choice.yaml"), str(tmp_path / "ard_cloze.yaml")]
    by_harness = harness.run_harness(model, tokenizer, names, None, 512)
    assert [score.name for score in by_harness] == ["ard_choice", "ard_cloze"]
    for score in by_harness:
        ours = tasks.run_task(model, tokenizer, tmp_path / f"{score.name.removeprefix('ard_')}.jsonl", None, 512)
        assert score.correct == ours.correct
        assert score.metrics == pytest.approx({name: ours.metrics[name] for name in score.metrics})
    with pytest.raises(UsageError, match="knows no task 'nonsense'"):
        harness.run_harness(model, tokenizer, ["nonsense"], None, 512)
