"""What an export must prove before it is published: the student's logits, and one rotary table in both engines.

Shapes: B batch, T tokens, V vocabulary, P positions, D head channels.
"""

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ard_serve.errors import ModelError
from restore.inspection import build_empty, read_config, transformers_config
from restore.loading import load
from restore.rope import head_dim
from restore.rotary_tables import UNUSABLE, sampled_positions

# Greatest RMS difference of logits relative to their spread: what the student's arithmetic in its dtype adds as noise, and
# what rounding the merged weights once more to the written dtype adds. On SmolLM2-135M bf16 measured 0.020 and 0.004.
_ARITHMETIC_BOUND = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.06}
_ROUNDING_BOUND = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.03}
_ROTARY_BOUND = 1e-5
_VLLM_TIMEOUT_S = 600
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """Logits of the unmerged student on sample tokens, with the dtype its weights had in memory."""

    ids_BT: Tensor
    logits_BTV: Tensor
    dtype: torch.dtype


@torch.no_grad()
def verify_logits(folder: Path, reference: Reference, device: torch.device | str = "cpu") -> float:
    """Load the export with transformers and hold its logits to the student's; returns the relative RMS difference.

    Logits are compared after their mean over the vocabulary is taken away, which the softmax does not see either.

    Raises:
        ModelError: they differ by more than rounding the merged weights explains.
    """
    model = load(folder, reference.dtype, device)
    logits = model(reference.ids_BT.to(model.device)).logits
    expected = _centred(reference.logits_BTV.to(logits.device))
    difference = _centred(logits) - expected
    ratio = float(difference.square().mean().sqrt() / expected.square().mean().sqrt())
    bound = _ARITHMETIC_BOUND[reference.dtype] + _ROUNDING_BOUND[_written_dtype(folder)]
    _log.info("logits of the reloaded export: relative RMS difference %.2g, bound %g", ratio, bound)
    # Written so that NaN fails.
    if not ratio <= bound:
        raise ModelError(
            f"{folder}: the reloaded export's logits differ from the student's by {ratio:.3g} (relative RMS; largest "
            f"{float(difference.abs().max()):.3g}), at most {bound:g} is allowed; nothing was published"
        )
    return ratio


def verify_rotary(folder: Path, target_length: int, compare_vllm: bool = True) -> None:
    """Hold the rotary table that config.json gives transformers, and where it is installed vLLM, to one another.

    Raises:
        ModelError: the tables differ, or vLLM would serve another length.
    """
    if not compare_vllm:
        return
    if importlib.util.find_spec("vllm") is None:
        _log.info("vLLM is not installed here: its rotary table is not compared")
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tables.npz"
        ended = _run_rotary_tables(path, target_length, folder)
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        if ended.returncode == UNUSABLE:
            _log.warning("vLLM cannot be imported here (%s): its rotary table is not compared", last)
            return
        if ended.returncode != 0:
            raise ModelError(f"{folder}: vLLM cannot build the model's rotary table ({last})")
        tables = np.load(path)
        table_PD, served = tables["0.table"], int(tables["0.served"])
    compare_tables(folder, transformers_table(folder, target_length), table_PD, served, target_length)


def _run_rotary_tables(path: Path, target_length: int, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "restore.rotary_tables", str(path), str(target_length), str(folder)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_VLLM_TIMEOUT_S, check=False, env=offline)
    except subprocess.TimeoutExpired:
        raise ModelError(f"{folder}: vLLM did not build the model's rotary table within {_VLLM_TIMEOUT_S} s") from None


def compare_tables(folder: Path, transformers_PD: np.ndarray, vllm_PD: np.ndarray, served: int, target_length: int) -> None:
    """Hold vLLM's sampled rotary table and served length to transformers' table and the target; raises ModelError."""
    if served != target_length:
        raise ModelError(f"{folder}: vLLM would serve {served} tokens instead of {target_length}; run `ard doctor`")
    if vllm_PD.shape != transformers_PD.shape:
        raise ModelError(f"{folder}: vLLM's rotary table {vllm_PD.shape} is shorter than transformers' {transformers_PD.shape}")
    error = float(np.abs(vllm_PD - transformers_PD).max())
    _log.info("rotary tables of vLLM and transformers differ by at most %.2g, bound %g", error, _ROTARY_BOUND)
    if not error <= _ROTARY_BOUND:
        raise ModelError(f"{folder}: rotary tables of vLLM and transformers differ by up to {error:.3g}; run `ard doctor`")


def transformers_table(folder: Path, target_length: int) -> np.ndarray:
    """Cosines then sines as transformers computes them at the sampled positions: [P, D] fp32.

    Some RoPE types change with the length of the call, so positions inside the original window come from a short call.
    """
    config = read_config(folder)
    built = transformers_config(config)
    rotary = type(build_empty(config).model.rotary_emb)(built)
    original = built.rope_parameters.get("original_max_position_embeddings", built.max_position_embeddings)
    positions = sampled_positions(target_length)
    calls = [[p for p in positions if p < original], [p for p in positions if p >= original]]
    half = head_dim(config) // 2
    parts = []
    for call in filter(None, calls):
        cos_1PD, sin_1PD = rotary(torch.zeros(1, dtype=torch.float32), torch.tensor([call]))
        parts.append(torch.cat((cos_1PD[0, :, :half], sin_1PD[0, :, :half]), dim=-1))
    table: np.ndarray = torch.cat(parts).numpy()
    return table


def _written_dtype(folder: Path) -> torch.dtype:
    dtype = getattr(torch, read_config(folder)["dtype"])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _centred(logits_BTV: Tensor) -> Tensor:
    logits = logits_BTV.float()
    return logits - logits.mean(dim=-1, keepdim=True)
