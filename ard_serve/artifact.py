"""What an export promises: the schema of `ard-manifest.json` and the checks that hold a folder to it.

The one contract between `restore`, which writes the manifest, and `server`, which refuses a folder that breaks it.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ard_serve import weights
from ard_serve.errors import ModelError

MANIFEST_NAME = "ard-manifest.json"
_CHUNK_BYTES = 1 << 22


class _Record(BaseModel):
    # A perplexity may be no number, which JSON cannot say; null would make a manifest that nobody can read back.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class FileRecord(_Record):
    """One file of the export, by its path inside the folder."""

    path: str
    size_bytes: int
    sha256: str


class TensorRecord(_Record):
    """One tensor as its safetensors header declares it; `dtype` is safetensors' name, such as BF16."""

    shape: tuple[int, ...]
    dtype: str


class BaseModelRecord(_Record):
    """The model that was restored: where it came from and what identifies its weights."""

    name: str
    architecture: str
    weights_sha256: str = Field(description="sha256 over the base checkpoint's safetensors files, in name order")
    native_window: int


class RopeRecord(_Record):
    """The positions the export was made for; config.json carries the full RoPE parameters."""

    rope_type: Literal["linear", "yarn", "llama3", "theta", "longrope", "none"]
    factor: float
    target_length: int
    parameters: dict[str, Any]


class RecipeRecord(_Record):
    """How the weights were changed."""

    name: str
    objectives: dict[str, float]
    trainable: str
    steps: int
    tokens: int
    seed: int


class DataRecord(_Record):
    """What was read, without its text."""

    source: str
    documents: int
    tokens: int
    sha256: str


class Scores(_Record):
    """Measured quality of one model. Keys of the mappings are window lengths in tokens."""

    perplexity: dict[int, float] = {}
    needle: dict[int, float] = {}
    tasks: dict[str, float] = {}


class Quality(_Record):
    """The scores of the three models that a reader wants to compare, and the length they support."""

    native: Scores | None = None
    stretched: Scores | None = None
    restored: Scores | None = None
    served_limit: int | None = Field(None, description="longest measured length up to which every limit is met")


class Manifest(_Record):
    """`ard-manifest.json`: everything a server or a reader needs to trust an exported folder."""

    schema_version: Literal[1] = 1
    created_at: str
    ard_serve_version: str
    base: BaseModelRecord
    rope: RopeRecord
    recipe: RecipeRecord
    data: DataRecord | None = None
    quality: Quality = Quality()
    forced: bool = Field(False, description="published although the quality gate failed")
    files: tuple[FileRecord, ...] = ()
    tensors: dict[str, TensorRecord] = {}


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def describe_files(folder: Path) -> tuple[FileRecord, ...]:
    """Record every file below `folder` except the manifest itself and hidden ones, in path order."""
    return tuple(
        FileRecord(path=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in _files(folder)
    )


def describe_tensors(folder: Path) -> dict[str, TensorRecord]:
    """Record the shape and dtype of every tensor in the folder's safetensors shards."""
    tensors = weights.read_headers(folder)
    return {name: TensorRecord(shape=t.shape, dtype=t.dtype) for name, t in sorted(tensors.items())}


def read_manifest(folder: Path) -> Manifest | None:
    """Read the folder's manifest, or None when it has none.

    Raises:
        ModelError: the manifest exists and cannot be read.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ModelError(f"{path}: not a manifest this version reads ({str(error).splitlines()[0]})") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest; the caller owns making the folder durable and visible."""
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def verify(folder: Path, manifest: Manifest) -> None:
    """Hold a folder to its manifest: no file missing, added, resized or changed; no tensor missing, added or reshaped.

    Raises:
        ModelError: names the first file or the tensors that differ.
    """
    recorded = {record.path: record for record in manifest.files}
    present = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    if missing := sorted(recorded.keys() - present.keys()):
        raise ModelError(f"{folder / missing[0]}: missing, though {MANIFEST_NAME} lists it; restore the file or export again")
    if added := sorted(present.keys() - recorded.keys()):
        raise ModelError(f"{folder / added[0]}: not listed in {MANIFEST_NAME}; remove the file or export again")
    for name, record in recorded.items():
        size_bytes = present[name].stat().st_size
        if size_bytes != record.size_bytes:
            raise ModelError(f"{present[name]}: {size_bytes} bytes, the manifest says {record.size_bytes}; the file is damaged")
    for name, record in recorded.items():
        if (digest := sha256_of(present[name])) != record.sha256:
            raise ModelError(f"{present[name]}: sha256 mismatch, {digest[:12]}… against the manifest's {record.sha256[:12]}…")
    found = describe_tensors(folder)
    if different := sorted(
        name for name in found.keys() | manifest.tensors.keys() if found.get(name) != manifest.tensors.get(name)
    ):
        raise ModelError(f"{folder}: tensors differ from {MANIFEST_NAME}: {_some(different)}")


def _files(folder: Path) -> Iterator[Path]:
    """Hidden files are passed over: git and the hub's own tools leave some in every copy, and no engine reads them."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path != folder / MANIFEST_NAME:
            yield path


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
