"""Every way to stretch is measured on the same windows, the native model first."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import rope_table, rope_types


def test_every_type_is_measured_and_kept(
    make_checkpoint: Callable[..., Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = tmp_path / "rope.json", make_checkpoint("llama3")
    (tmp_path / "searched.yaml").write_text(json.dumps({"rope_factors": [4.0] * 8, "rope_attention_factor": 1.0}))
    words = [str(model), str(out), "--target-length", "512", "--data", str(texts), "--lengths", "64", "256", "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", ["rope_types", *words, "--searched", str(tmp_path / "searched.yaml")])
    rope_types.main()
    record = json.loads(out.read_text())
    found = {row["rope"]: row["ppl"] for row in record["rows"]}
    assert list(found) == ["native", "yarn", "linear", "llama3", "theta", "longrope, searched"]
    assert all(ppl.keys() == {"64", "256"} for ppl in found.values())
    assert len({ppl["256"] for ppl in found.values()}) >= 5, "they differ; a table of one factor is linear's"
    assert len(record["documents"]) == 2


def test_the_page_shows_its_results() -> None:
    text = rope_table.PAGE.read_text(encoding="utf-8")
    assert "| yarn | 38.8 | " in text
    assert rope_table.filled(text) == text, "run python -m scripts.rope_table"
