"""The teacher is the untouched model bit for bit, whatever the student has learnt."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from restore.config import RestoreConfig
from restore.model import Kept, TwoFaced, _Comparing
from restore.objectives import Losses
from restore.recompute import KeptRows
from restore.rope import RopeType, head_dim, plan_rope

IDS = torch.arange(3, 99)[None] % 256


def two_faces(folder: Path, dtype: torch.dtype = torch.float32, **settings: object) -> TwoFaced:
    values = {"model": str(folder), "target_length": 512, "data": ("x",), "out": Path("x"), "rank": 4, **settings}
    config = RestoreConfig.model_validate(values)
    plan = config.plan_rope(json.loads((folder / "config.json").read_text()))
    return TwoFaced(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), plan, config)


@torch.no_grad()
def teacher_logits(faces: TwoFaced) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's logits by transformers' own forward, and by the paired pass beside an active student."""
    with faces.as_teacher() as model:
        plain = model(IDS).logits
    _, hidden, _ = faces.pair(IDS)
    return plain, faces.model.lm_head(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_teacher_is_the_untouched_model_before_during_and_after_training(
    make_checkpoint: Callable[..., Path], family: str, trainable: str, dtype: torch.dtype
) -> None:
    folder = make_checkpoint(family)
    with torch.no_grad():
        untouched = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(IDS).logits
    faces = two_faces(folder, dtype, trainable=trainable)
    losses = Losses(faces, {"self_relation": 1.0, "attention": 1.0, "logits": 1.0})
    optimizer = torch.optim.AdamW(faces.adapters.parameters(), lr=0.05)
    for _ in range(3):
        for logits in teacher_logits(faces):
            assert torch.equal(logits, untouched)
        loss, _, _ = losses.distil(IDS)
        torch.autograd.backward(loss)
        for logits in teacher_logits(faces):  # Gradients waiting, graph just used.
            assert torch.equal(logits, untouched)
        optimizer.step()
        optimizer.zero_grad()
    for logits in teacher_logits(faces):
        assert torch.equal(logits, untouched)
    with torch.no_grad():
        assert not torch.allclose(faces.model(IDS).logits, untouched, atol=0.1), "the student must have moved away"


@pytest.mark.parametrize("rope_type", ["yarn", "longrope"])
def test_student_before_training_is_the_stretched_model(
    make_checkpoint: Callable[..., Path], family: str, rope_type: RopeType
) -> None:
    folder = make_checkpoint(family)
    config = json.loads((folder / "config.json").read_text())
    factors = [1.0 + pair for pair in range(head_dim(config) // 2)] if rope_type == "longrope" else None
    faces = two_faces(folder, rope_type=rope_type, rope_factors=factors)
    stretched = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plan = plan_rope(config, 512, rope_type, rope_factors=factors)
    stretched_config = type(stretched.config).from_dict(plan.target_config(config))
    stretched.model.rotary_emb = type(stretched.model.rotary_emb)(stretched_config)
    with torch.no_grad():
        hidden, _, _ = faces.pair(IDS)
        assert torch.equal(faces.model.lm_head(hidden), stretched(IDS).logits)
        assert torch.equal(faces.model.lm_head(faces.student(IDS)), stretched(IDS).logits)


def test_adapters_come_back_when_a_teacher_pass_fails(make_checkpoint: Callable[..., Path]) -> None:
    faces = two_faces(make_checkpoint("llama3"), trainable="full")
    for parameter in faces.adapters.parameters():
        parameter.data.fill_(0.01)
    with torch.no_grad():
        before = faces.model(IDS).logits
        with pytest.raises(RuntimeError), faces.as_teacher():
            raise RuntimeError
        assert torch.equal(faces.model(IDS).logits, before)


def test_merging_the_reported_deltas_gives_the_student(make_checkpoint: Callable[..., Path], family: str) -> None:
    for trainable in ("lora", "full"):
        faces = two_faces(make_checkpoint(family), trainable=trainable)
        torch.manual_seed(1)
        for parameter in faces.adapters.parameters():
            parameter.data.normal_(0, 0.02)
        merged = two_faces(make_checkpoint(family))
        for name, weight in merged.model.named_parameters():
            delta = faces.adapters.delta(name.replace(".base_layer.", "."))
            if delta is not None:
                weight.data += delta
        with torch.no_grad():
            torch.testing.assert_close(merged.model(IDS).logits, faces.model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_checkpointed_gradients_equal_plain_ones(make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputation captures each layer's relations again, and only they count once; a layer that is kept gives the same."""

    def gradients(kept: int = 0) -> list[torch.Tensor]:
        faces = two_faces(make_checkpoint("qwen3"))
        faces.kept = Kept(kept, kept)
        loss, _, _ = Losses(faces, {"self_relation": 1.0, "attention": 1.0, "logits": 1.0}).distil(IDS)
        torch.autograd.backward(loss)
        return [parameter.grad for parameter in faces.adapters.parameters() if parameter.grad is not None]

    checkpointed = gradients()
    runs: list[bool] = []
    run = _Comparing.__call__

    def noted(self: _Comparing, *args: Any) -> Any:
        runs.append(args[3])
        return run(self, *args)

    monkeypatch.setattr(_Comparing, "__call__", noted)
    for kept, again in ((1, 1), (2, 0)):
        for a, b in zip(gradients(kept), checkpointed, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert sum(runs) == again, "layers that ran again in backward"
        runs.clear()
    monkeypatch.setattr("restore.model.recomputed", lambda layer, *hidden: layer(*hidden[:2], KeptRows(), False))
    monkeypatch.setattr("restore.objectives.checkpoint", lambda function, *a, **_: function(*a))
    plain = gradients()
    assert len(plain) == len(checkpointed) == 16
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("objectives", [("attention", "logits"), ("lm",)])
def test_attention_that_is_kept_does_not_run_again_and_changes_no_bit(
    make_checkpoint: Callable[..., Path], objectives: tuple[str, ...]
) -> None:
    folder = make_checkpoint("llama3")
    attends = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
        calls = 0

        def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += operation == attends
            return operation(*args, **(kwargs or {}))

    def step(kept: Kept) -> tuple[list[torch.Tensor], int]:
        faces = two_faces(folder)
        faces.kept = kept
        losses = Losses(faces, dict.fromkeys(objectives, 1.0))
        with Counted() as counted:  # type: ignore[no-untyped-call]
            torch.autograd.backward((losses.language_model if "lm" in objectives else losses.distil)(IDS)[0])
        return [parameter.grad for parameter in faces.adapters.parameters() if parameter.grad is not None], counted.calls

    teachers = 0 if "lm" in objectives else 2
    again, calls = step(Kept())
    assert calls == teachers + 4
    for kept, expected in ((Kept(0, 0, 1, 1), 3), (Kept(0, 0, 2, 2), 2), (Kept(1, 1, 1, 1), 2)):
        gradients, calls = step(kept)
        assert calls == teachers + expected
        assert len(gradients) == len(again)
        assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_backward_does_not_run_the_relation_kernel_forward_again(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from restore.kernels import chunked

    calls: list[tuple[int, ...]] = []
    forward = chunked.forward

    def counted(query: torch.Tensor, *rest: Any) -> Any:
        calls.append(query.shape)
        return forward(query, *rest)

    monkeypatch.setattr(chunked, "forward", counted)
    loss, _, _ = Losses(two_faces(make_checkpoint("llama3")), {"attention": 1.0, "self_relation": 1.0}).distil(IDS)
    torch.autograd.backward(loss)
    assert len(calls) == 2 * 4, "two layers; attention rows, Q/Q, K/K and V/V once each"


def test_backward_runs_the_students_layer_again_and_nothing_of_the_teachers_but_its_relations(
    make_checkpoint: Callable[..., Path],
) -> None:
    faces = two_faces(make_checkpoint("llama3"))
    ran: list[str] = []
    for layer in faces.layers:
        layer.mlp.register_forward_hook(lambda *_: ran.append("mlp"))  # type: ignore[union-attr]
    loss, _, _ = Losses(faces, {"attention": 1.0}).distil(IDS)
    assert len(ran) == 2 * 2, "two layers, two faces"
    torch.autograd.backward(loss)
    assert len(ran) == 2 * 2 + 2
