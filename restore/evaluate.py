"""`ard eval`: measure models one after the other on the same text and tasks, compare them, and report."""

import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ard_serve
from ard_serve.artifact import Manifest, read_manifest
from ard_serve.console import progress
from ard_serve.errors import ResourceError, UsageError
from restore import data, devices, loading, report
from restore.evaluation import compare, gate, harness, perplexity, preflight, retrieval, sliding, tasks
from restore.evaluation.config import EvalConfig, GateConfig
from restore.evaluation.haystack import Haystack
from restore.evaluation.likelihood import Loaded
from restore.evaluation.reader import Reader
from restore.evaluation.results import Comparison, Evaluation, EvaluationReport, TaskScore
from restore.evaluation.served import Served
from restore.inspection import read_config
from restore.rope import served_length

_log = logging.getLogger(__name__)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EvalConfig, name: str = "model") -> Evaluation:
    """Measure one loaded model: perplexity by window length and position, needles, short tasks.

    Args:
        model: a causal language model in evaluation mode; it is used as it is, adapters and RoPE included.
        tokenizer: the model's own.
        config: what to measure; lengths that are not stated go up to what the model's config says it serves.
        name: what reports call the model.

    Raises:
        UsageError: no text to measure on.
        DataError: text or tasks that are missing, unreadable or too short.
    """
    return _evaluate(
        Loaded(model, config.batch_tokens), tokenizer, config.for_target(served_length(model.config.to_dict())), name
    )


def _evaluate(reader: Reader, tokenizer: PreTrainedTokenizerBase, config: EvalConfig, name: str) -> Evaluation:
    """Measure what is behind a reader; the lengths of `config` are stated."""
    started = time.monotonic()
    (sources, ids), bos = preflight.encode(tokenizer, config.data), data.bos_ids(tokenizer)
    windows = perplexity.cut_windows(ids, bos, config.lengths, config.windows)
    with progress(f"{name}: perplexity", sum(cut.ids_WT.numel() for cuts in windows.values() for cut in cuts)) as bar:
        scores, curve = perplexity.measure(reader, windows, bar)
    return Evaluation(
        name=name,
        perplexity=tuple(scores),
        window_documents=tuple(sources[at] for at, _ in perplexity.places(ids, bos, max(config.lengths), config.windows)),
        by_position=curve,
        sliding=tuple(sliding.measure(reader, ids, bos, config.sliding, config.windows, name)) if config.sliding else (),
        haystack=sources[max(range(len(ids)), key=lambda at: len(ids[at]))] if config.needle_samples else None,
        needles=tuple(retrieval.measure(reader, Haystack(tokenizer, ids, bos), config, name)) if config.needle_samples else (),
        tasks=tuple(_tasks(reader, tokenizer, config)),
        seconds=time.monotonic() - started,
    )


def run(
    model: str,
    config: EvalConfig,
    out: Path,
    *,
    against: Sequence[str] = (),
    base: str | None = None,
    stretched: bool = True,
    server: str | None = None,
) -> int:
    """Evaluate `model` beside its native and its stretched but untouched self and beside other models.

    Writes evaluation.json, report.md and report.html to `out`, and prints the table.

    Args:
        model: folder or hub name; an export brings the manifest that says what it was made from.
        config: what to measure.
        out: folder of the report; made when missing.
        against: more models to measure.
        base: the model that an export was restored from; its manifest's own entry when not given.
        stretched: measure the base with the export's RoPE too, its weights untouched.
        server: URL of a server that serves `model`; it is asked instead of the folder's weights, and only what `base` and
            `against` name is measured beside it.

    Returns:
        The exit code, 0.
    """
    folder = loading.resolve(model)
    manifest = read_manifest(folder)
    target_length = manifest.rope.target_length if manifest else served_length(read_config(folder))
    config = config.for_target(target_length, manifest.base.native_window if manifest else None)
    candidates = _candidates(model, folder, manifest, base, stretched, against, server)
    if server:
        _served(server, config)
    preflight.check_folders([candidate.folder for candidate in candidates], config)
    _make(out)
    try:
        found = _measure(candidates, config)
    except (RuntimeError, MemoryError) as error:
        if (reason := devices.full(error)) is None:
            raise
        fewer = "shorter --lengths and --needle-lengths, fewer --batch-tokens" + ", --dtype bf16" * (config.dtype == "fp32")
        raise ResourceError(f"out of memory ({reason}); give {fewer}, or measure it served (--server)") from None
    restoration = report.Restoration.from_manifest(manifest) if manifest else None
    if restoration and {"native", "restored"} <= {candidate.name for candidate in candidates}:
        verdict = gate.judge(found, GateConfig(), restoration.native_window)
        restoration = replace(restoration, checks=verdict.checks, served_limit=verdict.served_limit)
    report.print_summary(found)
    try:
        paths = report.write(found, out, restoration)
    except OSError as error:
        raise ResourceError(f"{out}: the report cannot be written ({error.strerror}); choose another --out") from None
    _log.info("report: %s", paths[-1])
    return 0


def evaluate_restoration(restored: Path, base: Path, config: EvalConfig) -> EvaluationReport:
    """Measure an export beside its native and its stretched but untouched self.

    Args:
        restored: folder of the export.
        base: folder it was restored from.
        config: what to measure, its lengths stated.
    """
    candidates = [
        Candidate("native", base),
        Candidate("stretched", base, read_config(restored)),
        Candidate("restored", restored),
    ]
    return _measure(candidates, config)


def _measure(candidates: "Sequence[Candidate]", config: EvalConfig) -> EvaluationReport:
    """Check every folder and task before hours go into the first, then measure one model at a time.

    Text and prompts were checked before: by `run`, and before its training by a restoration.
    """
    preflight.check_tasks(config)
    for folder in dict.fromkeys(candidate.folder for candidate in candidates):
        loading.inspect(folder)
    return make_report([candidate.measure(config) for candidate in candidates], config)


def make_report(results: Sequence[Evaluation], config: EvalConfig) -> EvaluationReport:
    """Put evaluations side by side, each compared with the first, on the machine they were measured on."""
    comparisons: list[Comparison] = []
    for other in results[1:]:
        comparisons += compare.compare(results[0], other)
    return EvaluationReport(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        ard_serve_version=ard_serve.__version__,
        machine=machine(config.device),
        config=config.model_dump(mode="json"),
        models=tuple(results),
        comparisons=tuple(comparisons),
    )


@dataclass(frozen=True)
class Candidate:
    """A model to measure: weights and tokenizer of an inspected `folder`, with another config.json where one is given.

    With a `server`, the folder gives the tokenizer alone and the server's model is measured.
    """

    name: str
    folder: Path
    config: dict[str, Any] | None = None
    server: str | None = None

    def measure(self, settings: EvalConfig) -> Evaluation:
        """Evaluate the model and let go of its memory; the lengths of `settings` are stated."""
        found = _evaluate(self._open(settings), loading.load_tokenizer(self.folder), settings, self.name)
        devices.give_back()
        _log.info("%s: measured in %.0f s", self.name, found.seconds)
        return found.model_copy(update={"server": self.server})

    def _open(self, settings: EvalConfig) -> Reader:
        if self.server:
            return _served(self.server, settings)
        device = devices.type_of(settings.device)
        devices.warn_if_slow(settings.dtype, device)
        return Loaded(loading.load(self.folder, _DTYPES[settings.dtype], device, self.config), settings.batch_tokens)


def _served(url: str, settings: EvalConfig) -> Served:
    served = Served(url)
    longest = max((*settings.lengths, *settings.sliding, *(settings.needle_lengths if settings.needle_samples else ())))
    if longest > served.window:
        raise UsageError(f"server = {url}: serves {served.window} tokens, the longest window has {longest}; lower --lengths")
    return served


def _candidates(
    model: str,
    folder: Path,
    manifest: Manifest | None,
    base: str | None,
    stretched: bool,
    against: Sequence[str],
    server: str | None,
) -> list[Candidate]:
    """Native first, since everything is compared with the first."""
    found: list[Candidate] = []
    # Whoever measures a server has perhaps no accelerator for other models: they are named or left out.
    if base_folder := _base_folder(folder, manifest if server is None else None, base):
        found.append(Candidate("native", base_folder))
        if stretched:
            found.append(Candidate("stretched", base_folder, read_config(folder)))
    found.append(Candidate("restored" if manifest else called(model), folder, server=server))
    found += [Candidate(called(other), loading.resolve(other)) for other in against]
    names = [candidate.name for candidate in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two models are called '{twice}': rename a folder, reports tell models apart by name")
    return found


def called(model: str) -> str:
    """What reports call a model: the last part of its folder's path or of its hub name, whose folder is called by a hash."""
    return Path(os.path.abspath(Path(model).expanduser())).name


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        writable = os.access(out, os.W_OK | os.X_OK)
    except OSError as error:
        raise ResourceError(f"{out}: cannot be made ({error.strerror}); choose another --out") from None
    if not writable:
        raise ResourceError(f"{out}: cannot be written; choose another --out")


def _base_folder(folder: Path, manifest: Manifest | None, base: str | None) -> Path | None:
    if base is not None:
        return loading.resolve(base)
    if manifest is None:
        return None
    try:
        return loading.resolve(manifest.base.name)
    except UsageError:
        _log.warning("%s was restored from %s, which is not here: give --base to compare with it", folder, manifest.base.name)
        return None


def _tasks(reader: Reader, tokenizer: PreTrainedTokenizerBase, config: EvalConfig) -> Iterator[TaskScore]:
    for path in tasks.find_tasks(config.tasks):
        yield from tasks.run_task(reader, tokenizer, path, config.limit, config.shots)
    if config.harness:
        yield from harness.run_harness(reader, tokenizer, config.harness, config.limit)


def machine(device_type: str = "auto") -> str:
    """What computes here, as reports name it; `device_type` is "cuda", "cpu" or "auto", the first where there is one."""
    on_gpu = device_type != "cpu" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, {platform.machine()}, torch {torch.__version__}"
