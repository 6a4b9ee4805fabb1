"""Write base weights plus deltas as safetensors, one tensor in memory at a time.

The safetensors library can only write a file whose tensors are all in memory, which for a 7B model in a single shard is
another copy of the model. The format is a header and the tensors' bytes (see `ard_serve.weights`), so it is written here.
"""

import json
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ard_serve.errors import ModelError, NumericsError
from restore.inspection import INDEX_FILE, Checkpoint

# From a weight's name, such as `model.layers.0.self_attn.q_proj.weight`, to what is added to it ([out, in] fp32), or None.
Delta = Callable[[str], Tensor | None]

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def write_merged(base: Checkpoint, folder: Path, delta: Delta, dtype: torch.dtype | None = None) -> None:
    """Write `base + delta` into `folder` in the base's shards; `dtype` None keeps each tensor's own.

    Raises:
        NumericsError: a merged weight is not finite in its dtype.
    """
    placed: dict[str, str] = {}
    total_bytes = 0
    by_shard = _by_shard(base)
    with ExitStack() as stack:
        for file, names in by_shard.items():
            source = stack.enter_context(safe_open(file, "pt"))
            header, body_bytes = _header(base, names, dtype)
            with (folder / file.name).open("wb") as shard:
                shard.write(header)
                for name in names:
                    shard.write(_raw(merged(name, source.get_tensor(name), delta, dtype)))
            placed |= dict.fromkeys(names, file.name)
            total_bytes += body_bytes
    if (base.folder / INDEX_FILE).exists():
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def verify_merged(base: Checkpoint, folder: Path, delta: Delta, dtype: torch.dtype | None = None) -> None:
    """Read the written weights back and hold each to base + delta, bit for bit.

    Raises:
        ModelError: names the weight that is furthest off, and by how much.
    """
    worst, worst_name = 0.0, ""
    for file, names in _by_shard(base).items():
        with safe_open(file, "pt") as source, safe_open(folder / file.name, "pt") as written:
            for name in names:
                expected = merged(name, source.get_tensor(name), delta, dtype)
                found = written.get_tensor(name)
                if not torch.equal(found, expected):
                    error = float((found.float() - expected.float()).abs().nan_to_num(torch.inf).max())
                    worst, worst_name = max((worst, worst_name), (error, name))
    if worst_name:
        raise ModelError(f"{folder}: '{worst_name}' differs from base + adapter by up to {worst:.3g}, must be 0; export again")


def merged(name: str, weight: Tensor, delta: Delta, dtype: torch.dtype | None) -> Tensor:
    """One weight of the merged model: the sum in fp32, rounded once."""
    change = delta(name)
    target = dtype or weight.dtype
    if change is None:
        return weight.to(target)
    assert change.shape == weight.shape, "a delta has the shape of its weight"
    result = (weight.float() + change.to("cpu", torch.float32)).to(target)
    if not bool(torch.isfinite(result).all()):
        raise NumericsError(f"merged weight '{name}' is not finite in {target}; use the best checkpoint or a wider dtype")
    return result


def merged_bytes(base: Checkpoint, dtype: torch.dtype | None) -> int:
    """Size of the merged weights on disk."""
    return sum(_header(base, names, dtype)[1] for names in _by_shard(base).values())


def _by_shard(base: Checkpoint) -> dict[Path, list[str]]:
    shards: dict[Path, list[str]] = {}
    for name, _ in sorted(base.tensors.items(), key=lambda item: (item[1].file, item[1].start)):
        shards.setdefault(base.tensors[name].file, []).append(name)
    return shards


def _header(base: Checkpoint, names: list[str], dtype: torch.dtype | None) -> tuple[bytes, int]:
    """The shard's length prefix and header, and the size of its body in bytes."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        tensor = base.tensors[name]
        kept = dtype or TORCH_DTYPES[tensor.dtype]
        end = at + kept.itemsize * torch.Size(tensor.shape).numel()
        described[name] = {"dtype": SAFETENSORS_DTYPES[kept], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(described, separators=(",", ":")).encode()
    # Readers map the body in place, so it starts at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, at


def _raw(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
