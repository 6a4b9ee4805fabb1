"""`ard doctor` on real folders: what it prints, rewrites, backs up, and leaves alone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from ard_serve import artifact
from ard_serve.artifact import BaseModelRecord, Manifest, RecipeRecord, RopeRecord
from ard_serve.errors import UsageError
from restore import doctor
from restore.rope import plan_rope, served_length, write_rope

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A clean folder, readable by all."""
    copy = Path(shutil.copytree(make_checkpoint("llama3"), tmp_path / "model"))
    for path in copy.iterdir():
        path.chmod(0o644)
    copy.chmod(0o755)
    edit(copy / "config.json", rope_theta=500000.0)
    return copy


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def add_manifest(folder: Path) -> None:
    """Make the folder a yarn export from 128 to 512 tokens."""
    config = json.loads((folder / "config.json").read_text())
    plan = plan_rope(config, 512)
    (folder / "config.json").write_text(json.dumps(plan.target_config(config)))
    edit(folder / "tokenizer_config.json", model_max_length=512)
    rope = RopeRecord(rope_type="yarn", factor=4.0, target_length=512, parameters=plan.parameters)
    artifact.write_manifest(
        folder,
        Manifest(
            created_at="2026-01-01T00:00:00+00:00",
            ard_serve_version="0",
            base=BaseModelRecord(name="tiny", architecture="llama", weights_sha256="0", native_window=128),
            rope=rope,
            recipe=RecipeRecord(name="default", objectives={}, trainable="lora", steps=1, tokens=1, seed=0),
            files=artifact.describe_files(folder),
            tensors=artifact.describe_tensors(folder),
        ),
    )


def test_clean_folder_exits_0_and_says_what_is_served(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(folder, fix=False) == 0
    assert "vLLM serves 128 tokens" in " ".join(capsys.readouterr().out.split())


def test_fix_rewrites_the_config_with_a_backup_and_exits_0(folder: Path) -> None:
    scaling = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 128}
    edit(folder / "config.json", rope_scaling=scaling)
    old = (folder / "config.json").read_bytes()
    assert doctor.run(folder, fix=False) == 3
    assert (folder / "config.json").read_bytes() == old
    assert doctor.run(folder, fix=True) == 0
    assert (folder / "config.json.bak").read_bytes() == old
    config = json.loads((folder / "config.json").read_text())
    assert served_length(config) == 512
    assert AutoConfig.from_pretrained(folder).rope_parameters["original_max_position_embeddings"] == 128
    # A second repair does not overwrite the first backup.
    edit(folder / "config.json", rope_theta=1e6)
    doctor.run(folder, fix=True)
    assert (folder / "config.json.bak").read_bytes() == old
    assert (folder / "config.json.1.bak").exists()


def test_target_length_settles_what_the_config_cannot(folder: Path) -> None:
    edit(folder / "config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0}, max_position_embeddings=512)
    assert doctor.run(folder, fix=True) == 3
    assert not (folder / "config.json.bak").exists()
    assert doctor.run(folder, fix=True, target_length=512) == 0


def test_tokenizer_limit_below_what_is_served_is_raised(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", model_max_length=64)
    assert [finding.where for finding in doctor.examine_folder(folder).findings] == ["tokenizer_config.json"]
    assert doctor.run(folder, fix=True) == 0
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 128


def test_private_files_are_opened(folder: Path) -> None:
    (folder / "model.safetensors").chmod(0o600)
    assert doctor.run(folder, fix=False) == 3
    assert doctor.run(folder, fix=True) == 0
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("damage", ["truncated", "no weights", "flipped", "manifest"])
def test_damaged_files_are_found_and_not_repaired(folder: Path, damage: str) -> None:
    add_manifest(folder)
    assert doctor.run(folder, fix=False) == 0
    shard = folder / "model.safetensors"
    if damage == "truncated":
        os.truncate(shard, 1000)
    elif damage == "no weights":
        shard.unlink()
    elif damage == "flipped":
        body = bytearray(shard.read_bytes())
        body[-9] ^= 1
        shard.write_bytes(body)
    else:
        (folder / artifact.MANIFEST_NAME).write_text("{}")
    assert doctor.run(folder, fix=True) == 3


@pytest.mark.parametrize("fields", [{"rope_theta": 1e4}, {"rope_scaling": None}, {"max_position_embeddings": 128}])
def test_manifest_knows_the_right_rope(folder: Path, fields: dict[str, Any]) -> None:
    add_manifest(folder)
    sound = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", **fields)
    assert doctor.run(folder, fix=False) == 3
    assert doctor.run(folder, fix=True) == 0
    assert json.loads((folder / "config.json").read_text()) == sound
    manifest = artifact.read_manifest(folder)
    assert manifest is not None
    artifact.verify(folder, manifest)


def test_consistent_but_other_rope_is_found_by_the_manifest(folder: Path) -> None:
    add_manifest(folder)
    config = json.loads((folder / "config.json").read_text())
    other = write_rope(config, {"rope_type": "default", "rope_theta": 2e6}, 512)
    (folder / "config.json").write_text(json.dumps(other))
    assert doctor.run(folder, fix=True) == 0
    assert json.loads((folder / "config.json").read_text()) == config


def test_no_model_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        doctor.run(tmp_path / "nowhere", fix=False)


def test_doctor_needs_no_torch(folder: Path) -> None:
    code = "import sys; from pathlib import Path; from restore import doctor\n"
    code += "doctor.run(Path(sys.argv[1]), True); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True)
