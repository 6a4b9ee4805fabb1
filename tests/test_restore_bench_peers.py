"""Parts of a step beside libraries': ours is right, and what cannot run says why."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from restore import bench_peers


def rows(path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, dict[str, Any]]:
    common = ["--out", str(path), "--shapes", "tiny", "--tokens", "64", "--repeats", "1", "--commit", "c0ffee"]
    monkeypatch.setattr(sys, "argv", ["bench_peers", *common, *words])
    bench_peers.main()
    return {row["peer"]: row for row in json.loads(path.read_text())["runs"][-1]["rows"]}


@pytest.mark.parametrize("part", ["lm", "logits", "both"])
def test_losses_are_held_against_float64_and_a_peer_that_fails_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    eager = {name: loss for name, loss in bench_peers._OF_PART[part].items() if "compiled" not in name}
    monkeypatch.setitem(bench_peers._OF_PART, part, eager)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    found = rows(tmp_path / "peers.json", monkeypatch, "--parts", part)
    # Logits rounded to bf16, as they are on a CPU, cost a KL of two alike distributions a tenth of its gradient.
    assert found["ours"]["gradient_error"] < {"lm": 0.01, "logits": 0.15, "both": 0.02}[part]
    assert found["ours"]["loss_error"] < 0.01
    assert found["ours"]["fwd_bwd_ms"] > 0
    assert found["ours"]["gradient_error"] == pytest.approx(found["torch"]["gradient_error"], rel=0.1)
    assert "liger_kernel" in found["liger-kernel"]["error"]


def test_layers_run_with_their_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = rows(tmp_path / "peers.json", monkeypatch, "--parts", "layers")
    assert list(found) == ["ours", "ours, compiled", "transformers", "transformers, compiled"]
    assert all(row["fwd_bwd_ms"] > 0 and row["layers"] == 4 for row in found.values())
