"""`--deterministic`: the same bits again, and after a stop; on a GPU where there is one."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ard_serve.cli import main
from ard_serve.errors import UsageError
from restore import metrics
from restore.trainer import Trainer

ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize(
    ("device", "dtype", "recompute"),
    [
        ("cpu", "fp32", "none"),
        *(pytest.param("cuda", *rest, marks=ON_A_GPU) for rest in product(("bf16", "fp32"), ("all", "none"))),
    ],
)
def test_a_deterministic_run_ends_with_the_same_bits_again_and_stopped(
    make_checkpoint: Callable[..., Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    device: str, dtype: str, recompute: str,
) -> None:  # fmt: skip
    """On a GPU with heads of 128 channels, as large models have them, so that it takes the kernels of large models."""
    model = make_checkpoint("llama3", **({"hidden_size": 512, "head_dim": 128} if device == "cuda" else {}))
    words = ["restore", str(model), "--data", str(texts), "--target-length", "512", "--window", "64", "--long-window", "256"]
    words += ["--batch-tokens", "512", "--rank", "8", "--validation-share", "0.3", "--validation-windows", "1"]
    words += ["--device", device, "--dtype", dtype, "--recompute", recompute, "--deterministic", "--no-evaluate"]
    words += ["--steps", "4", "--checkpoint-every", "2"]
    # Whether so small a model gets better does not matter here.
    monkeypatch.setattr(Trainer, "_refuse_divergence", lambda *_: None)
    monkeypatch.setattr("restore.job._publish", lambda *_: None)
    train = Trainer.train
    for out in ("whole", "again"):
        assert main([*words, "--out", str(tmp_path / out)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda self, _: train(self, lambda: self.state.step == 2))
        assert main([*words, "--out", str(tmp_path / "halves")]) == 143
    assert main([*words, "--out", str(tmp_path / "halves"), "--resume"]) == 0
    for other in ("again", "halves"):
        for whole, row in zip(metrics.read(tmp_path / "whole"), metrics.read(tmp_path / other), strict=True):
            timeless = whole.keys() - {"seconds", "tokens_per_s", "tflops", "of_matrix_rate", "peak_memory_bytes"}
            assert {name: row[name] for name in timeless} == {name: whole[name] for name in timeless}
        tensors = Path("checkpoints") / "step-000004" / "tensors.safetensors"
        assert (tmp_path / other / tensors).read_bytes() == (tmp_path / "whole" / tensors).read_bytes()


def test_deterministic_holds_for_the_whole_run_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def looked(*_: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled() and not torch.backends.cuda.mem_efficient_sdp_enabled())  # type: ignore[no-untyped-call]
        raise UsageError("seen enough")

    monkeypatch.setattr("restore.job._prepare", looked)
    words = ["restore", "m", "--data", "d", "--target-length", "512", "--device", "cpu"]
    for more in (["--deterministic"], []):
        assert main([*words, *more, "--out", str(tmp_path / f"run-{len(more)}")]) == 2
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()
