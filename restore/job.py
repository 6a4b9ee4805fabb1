"""One restoration from end to end: check, load, train, merge, verify, measure, publish."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from ard_serve import console
from ard_serve.artifact import DataRecord, Quality, RecipeRecord
from ard_serve.errors import QualityGateError, UsageError
from restore import checkpoint, devices, metrics, report
from restore.config import RestoreConfig
from restore.data import read_documents, split_documents, tokenize, write_documents
from restore.evaluate import evaluate_restoration, machine
from restore.evaluation import gate, preflight
from restore.evaluation.config import EvalConfig
from restore.evaluation.results import EvaluationReport
from restore.export import Assessment, Provenance, Reference, check_room, export
from restore.fit import check_evaluation, check_memory, kept_layers, memory_errors, refuse_quadratic
from restore.forecast import forecast
from restore.inspection import read_config
from restore.loading import Checkpoint, inspect, load, load_tokenizer, resolve
from restore.model import Kept, TwoFaced
from restore.parallel import ALONE, World, joined
from restore.plan import plan_steps
from restore.quantize import is_quantized, quantize
from restore.retrieval import Weaver
from restore.rope import RopePlan
from restore.runfolder import CHECKPOINTS, CONFIG, DATA, EVALUATION, HELD_OUT, MODEL, Stopped, StopSignal, locked
from restore.trainer import Trainer

_REFERENCE_TOKENS = 256
_EXPORT_LATER = "all training is saved; with more memory, or on the CPU (CUDA_VISIBLE_DEVICES= ): ard export {}"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A base model that passed every check, with fresh adapters on it."""

    config: RestoreConfig
    base: Checkpoint
    rope: RopePlan
    faces: TwoFaced


def run(config: RestoreConfig) -> int:
    """Restore a model as `config` says and publish it at OUT/model; returns the exit code.

    Under torchrun every process calls this, and shares the training; the one that leads does all else.
    """
    with joined(devices.type_of(config.device)) as world, StopSignal() as stop:
        if world.leads:
            return _lead(config, world, stop)
        loaded, state, steps = _train(config, world, stop)
        if loaded.faces.shards and state.step == steps:
            _reference(loaded)  # the process that leads needs everyone's shards for it
        return stop.exit_code if stop.received else 0


def _lead(config: RestoreConfig, world: World, stop: StopSignal) -> int:
    with locked(config.out):
        _refuse_overwriting(config)
        loaded, state, steps = _train(config, world, stop)
        if state.step < steps:
            return _stopped(config, stop, f"at step {state.step} of {steps}")
        measure = partial(_measure, loaded) if config.evaluate else None
        try:
            if not loaded.faces.shards:  # others wait for this process to put the model together, and that is soon done
                stop.act_at_once()  # all training is saved, and an evaluation can take longer than anyone waits
            _publish(loaded, state.step, state.tokens, config.out / MODEL, measure, machine(devices.type_of(config.device)))
        except Stopped:
            return _stopped(config, stop, f"after the last of {state.step} steps")
    return 0


def _train(config: RestoreConfig, world: World, stop: StopSignal) -> tuple[Loaded, checkpoint.RunState, int]:
    """Check, load and train until the last step or a signal: the model, where the run stands, and how many steps it has.

    The trainer's own memory, optimizer and all, is free when this returns.
    """
    # What comes afterwards has no backward, and forward passes with a mask need what this rules out.
    with devices.deterministic(config.deterministic), memory_errors(config, devices.type_of(config.device)):
        loaded, trainer = _prepare(config, world)
        (config.out / EVALUATION).unlink(missing_ok=True)  # it was of weights that will not be the result
        return loaded, trainer.train(lambda: stop.received is not None), trainer.plan.steps


def _stopped(config: RestoreConfig, stop: StopSignal, where: str) -> int:
    by = stop.received.name if stop.received else "another process, which was told to"
    console.err.print(f"stopped by {by} {where}; go on with:", soft_wrap=True, highlight=False)
    console.err.print(f"ard restore --config {config.out / CONFIG} --resume", soft_wrap=True, highlight=False)
    return stop.exit_code


def export_run(folder: Path, out: Path | None, evaluation: Path | None, force: bool = False) -> int:
    """Merge and publish the best weights of the restoration in `folder` again; returns the exit code.

    Args:
        folder: the OUT of `ard restore`.
        out: where to publish; `folder`/model when None.
        evaluation: an evaluation.json of this model, for its card and manifest; held to the limits of the run's config. When
            None the run's own, if it was measured.
        force: publish although a limit is missed.
    """
    if not (folder / CONFIG).exists():
        raise UsageError(f"{folder}: not a restoration, it has no {CONFIG}; give the OUT of `ard restore`")
    config = RestoreConfig.resolve(folder / CONFIG, {"out": folder, "force": force})
    if evaluation is None and (folder / EVALUATION).exists():
        evaluation = folder / EVALUATION
    found = report.read(evaluation) if evaluation else None
    with locked(folder), memory_errors(config, devices.type_of(config.device)):
        newest = checkpoint.load_newest(folder / CHECKPOINTS)
        if newest is None:
            raise UsageError(f"{folder}: no whole checkpoint to export; run `ard restore --config {folder / CONFIG}` first")
        state, tensors = newest
        # The adapters are added to the original weights, however those were kept in training.
        plain = {"shard": "off", "quantize": None} | ({"device": "cpu"} if config.quantize else {})
        loaded = replace(_load(config.model_copy(update=plain)), config=config)
        loaded.faces.adapters.load_state(checkpoint.group(tensors, "best"))
        _publish(loaded, state.step, state.tokens, out or folder / MODEL, (lambda _: found) if found else None)
    return 0


def _prepare(config: RestoreConfig, world: World) -> tuple[Loaded, Trainer]:
    """Every check from the cheapest on, then the data, then the weights."""
    folder = resolve(config.model)
    rope = config.plan_rope(read_config(folder))
    plan = plan_steps(config, rope)
    _log.info("%s: %d tokens to %d, %s", folder, rope.native_window, rope.target_length, rope.rope_type)
    _log.info("%s", plan)
    devices.warn_if_slow(config.dtype, devices.type_of(config.device))
    refuse_quadratic(config, plan, devices.type_of(config.device))
    train_documents, held_documents = split_documents(read_documents(config.data), config.validation_share, config.seed)
    settled, needed = check_memory(read_config(folder), rope, config, _device(config), world)
    _log.info("memory: about %s", needed)
    kept = kept_layers(read_config(folder), rope, settled, needed, _device(config))
    if kept != Kept():
        counts = (kept.distilling, kept.reading, needed.layers, kept.distilling_attention, kept.reading_attention)
        told = "%d (to distil) and %d (long windows) of %d layers keep their work until backward, %d and %d their attention"
        _log.info(f"there is more: {told}", *counts)
    if settled.shard == "on" and config.evaluate:
        raise UsageError(
            "evaluate: a sharded model fits no device whole; add --no-evaluate and measure it served (ard eval --server)"
        )
    tokenizer = load_tokenizer(folder)
    if config.evaluate and world.leads:
        whole = forecast(read_config(folder), rope, config.model_copy(update={"quantize": None})) if config.quantize else needed
        check_evaluation(read_config(folder), whole.weights_bytes, _evaluation(config, rope), _device(config))
        preflight.check(tokenizer, _evaluation(config, rope), None if config.evaluation.data else held_documents)
    loaded = _load(settled, world)
    loaded.faces.kept = kept
    trained = sum(parameter.numel() for parameter in loaded.faces.adapters.parameters())
    check_room(loaded.base, config.out / MODEL, checkpoint_bytes=checkpoint.room_bytes(config.out / CHECKPOINTS, trained))
    vocab_size = int(loaded.base.config["vocab_size"])
    train, held = (tokenize(documents, tokenizer, vocab_size) for documents in (train_documents, held_documents))
    weaver = Weaver(tokenizer, config.retrieval_spacing) if "retrieval" in config.weights else None
    trainer = Trainer(loaded.faces, settled, rope, train, held, config.out, world, weaver)
    if world.leads:
        config.spelled_out().model_copy(update={"learning_rate": trainer.peak_rate}).save(config.out / CONFIG)
        write_documents(held_documents, config.out / HELD_OUT)
        source = ", ".join(config.data)
        record = DataRecord(source=source, documents=train.documents, tokens=len(train.ids), sha256=train.sha256)
        (config.out / DATA).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return loaded, trainer


def _load(config: RestoreConfig, world: World = ALONE) -> Loaded:
    base = inspect(resolve(config.model))
    rope = config.plan_rope(base.config)
    native = rope.native_config(base.config)
    if config.shard == "on":
        from restore.sharding import Shards, load_sharded  # imports much of torch.distributed

        model = load_sharded(base, native, _dtype(config), _device(config), world)
        return Loaded(config, base, rope, TwoFaced(model, rope, config, Shards(model.model.layers)))
    model = load(base.folder, _dtype(config), "cpu" if config.quantize else _device(config), native)
    if config.quantize:
        model = quantize(model, config.quantize, _device(config))
    return Loaded(config, base, rope, TwoFaced(model, rope, config))


def _measure(loaded: Loaded, folder: Path) -> EvaluationReport:
    """Native, stretched and restored on the held-out documents, or on what the config names."""
    return evaluate_restoration(folder, loaded.base.folder, _evaluation(loaded.config, loaded.rope))


def _evaluation(config: RestoreConfig, rope: RopePlan) -> EvalConfig:
    """What is measured at the end, every length stated."""
    settings = config.evaluation.model_copy(update={"dtype": config.dtype, "device": config.device})
    if not settings.data:
        settings = settings.model_copy(update={"data": (str(config.out / HELD_OUT),)})
    return settings.for_target(rope.target_length, rope.native_window)


def _publish(
    loaded: Loaded,
    steps: int,
    tokens: int,
    out: Path,
    measure: Callable[[Path], EvaluationReport] | None,
    trained_on: str | None = None,
) -> None:
    config, rope = loaded.config, loaded.rope
    recipe = RecipeRecord(
        name=config.recipe_name,
        objectives=config.weights,
        trainable=_trained(config),
        steps=steps,
        tokens=tokens,
        seed=config.seed,
    )
    data = DataRecord.model_validate_json((config.out / DATA).read_bytes())
    steps_done = metrics.read(config.out)
    done = report.Restoration(
        config.model,
        rope.native_window,
        rope.target_length,
        rope.rope_type,
        recipe,
        data,
        trained_on=trained_on,
        trained_s=sum(row.get("seconds", 0.0) for row in steps_done),
    )

    def assess(folder: Path) -> Assessment:
        found = measure(folder) if measure else None
        if found is None:
            return Assessment(report.model_card(done))
        verdict = gate.judge(found, config.gate, rope.native_window)
        judged = replace(done, checks=verdict.checks, served_limit=verdict.served_limit)
        report.print_summary(found)
        paths = report.write(found, config.out, judged, steps_done)
        if verdict.failures and not config.force:
            raise QualityGateError(gate.refusal(verdict.failures, config.out))
        return Assessment(
            report.model_card(judged, found), _quality(found, verdict.served_limit), tuple(paths), forced=bool(verdict.failures)
        )

    provenance = Provenance(config.model, recipe, data)
    with memory_errors(config, devices.type_of(config.device), _EXPORT_LATER.format(config.out)):
        reference = _reference(loaded)
        if not loaded.faces.shards:
            loaded.faces.let_go()  # the export is loaded next, and then the models it is compared with
            devices.give_back()
        export(loaded.base, rope, loaded.faces.adapters.delta, out, provenance, reference=reference, assess=assess,
               device="cpu" if loaded.faces.shards or config.quantize else _device(config))  # fmt: skip
    console.out.print(f"restored model: {out}", highlight=False, soft_wrap=True)


def _quality(found: EvaluationReport, served_limit: int | None) -> Quality:
    scores = {model.name: model.scores for model in found.models if model.name in ("native", "stretched", "restored")}
    return Quality(**scores, served_limit=served_limit)


@torch.no_grad()
def _reference(loaded: Loaded) -> Reference:
    """Logits of the unmerged student on tokens spread over the vocabulary: what the export must give too."""
    spread = torch.randperm(int(loaded.base.config["vocab_size"]), generator=torch.Generator().manual_seed(0))
    ids_BT = spread[None, :_REFERENCE_TOKENS]
    faces = _unquantised(loaded) if is_quantized(loaded.faces.model) else loaded.faces
    logits_BTV = linear(faces.student(ids_BT.to(faces.model.device)), faces.head_weight_VC)
    return Reference(ids_BT, logits_BTV.float().cpu(), _dtype(loaded.config))


def _unquantised(loaded: Loaded) -> TwoFaced:
    """The adapters on the weights that they will be added to, on the CPU."""
    config = loaded.config.model_copy(update={"quantize": None})
    model = load(loaded.base.folder, _dtype(config), "cpu", loaded.rope.native_config(loaded.base.config))
    faces = TwoFaced(model, loaded.rope, config)
    faces.adapters.load_state({name: value.detach() for name, value in loaded.faces.adapters.state().items()})
    _log.info("trained on a %s base; the adapters are added to the original weights", loaded.config.quantize)
    return faces


def _trained(config: RestoreConfig) -> str:
    """What learnt, in words."""
    what = f"LoRA of rank {config.rank}" if config.trainable == "lora" else "full-rank deltas"
    return f"{what} on a {config.quantize} base, added to the original weights" if config.quantize else what


def _refuse_overwriting(config: RestoreConfig) -> None:
    if not config.resume and any((config.out / CHECKPOINTS).glob("step-*")):
        raise UsageError(f"{config.out}: holds an earlier run; add --resume to go on with it, or choose another --out")


def _device(config: RestoreConfig) -> torch.device:
    kind = devices.type_of(config.device)
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _dtype(config: RestoreConfig) -> torch.dtype:
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32
