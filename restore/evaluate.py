"""`ard eval`: measure models one after the other on the same text and tasks, compare them, and report."""

import gc
import logging
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ard_serve
from ard_serve.artifact import Manifest, read_manifest
from ard_serve.console import progress
from ard_serve.errors import UsageError
from restore import data, loading, report
from restore.evaluation import compare, harness, perplexity, retrieval, tasks
from restore.evaluation.config import EvalConfig
from restore.evaluation.haystack import Haystack
from restore.evaluation.results import Comparison, Evaluation, EvaluationReport, TaskScore
from restore.inspection import read_config

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
    started = time.monotonic()
    if not config.data:
        raise UsageError("data: name held-out text to measure on; text the model was trained on proves nothing")
    config = config.for_target(served_length(model.config.to_dict()))
    documents = [document.text for document in data.read_documents(config.data)]
    ids, bos = [_encode(tokenizer, text) for text in documents], data.bos_ids(tokenizer)
    windows = perplexity.cut_windows(ids, bos, config.lengths, config.windows)
    with progress(f"{name}: perplexity", sum(window.numel() for window in windows.values())) as bar:
        scores, curve = perplexity.measure(model, windows, config.batch_tokens, bar)
    return Evaluation(
        name=name,
        perplexity=tuple(scores),
        by_position=curve,
        needles=tuple(retrieval.measure(model, Haystack(tokenizer, ids, bos), config, name)) if config.needle_samples else (),
        tasks=tuple(_tasks(model, tokenizer, config)),
        seconds=time.monotonic() - started,
    )


def run(
    model: str, config: EvalConfig, out: Path, *, against: Sequence[str] = (), base: str | None = None, stretched: bool = True
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

    Returns:
        The exit code, 0.
    """
    folder = loading.resolve(model)
    manifest = read_manifest(folder)
    config = config.for_target(manifest.rope.target_length if manifest else served_length(read_config(folder)))
    candidates = _candidates(folder, manifest, base, stretched, against)
    out.mkdir(parents=True, exist_ok=True)
    found = _measure(candidates, config)
    restoration = report.Restoration.from_manifest(manifest) if manifest else None
    paths = report.write(found, out, restoration)
    report.print_summary(found)
    _log.info("report: %s", paths[-1])
    return 0


def evaluate_restoration(restored: Path, base: Path, target_length: int, config: EvalConfig) -> EvaluationReport:
    """Measure an export beside its native and its stretched but untouched self.

    Args:
        restored: folder of the export.
        base: folder it was restored from.
        target_length: tokens the export serves, up to which lengths double where the config states none.
        config: what to measure.
    """
    candidates = [
        _Candidate("native", base),
        _Candidate("stretched", base, read_config(restored)),
        _Candidate("restored", restored),
    ]
    return _measure(candidates, config.for_target(target_length))


def _measure(candidates: "Sequence[_Candidate]", config: EvalConfig) -> EvaluationReport:
    """Check every folder before hours go into the first, then measure one model at a time."""
    for folder in dict.fromkeys(candidate.folder for candidate in candidates):
        loading.inspect(folder)
    results: list[Evaluation] = []
    for candidate in candidates:
        loaded = candidate.load(config)
        results.append(evaluate(loaded, loading.load_tokenizer(candidate.folder), config, candidate.name))
        del loaded
        gc.collect()
        _log.info("%s: measured in %.0f s", candidate.name, results[-1].seconds)
    return make_report(results, config)


def make_report(results: Sequence[Evaluation], config: EvalConfig) -> EvaluationReport:
    """Put evaluations side by side, each compared with the first, on the machine they were measured on."""
    comparisons: list[Comparison] = []
    for other in results[1:]:
        comparisons += compare.compare(results[0], other)
    return EvaluationReport(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        ard_serve_version=ard_serve.__version__,
        machine=_machine(),
        config=config.model_dump(mode="json"),
        models=tuple(results),
        comparisons=tuple(comparisons),
    )


def served_length(config: dict[str, Any]) -> int:
    """Tokens that a config.json says the model serves; a linear factor multiplies what it declares, as vLLM reads it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    factor = rope.get("factor", 1.0) if rope.get("rope_type") == "linear" else 1.0
    return int(config["max_position_embeddings"] * factor)


@dataclass(frozen=True)
class _Candidate:
    """A model to measure: weights and tokenizer of an inspected `folder`, with another config.json where one is given."""

    name: str
    folder: Path
    config: dict[str, Any] | None = None

    def load(self, settings: EvalConfig) -> PreTrainedModel:
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return loading.load(self.folder, _DTYPES[settings.dtype], device, self.config)


def _candidates(
    folder: Path, manifest: Manifest | None, base: str | None, stretched: bool, against: Sequence[str]
) -> list[_Candidate]:
    """Native first, since everything is compared with the first."""
    found: list[_Candidate] = []
    if base_folder := _base_folder(folder, manifest, base):
        found.append(_Candidate("native", base_folder))
        if stretched:
            found.append(_Candidate("stretched", base_folder, read_config(folder)))
    found.append(_Candidate("restored" if manifest else folder.name, folder))
    found += [_Candidate(other.name, other) for other in map(loading.resolve, against)]
    names = [candidate.name for candidate in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two models are called '{twice}': rename a folder, reports tell models apart by name")
    return found


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


def _tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EvalConfig) -> Iterator[TaskScore]:
    for path in tasks.find_tasks(config.tasks):
        yield tasks.run_task(model, tokenizer, path, config.limit, config.batch_tokens)
    if config.harness:
        yield from harness.run_harness(model, tokenizer, config.harness, config.limit, config.batch_tokens)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, {platform.machine()}, torch {torch.__version__}"
