"""Training: what a step does, what is kept, and that a run which stopped goes on as if it had not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ard_serve.errors import DataError, NumericsError, ResourceError, UsageError
from restore import checkpoint, metrics
from restore.config import RECIPES, RestoreConfig
from restore.data import TokenStream
from restore.flops import Counter
from restore.loading import load, load_tokenizer
from restore.model import TwoFaced
from restore.plan import learning_rate, peak_rate, plan_steps
from restore.retrieval import Weaver
from restore.rope import plan_rope
from restore.trainer import Trainer

CONFIG = {"vocab_size": 259, "model_type": "llama", "max_position_embeddings": 128, "hidden_size": 64, "num_attention_heads": 4}


def settings(**values: Any) -> RestoreConfig:
    defaults = {"model": "m", "target_length": 512, "data": ("x",), "out": "o", "rank": 4, "dtype": "fp32"}
    small = {"window": 64, "long_window": 128, "batch_tokens": 256, "steps": 6, "validation_every": 2, "checkpoint_every": 2}
    return RestoreConfig.model_validate(defaults | small | {"learning_rate": 0.01, "warmup_steps": 1} | values)


@pytest.fixture
def make_trainer(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer over a fresh copy of the same tiny model; the text is a repeated pattern, so that it can be learnt."""

    def make(folder: str = "run", weaver: Weaver | None = None, changed: str = "", **values: Any) -> Trainer:
        base = make_checkpoint("llama3")
        config = settings(**values)
        rope = plan_rope(json.loads((base / "config.json").read_text()), config.target_length, config.rope_type)
        faces = TwoFaced(load(base, torch.float32), rope, config)
        pattern = np.tile(np.arange(17, dtype=np.int32) * 13 % 251, 200)
        pattern[{"train data": 7, "validation data": -7}.get(changed, slice(0))] = 250
        train, held = TokenStream(pattern[:2400], 3), TokenStream(pattern[2400:], 1)
        return Trainer(faces, config, rope, train, held, tmp_path / folder, weaver=weaver)

    return make


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer._parameters.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_rate_is_never_zero_warms_up_and_ends_at_its_floor() -> None:
    config = settings(warmup_steps=4, min_learning_rate_ratio=0.1)
    rates = [learning_rate(config, 0.01, step, 20) for step in range(20)]
    assert rates[0] == pytest.approx(0.01 / 5)
    assert rates[:4] == sorted(rates[:4])
    assert max(rates) == rates[4] == pytest.approx(0.01)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.001)


def test_a_wide_model_learns_at_a_lower_rate_unless_one_is_set() -> None:
    unset = settings(learning_rate=None)
    rates = [peak_rate(unset, width) for width in (64, 576, 2048, 4096)]
    assert rates == [1e-3, 1e-3, 3.71e-4, 2.16e-4]
    assert peak_rate(settings(learning_rate=None, trainable="full"), 576) == 3e-4
    assert peak_rate(settings(), 4096) == 0.01


def test_a_step_is_filled_with_windows_of_both_kinds() -> None:
    rope = plan_rope(CONFIG, 512)
    plan = plan_steps(settings(window=None, long_window=None, batch_tokens=2048, steps=None, tokens=20_000), rope)
    assert (plan.window, plan.short_windows, plan.long_window, plan.long_windows) == (128, 8, 512, 2)
    assert (plan.tokens_in(0), plan.steps) == (2048, 9), "no more tokens than were asked for"
    assert plan_steps(settings(recipe="linearard"), rope).long_windows == 0
    assert plan_steps(settings(recipe="cpt"), rope).short_windows == 0


def test_a_long_window_that_is_more_than_its_share_of_a_step_comes_in_some_steps_alone() -> None:
    fields = {"window": None, "long_window": None, "steps": None, "batch_tokens": 256, "long_share": 0.5, "tokens": 5000}
    plan = plan_steps(settings(**fields), plan_rope(CONFIG, 512))
    assert (plan.short_windows, plan.long_windows, plan.long_every) == (1, 1, 4)
    assert [plan.tokens_in(step) for step in range(5)] == [640, 128, 128, 128, 640]
    assert sum(map(plan.tokens_in, range(plan.steps))) <= 5000 < sum(map(plan.tokens_in, range(plan.steps + 1)))
    assert str(plan) == "19 steps of 1 x 128 tokens to distil and 1 x 512 tokens to read in every 4 steps"
    less = plan_steps(settings(**fields | {"long_share": 0.25}), plan_rope(CONFIG, 512))
    assert (less.short_windows, less.long_every) == (2, 8), "1 of 4 tokens is in long windows, as near as windows go"


def test_a_step_without_a_long_window_teaches_what_the_teacher_knows(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    fields = {"window": 32, "long_window": 128, "batch_tokens": 128, "steps": 5, "cut_share": 0}
    trainer = make_trainer(**fields, objectives={"logits": 1.0, "lm": 1.0})
    assert trainer.plan.long_every == 2
    state = trainer.train()
    rows = metrics.read(tmp_path / "run")[1:]
    assert ["lm" in row for row in rows] == [True, False, True, False, True]
    assert all("lm" in row["validation"] for row in rows if "validation" in row)
    assert state.tokens == rows[-1]["tokens"] == 5 * 64 + 3 * 128
    assert rows[1]["tflops"] * rows[1]["seconds"] < rows[0]["tflops"] * rows[0]["seconds"]


def test_a_long_window_counts_for_the_steps_that_have_none(make_trainer: Callable[..., Trainer]) -> None:
    fields: dict[str, Any] = {"window": 32, "long_window": 128, "steps": 1, "objectives": {"logits": 1e-9, "lm": 1.0}}
    rare, always = (make_trainer(str(tokens), batch_tokens=tokens, **fields) for tokens in (128, 256))
    assert (rare.plan.long_every, always.plan.long_every) == (2, 1)
    of_rare, of_always = rare.step(), always.step()
    assert of_rare["lm"] == pytest.approx(of_always["lm"])
    assert of_rare["grad_norm"] == pytest.approx(2 * of_always["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"window": 129}, "window = 129: the teacher reads at most its native window of 128"),
        ({"long_window": 513}, "long_window = 513: at most the target length of 512"),
        ({"window": 2}, "window = 2: at least 4 tokens"),
        ({"long_window": 1}, "long_window = 1: at least 4 tokens"),
        ({"recipe": "cpt", "long_share": 0.0}, "long_share = 0 leaves nothing to train"),
    ],
)
def test_windows_nobody_can_read_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plan_steps(settings(**values), plan_rope(CONFIG, 512))


def test_a_model_told_by_a_dot_is_recorded_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model" / "below")
    assert settings(model=".").model == str(tmp_path / "model" / "below")
    assert settings(model="../..").model == str(tmp_path)
    assert settings(model="org/name").model == "org/name"


@pytest.mark.parametrize("objectives", [("self_relation", "attention", "logits"), ("lm",)])
def test_training_lowers_its_objectives_and_records_each_step(
    make_trainer: Callable[..., Trainer], tmp_path: Path, objectives: tuple[str, ...]
) -> None:
    trainer = make_trainer(steps=12, rope_type="linear", objectives=dict.fromkeys(objectives, 1.0))
    state = trainer.train()
    rows = metrics.read(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(13))
    for objective in objectives:
        assert rows[12]["validation"][objective] < rows[0]["validation"][objective], objective
    assert state.tokens == 12 * 256
    step = rows[1]
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_s", "tflops", "peak_memory_bytes", *objectives} <= step.keys()
    counter = Counter(trainer._faces.model.config.to_dict(), trainer._config)
    read = trainer._batches.of_step(0, range(len(trainer._batches.lengths(0))))
    assert step["tflops"] == pytest.approx(sum(counter.batch(batch).counted for batch in read) / step["seconds"] / 1e12)
    assert len(step["layer_kl"]) == (2 if "attention" in objectives else 0)
    assert step["loss"] == pytest.approx(sum(step[name] for name in objectives))
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_gradients_are_clipped_once_to_the_norm_of_the_whole_step(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(max_grad_norm=1e-3)
    trainer.step()
    total = torch.stack([p.grad.norm() for p in trainer._parameters.values() if p.grad is not None]).norm()
    assert float(total) == pytest.approx(1e-3, rel=1e-3)


def test_the_decay_of_squared_gradients_is_the_one_that_is_set(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(adam_beta2=0.5)
    trainer.step()
    for parameter in trainer._parameters.values():
        assert parameter.grad is not None
        torch.testing.assert_close(trainer._optimizer.state[parameter]["exp_avg_sq"], 0.5 * parameter.grad.square())


@pytest.mark.parametrize("at_once", [1, 2])
def test_accumulated_windows_give_the_mean_gradient(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Three windows in a step, in passes of one or of two, pull as the mean of each alone does."""

    def gradient(loss: torch.Tensor, share: float) -> list[torch.Tensor]:
        return [g * share for g in torch.autograd.grad(loss, list(trainer._parameters.values()))]

    monkeypatch.setattr("restore.plan._PASS_CHANNELS", at_once * 32 * 64)
    trainer = make_trainer(batch_tokens=160, window=32, long_window=64, max_grad_norm=1e9, cut_share=0, long_share=0.4)
    assert (trainer.plan.short_windows, trainer.plan.windows_at_once(64), trainer.plan.long_windows) == (3, at_once, 1)
    windows = [row[None] for batch in trainer._batches.of_step(0, range(4)) for row in batch.ids_BT]
    apart = [gradient(trainer._losses.distil(window)[0], 1 / 3) for window in windows[:3]]
    apart.append(gradient(trainer._losses.language_model(windows[3])[0], 1))
    trainer._accumulate(list(trainer._batches.of_step(0, range(4))), long_windows=1)
    for parameter, *parts in zip(trainer._parameters.values(), *apart, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, sum(parts))


@pytest.mark.fault("R14")
@pytest.mark.parametrize("stop_after", [1, 2, 5])
def test_a_stopped_run_resumes_bit_equal(make_trainer: Callable[..., Trainer], tmp_path: Path, stop_after: int) -> None:
    whole = make_trainer("whole")
    whole.train()
    stopped = make_trainer("halves")
    state = stopped.train(should_stop=lambda: stopped.state.step == stop_after)
    assert state.step == stop_after
    resumed = make_trainer("halves", resume=True)
    final = resumed.train()
    assert equal(weights_of(resumed), weights_of(whole))
    assert final == whole.state

    def losses(folder: str) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in metrics.read(tmp_path / folder) if "loss" in row]

    assert losses("halves") == losses("whole")


def test_all_that_an_optimizer_remembers_comes_back_to_where_its_parameters_are() -> None:
    """The count of steps too, which a fused AdamW on a GPU refuses from the CPU; `meta` stands for another device."""
    parameter = torch.nn.Parameter(torch.empty(2, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    kept = {f"optimizer.w.{name}": torch.ones(2) for name in ("exp_avg", "exp_avg_sq")} | {
        "optimizer.w.step": torch.tensor(3.0)
    }
    checkpoint.restore_optimizer(kept, {"w": parameter}, optimizer)
    assert {name: value.device.type for name, value in optimizer.state[parameter].items()} == {
        "exp_avg": "meta", "exp_avg_sq": "meta", "step": "meta",
    }  # fmt: skip


def test_every_objective_at_once_with_jumps_facts_and_weighted_layers_resumes_bit_equal(
    make_trainer: Callable[..., Trainer], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    weaver = Weaver(load_tokenizer(make_checkpoint("llama3")), spacing=400)
    objectives = dict.fromkeys(("self_relation", "attention", "logits", "hidden", "lm", "retrieval"), 1.0)
    everything: dict[str, Any] = {
        "weaver": weaver, "objectives": objectives, "long_window": 512, "batch_tokens": 1024, "steps": 4,
        "jump_share": 0.5, "layer_weighting": "equal_loss",
    }  # fmt: skip
    whole = make_trainer("whole", **everything)
    state = whole.train()
    step = metrics.read(tmp_path / "whole")[1]
    assert objectives.keys() <= step.keys()
    first = metrics.read(tmp_path / "whole")[0]["validation"]
    assert len(state.layer_weights) == 2
    weighted = [weight * kl for weight, kl in zip(state.layer_weights, first["layer_kl"], strict=True)]
    assert weighted == pytest.approx([sum(first["layer_kl"]) / 2] * 2)
    halves = make_trainer("halves", **everything)
    halves.train(should_stop=lambda: halves.state.step == 2)
    resumed = make_trainer("halves", resume=True, **everything)
    assert resumed.train() == state
    assert equal(weights_of(resumed), weights_of(whole))


@pytest.mark.fault("R15")
def test_a_damaged_checkpoint_is_passed_over(
    make_trainer: Callable[..., Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_trainer("whole")
    whole.train()
    make_trainer("run").train()
    newest = tmp_path / "run" / "checkpoints" / "step-000006" / "tensors.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    resumed = make_trainer("run", resume=True)
    resumed.train()
    assert "step-000006: damaged checkpoint (sha256 mismatch)" in caplog.text
    assert equal(weights_of(resumed), weights_of(whole))


@pytest.mark.fault("R16")
def test_resuming_with_other_settings_is_refused_with_the_difference(make_trainer: Callable[..., Trainer]) -> None:
    make_trainer("run").train()
    with pytest.raises(UsageError, match=r"resume: learning_rate is 0\.02, the checkpoint was made with 0\.01"):
        make_trainer("run", resume=True, learning_rate=0.02).train()


@pytest.mark.fault("R16")
def test_resuming_by_a_version_whose_recipe_is_another_is_refused(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer("run", recipe="distill").train()
    monkeypatch.setitem(RECIPES, "distill", {"attention": 1.0, "logits": 2.0})
    with pytest.raises(
        UsageError, match=r"resume: objectives is .*'logits': 2\.0.*, the checkpoint was made with .*'logits': 1\.0"
    ):
        make_trainer("run", recipe="distill", resume=True).train()


@pytest.mark.fault("R16")
@pytest.mark.parametrize("what", ["train data", "validation data", "threads"])
def test_resuming_on_other_data_or_threads_is_refused(make_trainer: Callable[..., Trainer], what: str) -> None:
    make_trainer("run").train()
    threads = torch.get_num_threads()
    try:
        if what == "threads":
            torch.set_num_threads(threads + 1)
        resumed = make_trainer("run", resume=True, changed=what)
        with pytest.raises(UsageError, match=rf"resume: {what} is .*, the checkpoint was made with .*--resume-changed"):
            resumed.train()
    finally:
        torch.set_num_threads(threads)


def test_resuming_with_other_settings_goes_on_when_told_to(
    make_trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer("run", steps=4).train()
    state = make_trainer("run", steps=6, resume=True, resume_changed=True).train()
    assert state.step == 6
    assert "resume: steps is 6, the checkpoint was made with 4" in caplog.text


@pytest.mark.fault("R17")
def test_a_non_finite_loss_changes_no_weight_and_keeps_the_batch(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make_trainer()
    (tmp_path / "run").mkdir()
    before = weights_of(trainer)
    # Damage deep inside a real forward: an infinite norm weight makes every logit NaN.
    trainer._faces.model.model.norm.weight.data[3] = float("inf")
    with pytest.raises(NumericsError, match=r"step 1: loss nan.*the weights were not changed") as refusal:
        trainer.step()
    assert equal(weights_of(trainer), before)
    saved = json.loads((tmp_path / "run" / "bad-batch-step-1.json").read_text())
    assert [len(window) for window in saved] == [32, 32, 64, 128], "one of two windows is cut into short texts"
    assert "--learning-rate" in str(refusal.value)
    with pytest.raises(NumericsError, match="validation after step 0: loss nan"):
        trainer.train()


@pytest.mark.fault("R17")
def test_a_gradient_that_is_not_finite_changes_no_weight(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """The loss itself is finite: its weight is so large that the squares of its gradients are not."""
    trainer = make_trainer(objectives={"logits": 1e30})
    (tmp_path / "run").mkdir()
    before = weights_of(trainer)
    with pytest.raises(NumericsError, match=r"step 1: loss \d.*gradient norm inf; the weights were not changed") as refusal:
        trainer.step()
    assert refusal.value.exit_code == 6
    assert equal(weights_of(trainer), before)
    assert (tmp_path / "run" / "bad-batch-step-1.json").exists()


@pytest.mark.fault("R18")
@pytest.mark.parametrize(("rate", "says"), [(3.0, "the run diverged"), (1e-12, "the run made nothing better")])
def test_a_run_that_diverges_or_teaches_nothing_ends_with_its_best_weights_kept(
    make_trainer: Callable[..., Trainer], tmp_path: Path, rate: float, says: str
) -> None:
    with pytest.raises(NumericsError, match=rf"step \d: validation loss .*{says}.*step 0.*--learning-rate") as refusal:
        make_trainer(learning_rate=rate, steps=8, validation_every=1).train()
    assert refusal.value.exit_code == 6
    found = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    best = checkpoint.group(found[1], "best")
    assert all(not value.any() for name, value in best.items() if name.endswith("lora_B"))


def test_a_run_that_taught_nothing_is_refused_again_when_it_is_resumed_after_its_last_step(
    make_trainer: Callable[..., Trainer],
) -> None:
    for resume in (False, True):
        with pytest.raises(NumericsError, match="the run made nothing better"):
            make_trainer(learning_rate=1e-12, steps=2, validation_every=1, resume=resume).train()


def test_a_run_may_be_sharded_otherwise_when_it_is_resumed(make_trainer: Callable[..., Trainer]) -> None:
    """`auto` is settled by free memory, which is no part of what a run is; a sharded step has the bits of a whole one."""
    make_trainer(shard="off").train(lambda: True)
    assert make_trainer(shard="auto", resume=True).train().step == 6


@pytest.mark.fault("R12")
def test_a_full_disk_keeps_the_last_good_checkpoint(
    make_trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    with pytest.MonkeyPatch.context() as patch:
        written: list[int] = []

        def fails_the_second_time(tensors: dict[str, torch.Tensor], path: Path) -> None:
            written.append(1)
            if len(written) == 2:
                path.write_bytes(b"half")
                raise OSError(28, "No space left on device")
            save_file(tensors, path)

        patch.setattr(checkpoint, "save_file", fails_the_second_time)
        with pytest.raises(ResourceError, match=r"step-000004: cannot write .*No space left.*last good one is .*step-000002"):
            trainer.train()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    found = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found[0].step == 2


def test_validation_text_shorter_than_a_window_is_refused(make_trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(DataError, match="held out for validation, fewer than one window of 2048"):
        make_trainer(target_length=4096, long_window=2048)
