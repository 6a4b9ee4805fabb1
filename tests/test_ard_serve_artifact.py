"""The manifest holds a folder to what was exported, and the weight reader needs no torch to see damage."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ard_serve import artifact, weights
from ard_serve.artifact import BaseModelRecord, Manifest, Quality, RecipeRecord, RopeRecord, Scores
from ard_serve.errors import ModelError


@pytest.fixture
def export(tmp_path: Path) -> Path:
    save_file({"a": torch.randn(4, 8), "b": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    manifest = Manifest(
        created_at="2026-01-01T00:00:00Z",
        ard_serve_version="0",
        base=BaseModelRecord(name="m", architecture="llama", weights_sha256="0", native_window=8),
        rope=RopeRecord(rope_type="yarn", factor=4.0, target_length=32, parameters={}),
        recipe=RecipeRecord(name="default", objectives={"lm": 1.0}, trainable="lora", steps=1, tokens=2, seed=3),
        quality=Quality(restored=Scores(perplexity={1024: 12.5})),
        files=artifact.describe_files(tmp_path),
        tensors=artifact.describe_tensors(tmp_path),
    )
    artifact.write_manifest(tmp_path, manifest)
    return tmp_path


def read(folder: Path) -> Manifest:
    manifest = artifact.read_manifest(folder)
    assert manifest is not None
    return manifest


def test_a_manifest_survives_writing_and_reading(export: Path) -> None:
    manifest = read(export)
    assert manifest.quality.restored is not None
    assert manifest.quality.restored.perplexity == {1024: 12.5}
    assert manifest.tensors["a"].shape == (4, 8)
    assert {record.path for record in manifest.files} == {"config.json", "model.safetensors"}
    artifact.verify(export, manifest)


@pytest.mark.fault("R3")
def test_a_flipped_bit_is_found(export: Path) -> None:
    path = export / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors: sha256 mismatch"):
        artifact.verify(export, read(export))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
        (lambda folder: (folder / "extra.bin").write_bytes(b"x"), "extra.bin: not listed"),
        (lambda folder: (folder / "config.json").write_text("{} "), "config.json: 3 bytes, the manifest says 2"),
    ],
)
def test_a_file_missing_added_or_resized_is_named(export: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(export)
    with pytest.raises(ModelError) as refusal:
        artifact.verify(export, read(export))
    assert says in str(refusal.value)


def test_tensors_are_held_to_the_manifest(export: Path) -> None:
    manifest = read(export)
    changed = manifest.model_copy(update={"tensors": {**manifest.tensors, "c": manifest.tensors["a"]}})
    with pytest.raises(ModelError, match=r"tensors differ from ard-manifest\.json: c"):
        artifact.verify(export, changed)


def test_an_unreadable_manifest_is_refused_and_an_absent_one_is_none(export: Path) -> None:
    (export / artifact.MANIFEST_NAME).write_text('{"schema_version": 99}')
    with pytest.raises(ModelError, match="not a manifest"):
        artifact.read_manifest(export)
    (export / artifact.MANIFEST_NAME).unlink()
    assert artifact.read_manifest(export) is None


@pytest.mark.fault("R2")
def test_truncation_anywhere_is_found(tmp_path: Path) -> None:
    save_file({"a": torch.randn(64)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for kept in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:kept])
        with pytest.raises(ModelError, match=r"model\.safetensors: .*(truncated|damaged)"):
            weights.read_headers(tmp_path)


def test_damaged_headers_are_refused_not_crashed_on(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for header in (
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32"}}',
        b"\xff\xfe",
        b'{"a": {"dtype": "F32", "shape": 3, "data_offsets": []}}',
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ModelError, match="truncated or damaged"):
            weights.read_headers(tmp_path)


def test_headers_agree_with_safetensors(tmp_path: Path) -> None:
    save_file(
        {"a": torch.arange(12.0).reshape(3, 4), "s": torch.tensor(2.0), "e": torch.empty(0, 5)}, tmp_path / "x.safetensors"
    )
    headers = weights.read_headers(tmp_path)
    assert {name: header.shape for name, header in headers.items()} == {"a": (3, 4), "s": (), "e": (0, 5)}
    raw = (tmp_path / "x.safetensors").read_bytes()[headers["a"].start : headers["a"].end]
    assert np.frombuffer(raw, "<f4").tolist() == load_file(tmp_path / "x.safetensors")["a"].flatten().tolist()


@pytest.mark.fault("R5")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_found_and_extremes_are_not(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    extremes = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny, 0.0], dtype=dtype)
    save_file({"fine": extremes, "ids": torch.tensor([-1, 2**62])}, tmp_path / "model.safetensors")
    assert weights.first_non_finite(weights.read_headers(tmp_path)) is None
    broken = torch.zeros(1000, dtype=dtype)
    broken[777] = bad
    save_file({"fine": extremes, "broken": broken}, tmp_path / "model.safetensors")
    assert weights.first_non_finite(weights.read_headers(tmp_path)) == "broken"


def test_shards_follow_the_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "stray.safetensors")
    with pytest.raises(ModelError, match="'a' is also in one"):
        weights.read_headers(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert set(weights.read_headers(tmp_path)) == {"a"}
    index.write_text(json.dumps({"weight_map": {"a": "two.safetensors"}}))
    with pytest.raises(ModelError, match=r"two\.safetensors: shard missing"):
        weights.read_headers(tmp_path)
    index.write_text("{")
    with pytest.raises(ModelError, match="not a readable safetensors index"):
        weights.read_headers(tmp_path)


def test_none_of_it_imports_torch() -> None:
    code = "import sys, ard_serve.artifact, ard_serve.console, ard_serve.settings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
