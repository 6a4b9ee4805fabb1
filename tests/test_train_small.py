"""Small models of other families come out as ordinary checkpoints that can be restored, and have learnt something."""

import re
from pathlib import Path

import pytest

from restore.loading import inspect, load_tokenizer
from restore.rope import plan_rope
from scripts import train_small


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_a_small_model_of_a_family_can_be_stretched(
    texts: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    monkeypatch.setattr(train_small, "_SHAPE", small)
    words = [family, "--data", str(texts), "--held-out", str(texts / "book-0.txt"), "--out", str(tmp_path / "model")]
    sizes = ["--window", "64", "--vocabulary", "300", "--layers", "1", "--batch-tokens", "1024", "--minutes", "0.15"]
    assert train_small.main([*words, *sizes]) == 0
    found = inspect(tmp_path / "model")
    assert (found.config["model_type"], found.config["num_hidden_layers"]) == (family, 1)
    plan = plan_rope(found.config, 512)
    assert (plan.native_window, plan.factor) == (64, 8)
    assert load_tokenizer(found.folder)("rain")["input_ids"]
    (perplexity,) = re.findall(r"perplexity (\S+) on 1 held-out", capsys.readouterr().out)
    assert float(perplexity) < 100, "guessing would be the size of the vocabulary, 300"


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["qwen2", "--data", str(tmp_path), "--held-out", str(tmp_path), "--out", str(tmp_path / "model")]
    assert train_small.main(words) == 4
    assert capsys.readouterr().err.startswith("train_small: ")
