"""What happens around training: whose memory is free when, what ends where, and what is said when it runs out."""

import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ard_serve.cli import main
from ard_serve.errors import ResourceError, UsageError
from restore import devices, evaluate, fit, parallel, relations, verification
from restore.config import RestoreConfig
from restore.evaluation.config import EvalConfig
from restore.parallel import World
from restore.plan import plan_steps
from restore.rope import plan_rope
from restore.trainer import Trainer

# LLaMA2-7B's config.json, as far as memory goes.
LLAMA2 = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
WEIGHTS_BYTES = 13_500_000_000
CPU = torch.device("cpu")


@pytest.fixture
def words(make_checkpoint: Callable[..., Path], texts: Path, tmp_path: Path) -> list[str]:
    small = [
        "--window",
        "64",
        "--long-window",
        "256",
        "--batch-tokens",
        "512",
        "--rank",
        "4",
        "--steps",
        "2",
        "--dtype",
        "fp32",
    ]
    held = ["--validation-share", "0.3", "--validation-windows", "1"]
    run = ["restore", str(make_checkpoint("llama3")), "--data", str(texts), "--target-length", "512", "--device", "cpu"]
    return [*run, *small, *held, "--out", str(tmp_path / "run")]


def test_what_training_held_is_free_before_the_export_is_loaded(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the export would stand beside the trained model and its optimizer, and need a card of twice the size."""
    held: list[weakref.ref[Any]] = []
    train, verify, seen = Trainer.train, verification.verify_logits, []

    def trained(self: Trainer, should_stop: Callable[[], bool]) -> Any:
        held.extend(map(weakref.ref, (self, self._optimizer, self._faces.model)))
        return train(self, should_stop)

    def verified(*given: Any) -> float:
        seen.append([reference() is None for reference in held])
        return verify(*given)

    monkeypatch.setattr(Trainer, "train", trained)
    monkeypatch.setattr(Trainer, "_refuse_divergence", lambda *_: None)
    monkeypatch.setattr("restore.export.verify_logits", verified)
    assert main([*words, "--no-evaluate"]) == 0
    assert seen == [[True, True, True]]


def test_an_evaluation_that_would_not_fit_after_training_is_refused_before(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EvalConfig(data=("d",), lengths=(4096, 32768), needle_lengths=(32768,), dtype="bf16")
    monkeypatch.setattr(fit, "_free_bytes", lambda _: 40_000_000_000)
    fit.check_evaluation(LLAMA2, WEIGHTS_BYTES, settings, CPU)
    monkeypatch.setattr(fit, "_free_bytes", lambda _: 24_000_000_000)
    with pytest.raises(
        ResourceError, match=r"needs about 3\d\.\d GB \(weights 13\.5 GB, .* 32768 tokens 17\.2 GB.*--no-evaluate"
    ):
        fit.check_evaluation(LLAMA2, WEIGHTS_BYTES, settings, CPU)
    fit.check_evaluation(LLAMA2, WEIGHTS_BYTES, settings.model_copy(update={"needle_samples": 0}), CPU)


def test_a_restoration_asks_for_its_evaluations_memory_before_it_trains(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(*_: Any) -> None:
        raise ResourceError("too little for that")

    monkeypatch.setattr("restore.job.check_evaluation", refused)
    assert main(words) == 5
    assert "too little for that" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_that_another_process_was_told_to_stop_publishes_nothing(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda self, _: self._state)
    assert main([*words, "--no-evaluate"]) == 143
    said = capsys.readouterr().err
    assert "stopped by another process" in said
    assert "--resume" in said
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore"),
            "CUDA out of memory. Tried to allocate 1 GiB",
        ),
        (RuntimeError("NCCL error\nLast error:\nCuda failure 2 'out of memory'"), "Cuda failure 2 'out of memory'"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "CUBLAS_STATUS_ALLOC_FAILED"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "Triton Error"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "DefaultCPUAllocator"),
        (MemoryError(), "host memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_out_of_memory_is_known_by_whatever_name_it_comes(error: Exception, reason: str | None) -> None:
    found = devices.full(error)
    assert (found is None) if reason is None else (reason in (found or ""))


def test_an_evaluation_out_of_memory_is_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_much(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")

    monkeypatch.setattr(evaluate, "_measure", too_much)
    out = ["--out", str(tmp_path / "e"), "--dtype", "fp32", "--lengths", "64", "--needle-samples", "0"]
    assert main(["eval", *words[1:4], *out]) == 5
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ard eval:")]
    assert "Tried to allocate 40 GiB" in said
    assert "--dtype bf16" in said


def test_only_training_is_held_to_one_order_of_sums(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention with a mask, as an evaluation has it, would take memory by the square under it, and gain nothing."""
    seen: list[bool] = []
    train = Trainer.train

    def trained(*given: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return train(*given)

    monkeypatch.setattr(Trainer, "_refuse_divergence", lambda *_: None)
    monkeypatch.setattr(Trainer, "train", trained)
    monkeypatch.setattr("restore.job._publish", lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert main([*words, "--no-evaluate", "--deterministic"]) == 0
    assert seen == [True, False]


def test_bit_equal_fp32_over_long_windows_is_refused_on_a_gpu() -> None:
    fields: dict[str, Any] = {"model": "m", "target_length": 32768, "data": ("d",), "out": "o", "deterministic": True}
    for dtype, device_type, is_refused in (("fp32", "cuda", True), ("bf16", "cuda", False), ("fp32", "cpu", False)):
        config = RestoreConfig.model_validate(fields | {"dtype": dtype})
        plan = plan_steps(config, plan_rope(LLAMA2 | {"rope_theta": 1e4}, 32768, "yarn"))
        if is_refused:
            with pytest.raises(UsageError, match=r"over 32768 tokens.*--dtype bf16"):
                fit.refuse_quadratic(config, plan, device_type)
        else:
            fit.refuse_quadratic(config, plan, device_type)


def test_in_fp32_on_a_gpu_attention_gets_as_many_key_heads_as_query_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one kernel for fp32 that does not make [T, T] takes no shared key heads."""
    heads: list[tuple[Any, ...]] = []

    def seen(module: Any, query: Tensor, key: Tensor, value: Tensor, *given: Any, **named: Any) -> Any:
        heads.append((query.shape[1], key.shape[1], value.shape[1], hasattr(module, "num_key_value_groups")))
        return sdpa_attention_forward(module, query, key, value, *given, **named)

    monkeypatch.setattr(relations, "sdpa_attention_forward", seen)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2  # type: ignore[assignment]
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    shared, _ = relations._attention(module, query, key, value, None)
    monkeypatch.setattr(relations, "is_cuda_fp32", lambda _: True)
    repeated, _ = relations._attention(module, query, key, value, None)
    assert heads == [(4, 2, 2, True), (4, 4, 4, False)]
    torch.testing.assert_close(repeated, shared)


def test_free_memory_is_read_after_the_processes_first_message(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Two(World):
        def any(self, here: bool, _: torch.device) -> bool:
            asked.append("message")
            return here

    def free(_: torch.device) -> int:
        asked.append("free")
        return 1 << 50

    monkeypatch.setattr(fit, "_free_bytes", free)
    config = RestoreConfig.model_validate(
        {"model": "m", "target_length": 512, "data": ("d",), "out": "o", "rank": 8, "shard": "off"}
    )
    base = LLAMA2 | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    base |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 1e4}
    fit.check_memory(base, plan_rope(base, 512, "yarn"), config, CPU, Two(0, 2))
    assert asked[:2] == ["message", "free"]


def test_a_report_names_what_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert evaluate.machine("cuda").startswith("NVIDIA H100, ")
    assert "CPU threads" in evaluate.machine("cpu")


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """NCCL would, and they wait for it."""
    done: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in {"init_process_group": lambda _: None, "get_rank": lambda: 0}.items():
        monkeypatch.setattr(distributed, name, value)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: done.append("destroyed"))
    if fails:
        with pytest.raises(ResourceError), parallel.joined("cpu"):
            raise ResourceError("the disk is full")
    else:
        with parallel.joined("cpu"):
            pass
    assert done == ([] if fails else ["destroyed"])


def test_one_of_several_processes_says_what_failed_and_ends_at_once(tmp_path: Path) -> None:
    program = f"""
        import atexit, sys
        from torch import distributed
        from ard_serve.cli import main
        distributed.init_process_group("gloo", init_method="file://{tmp_path}/group", rank=0, world_size=1)
        atexit.register(print, "waited for the others")
        sys.exit(main(["restore", "{tmp_path}/nowhere", "--target-length", "512", "--data", "d", "--out", "{tmp_path}/run"]))
    """
    command: Sequence[str] = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "ard restore: " in ended.stderr
    assert "waited" not in ended.stdout
