"""The frequency search: YaRN is its start, what it writes is a RoPE that `ard restore` takes, and it never ends worse."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from restore.config import RestoreConfig
from restore.inspection import read_config, transformers_config
from restore.rope import plan_rope
from restore.rope_search import Shape, main

MakeCheckpoint = Callable[..., Path]


def test_the_start_is_yarn(make_checkpoint: MakeCheckpoint) -> None:
    """The same frequencies as transformers' own YaRN, which rounds the bounds of its ramp to whole pairs."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    base = read_config(make_checkpoint("llama3", head_dim=64, max_position_embeddings=4096))
    plan = plan_rope(base, 32768, "yarn")
    yarn = LlamaRotaryEmbedding(transformers_config(plan.target_config(base)))  # type: ignore[arg-type]
    native = LlamaRotaryEmbedding(transformers_config(plan.native_config(base)))  # type: ignore[arg-type]
    factors = torch.tensor(Shape().factors(500000.0, 64, 4096, 8.0))
    ours, theirs = native.inv_freq / factors, yarn.inv_freq
    assert isinstance(theirs, torch.Tensor)
    untouched = factors == 1
    assert torch.allclose(ours[untouched], theirs[untouched])
    assert factors[-1] == pytest.approx(8.0)
    assert float((ours / theirs).log().abs().max()) < 0.35
    assert 1 + Shape().temperature * math.log(8) == pytest.approx(yarn.attention_scaling)


def test_neighbours_are_tables_too() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        factors = Shape().moved(generator, 1.0).factors(1e4, 64, 2048, 8.0)
        assert len(factors) == 32
        assert all(math.isfinite(factor) and factor > 0 for factor in factors)


def test_the_result_is_no_worse_than_yarn_and_restorable(make_checkpoint: MakeCheckpoint, texts: Path, tmp_path: Path) -> None:
    model, found = make_checkpoint("qwen3"), tmp_path / "rope.yaml"
    words = [str(model), "--target-length", "512", "--data", str(texts), "--out", str(found)]
    assert main([*words, "--trials", "6", "--windows", "1"]) == 0
    trials = [json.loads(line) for line in found.with_suffix(".jsonl").read_text().splitlines()]
    assert len(trials) == 6
    assert trials[0]["shape"]["fast_turns"] == 32
    assert min(trial["loss"] for trial in trials) <= trials[0]["loss"]
    config = RestoreConfig.resolve(found, {"model": str(model), "data": (str(texts),), "out": tmp_path / "run"})
    plan = config.plan_rope(read_config(model))
    assert plan.rope_type == "longrope"
    assert plan.parameters["long_factor"] == yaml.safe_load(found.read_text())["rope_factors"]


def test_a_mistake_is_one_line(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere", "--target-length", "512", "--data", str(texts), "--out", str(tmp_path / "x.yaml")]) == 2
    assert capsys.readouterr().err.startswith("rope_search: nowhere: no such folder")
