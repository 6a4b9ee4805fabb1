"""Checkpoints that survive anything: safetensors and JSON, complete or absent, checked before they are trusted.

Each checkpoint is a folder written beside its place, fsynced, and renamed into it; its state.json carries the sha256 of the
tensors, so that a damaged one is seen and the one before it used instead.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ard_serve.artifact import sha256_of
from ard_serve.errors import ResourceError

_KEEP = 2
# Adapters, the best adapters and two moments of each, in fp32.
_BYTES_PER_TRAINED = 16
_TENSORS = "tensors.safetensors"
_STATE = "state.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """Where a run stands: `step` optimizer steps are done; the validation loss before the first and of the best weights.

    `layer_weights`: of each layer in the relation objectives, where they are not all alike.
    """

    step: int
    tokens: int
    first_loss: float
    best_step: int
    best_loss: float
    fingerprint: dict[str, Any]
    layer_weights: list[float] = field(default_factory=list)


def room_bytes(folder: Path, trained: int) -> int:
    """What checkpoints of so many trained weights will yet take in `folder`: those that are kept, and one in the making."""
    return max(1, _KEEP + 1 - len(_newest_first(folder))) * _BYTES_PER_TRAINED * trained


def save(
    folder: Path,
    state: RunState,
    parameters: dict[str, nn.Parameter],
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> Path:
    """Write the checkpoint of `state.step`, the best weights so far included, and drop all but the newest ones.

    Raises:
        ResourceError: the disk is full or fails; earlier checkpoints stay as they are.
    """
    target = folder / f"step-{state.step:06d}"
    beside = folder / f".step-{state.step:06d}.tmp"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file(_flatten(parameters, best, optimizer), beside / _TENSORS)
        record = asdict(state) | {"sha256": sha256_of(beside / _TENSORS)}
        (beside / _STATE).write_text(json.dumps(record), encoding="utf-8")
        for path in (beside / _TENSORS, beside / _STATE, beside):
            _fsync(path)
        if target.exists():
            shutil.rmtree(target)
        beside.rename(target)
        _fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        kept = _newest_first(folder)
        last = f"; the last good one is {kept[0]}" if kept else ""
        raise ResourceError(
            f"{target}: cannot write the checkpoint ({error}){last}; free some space and add --resume"
        ) from None
    for old in _newest_first(folder)[_KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_newest(folder: Path) -> tuple[RunState, dict[str, Tensor]] | None:
    """State and tensors of the newest checkpoint that is whole, or None; a damaged one is named in the log and passed over."""
    for path in _newest_first(folder):
        try:
            record = json.loads((path / _STATE).read_text(encoding="utf-8"))
            if sha256_of(path / _TENSORS) != record.pop("sha256"):
                raise ValueError("sha256 mismatch")
            return RunState(**record), load_file(path / _TENSORS)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            _log.warning("%s: damaged checkpoint (%s), trying the one before it", path, error)
    return None


def restore_optimizer(
    tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Give an optimizer over `parameters` the moments that `save` wrote."""
    for name, parameter in parameters.items():
        prefix = f"optimizer.{name}."
        moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if moments:
            # The count of steps too: a fused AdamW on a GPU takes none from the CPU.
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}


def group(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """One group of a checkpoint's tensors, `adapter` or `best`, by parameter name."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _flatten(
    parameters: dict[str, nn.Parameter], best: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    tensors = {f"adapter.{name}": parameter.detach().contiguous() for name, parameter in parameters.items()}
    tensors |= {f"best.{name}": value.contiguous() for name, value in best.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value.contiguous()
    return tensors


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
