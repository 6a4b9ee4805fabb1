"""Publish a restored model as a folder that transformers and vLLM open as it is, checked before anyone can see it."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import ard_serve
from ard_serve import artifact
from ard_serve.artifact import BaseModelRecord, DataRecord, Manifest, Quality, RecipeRecord, RopeRecord
from ard_serve.errors import ResourceError
from restore.inspection import Checkpoint, read_json
from restore.merge import TORCH_DTYPES, Delta, merged_bytes, verify_merged, write_merged
from restore.publish import publication
from restore.rope import RopePlan
from restore.verification import Reference, verify_logits, verify_rotary

__all__ = ["Assessment", "Delta", "Provenance", "Reference", "check_room", "export"]

# What a model needs besides its weights, as it lies in the base folder; licences travel with what they license.
_CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_TOKENIZER_CONFIG = "tokenizer_config.json"
_MARGIN_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 22
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Provenance:
    """What the manifest tells about the restoration; `base_name` is the model as the user named it."""

    base_name: str
    recipe: RecipeRecord
    data: DataRecord | None = None


@dataclass(frozen=True)
class Assessment:
    """What was measured on the finished weights, and the documents that tell of it.

    `model_card` becomes README.md; `reports` are copied in by their names; `forced` says that the quality gate failed.
    """

    model_card: str
    quality: Quality = field(default_factory=Quality)
    reports: Sequence[Path] = ()
    forced: bool = False


def export(
    base: Checkpoint,
    plan: RopePlan,
    delta: Delta,
    out: Path,
    provenance: Provenance,
    *,
    reference: Reference,
    assess: Callable[[Path], Assessment],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    compare_vllm: bool = True,
) -> Manifest:
    """Merge, write, verify and publish; `out` is replaced in one step if it is an earlier export.

    Args:
        base: the checkpoint that was restored, as `inspect` returned it.
        plan: its config is written for `plan.target_length` tokens.
        delta: what is added to each weight.
        out: folder to publish.
        provenance: for the manifest.
        reference: logits of the unmerged student, which the export must give too once it is loaded again.
        assess: measures the verified folder before anyone can see it; what it raises keeps the export from being published.
        dtype: of the written weights; the base's own when None.
        device: where the export is loaded to be verified.
        compare_vllm: whether to compare rotary tables with vLLM's where it is installed.

    Raises:
        UsageError: `out` holds something else.
        ModelError: the written weights, their logits or the rotary tables are not what they must be.
        ResourceError: too little space, or the disk fails. In every case `out` is as it was.
    """
    check_room(base, out, dtype)
    with publication(out, artifact.MANIFEST_NAME) as folder:
        write_merged(base, folder, delta, dtype)
        _write_companions(base, plan, folder, dtype)
        verify_merged(base, folder, delta, dtype)
        verify_logits(folder, reference, device)
        verify_rotary(folder, plan.target_length, compare_vllm)
        assessment = assess(folder)
        (folder / "README.md").write_text(assessment.model_card, encoding="utf-8")
        for report in assessment.reports:
            shutil.copyfile(report, folder / report.name)
        manifest = _describe(base, plan, folder, provenance, assessment)
        artifact.write_manifest(folder, manifest)
    _log.info("%s: exported, %d tokens, %s RoPE", out, plan.target_length, plan.rope_type)
    return manifest


def check_room(base: Checkpoint, out: Path, dtype: torch.dtype | None = None, checkpoint_bytes: int = 0) -> None:
    """Make sure that an export fits at `out` and may be written there; cheap enough to ask before training starts.

    Args:
        base: what is exported.
        out: the folder of the export.
        dtype: of its weights; the base's own when None.
        checkpoint_bytes: what else will be written to the same disk by then.

    Raises:
        ResourceError: it does not, with both sizes.
    """
    parent = next(path for path in out.expanduser().resolve().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ResourceError(f"{out}: {parent} cannot be written; choose another output folder")
    needed_bytes = merged_bytes(base, dtype) + _MARGIN_BYTES
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes + checkpoint_bytes:
        beside = f" and the checkpoints {checkpoint_bytes / 1e9:.1f} GB" if checkpoint_bytes else ""
        raise ResourceError(
            f"{out}: the export needs {needed_bytes / 1e9:.1f} GB{beside}, {parent} has {free_bytes / 1e9:.1f} GB free; "
            "free some space or choose another output folder"
        )


def _write_companions(base: Checkpoint, plan: RopePlan, folder: Path, dtype: torch.dtype | None) -> None:
    for path in sorted({path for pattern in _CARRIED for path in base.folder.glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    if (folder / _TOKENIZER_CONFIG).exists():
        # vLLM ignores it, transformers warns or truncates by it.
        _write_json(
            folder / _TOKENIZER_CONFIG, read_json(folder / _TOKENIZER_CONFIG) | {"model_max_length": plan.target_length}
        )
    config = plan.target_config(base.config)
    stored = str(dtype or TORCH_DTYPES[base.dtype]).removeprefix("torch.")
    # transformers 4 reads only `torch_dtype`, and takes fp32 where it is missing.
    _write_json(folder / "config.json", config | {"dtype": stored, "torch_dtype": stored})


def _describe(base: Checkpoint, plan: RopePlan, folder: Path, provenance: Provenance, assessment: Assessment) -> Manifest:
    return Manifest(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        ard_serve_version=ard_serve.__version__,
        base=BaseModelRecord(
            name=provenance.base_name,
            architecture=base.config["model_type"],
            weights_sha256=_weights_sha256(base),
            native_window=plan.native_window,
        ),
        rope=RopeRecord(
            rope_type=plan.rope_type,
            factor=plan.factor,
            target_length=plan.target_length,
            parameters=plan.parameters,
        ),
        recipe=provenance.recipe,
        data=provenance.data,
        quality=assessment.quality,
        forced=assessment.forced,
        files=artifact.describe_files(folder),
        tensors=artifact.describe_tensors(folder),
    )


def _weights_sha256(base: Checkpoint) -> str:
    digest = sha256()
    for file in sorted({tensor.file for tensor in base.tensors.values()}):
        with file.open("rb") as shard:
            while chunk := shard.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
