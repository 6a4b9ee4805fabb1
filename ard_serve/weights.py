"""Safetensors checkpoints read without torch: headers, sizes and non-finite values.

The format (https://github.com/huggingface/safetensors): eight bytes of little-endian header length, a JSON header that
maps each tensor to dtype, shape and byte offsets, then the tensors' bytes.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ard_serve.errors import ModelError

_MAX_HEADER_BYTES = 100_000_000
_SCAN_ELEMENTS = 1 << 22
# Unsigned view of each float type and the bits that are all ones exactly when the value is infinite or NaN.
_EXPONENT_BITS = {"F64": ("<u8", 0x7FF0 << 48), "F32": ("<u4", 0x7F80 << 16), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies: `start` and `end` are byte offsets in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or all that lie there.

    Raises:
        ModelError: the index cannot be read, or a shard it names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError):
        raise ModelError(f"{index}: not a readable safetensors index; copy the checkpoint again") from None
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name}: shard missing, though {index.name} names it; copy the checkpoint again")
    return [folder / name for name in names]


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of a checkpoint by name.

    Raises:
        ModelError: a shard may not be read, is truncated, its header is damaged, or two shards hold the same tensor.
    """
    tensors: dict[str, TensorHeader] = {}
    for shard in shards(folder):
        for name, header in _read_shard(shard).items():
            if name in tensors:
                raise ModelError(f"{shard}: tensor '{name}' is also in {tensors[name].file.name}; remove the stray shard")
            tensors[name] = header
    return tensors


def _read_shard(shard: Path) -> dict[str, TensorHeader]:
    size_bytes = shard.stat().st_size
    damaged = ModelError(f"{shard}: truncated or damaged ({size_bytes} bytes); copy or export the file again")
    with _opened(shard) as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise damaged
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > min(_MAX_HEADER_BYTES, size_bytes - 8):
            raise damaged
        try:
            raw = json.loads(file.read(header_bytes))
            raw.pop("__metadata__", None)
            body = 8 + header_bytes
            tensors = {
                name: TensorHeader(
                    shard, t["dtype"], tuple(t["shape"]), body + t["data_offsets"][0], body + t["data_offsets"][1]
                )
                for name, t in raw.items()
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise damaged from None
    declared_bytes = max((t.end for t in tensors.values()), default=body)
    if declared_bytes != size_bytes:
        raise ModelError(f"{shard}: {size_bytes} bytes, its header declares {declared_bytes}; the file is truncated")
    return tensors


def _opened(shard: Path) -> BinaryIO:
    """Weights that transformers has saved may be read by their owner alone; a server runs as somebody else."""
    try:
        return shard.open("rb")
    except OSError as error:
        raise ModelError(f"{shard}: {error.strerror} for user {os.geteuid()}; `chmod a+r` it, or run as its owner") from None


def first_non_finite(tensors: dict[str, TensorHeader]) -> str | None:
    """Name of the first floating-point tensor that holds a NaN or an infinity, or None."""
    for name, tensor in tensors.items():
        if tensor.dtype in _EXPONENT_BITS and any(_non_finite(chunk, tensor.dtype) for chunk in _chunks(tensor)):
            return name
    return None


def _chunks(tensor: TensorHeader) -> Iterator[np.ndarray]:
    view, _ = _EXPONENT_BITS[tensor.dtype]
    count = (tensor.end - tensor.start) // np.dtype(view).itemsize
    if count:
        data = np.memmap(tensor.file, dtype=view, mode="r", offset=tensor.start, shape=(count,))
        for at in range(0, count, _SCAN_ELEMENTS):
            yield data[at : at + _SCAN_ELEMENTS]


def _non_finite(chunk: np.ndarray, dtype: str) -> bool:
    mask = np.array(_EXPONENT_BITS[dtype][1], dtype=chunk.dtype)
    return bool(((chunk & mask) == mask).any())
