"""What `inspect` refuses before anything of a checkpoint is loaded: rows R1 to R9 of the fault matrix, injected for real."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ard_serve import artifact
from ard_serve.artifact import BaseModelRecord, Manifest, RecipeRecord, RopeRecord
from ard_serve.errors import ModelError, UsageError
from restore.inspection import inspect

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A whole checkpoint of one file that a test may damage."""
    return Path(shutil.copytree(make_checkpoint("llama3"), tmp_path / "model"))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_manifest(folder: Path) -> None:
    artifact.write_manifest(
        folder,
        Manifest(
            created_at="2026-01-01T00:00:00+00:00",
            ard_serve_version="0",
            base=BaseModelRecord(name="tiny", architecture="llama", weights_sha256="0", native_window=128),
            rope=RopeRecord(rope_type="yarn", factor=4.0, target_length=512, parameters={}),
            recipe=RecipeRecord(name="default", objectives={}, trainable="lora", steps=1, tokens=1, seed=0),
            files=artifact.describe_files(folder),
            tensors=artifact.describe_tensors(folder),
        ),
    )


def refusal(folder: Path, kind: type[ModelError] | type[UsageError] = ModelError) -> str:
    """The one line that a user sees when `folder` is refused, checked for its exit code."""
    with pytest.raises(kind) as caught:
        inspect(folder)
    assert caught.value.exit_code == (3 if kind is ModelError else 2)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("stored", [True, False])
def test_tied_head_may_be_stored_or_left_out(make_checkpoint: MakeCheckpoint, tmp_path: Path, stored: bool) -> None:
    folder = Path(shutil.copytree(make_checkpoint("llama-tied"), tmp_path / "model"))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("lm_head.weight", None)
        if stored:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(folder, change)
    assert ("lm_head.weight" in inspect(folder).tensors) is stored


def test_computed_buffers_of_older_checkpoints_are_tolerated(checkpoint: Path) -> None:
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_tensors(checkpoint, lambda tensors: tensors.update(buffers))
    assert not buffers.keys() & inspect(checkpoint).tensors.keys()


@pytest.mark.fault("R1")
def test_missing_path_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere", UsageError)


@pytest.mark.fault("R1")
@pytest.mark.parametrize("damage", ["empty", "no weights", "no model_type"])
def test_folder_that_is_no_model_is_named(checkpoint: Path, damage: str) -> None:
    if damage == "empty":
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
    elif damage == "no weights":
        (checkpoint / "model.safetensors").unlink()
    else:
        (checkpoint / "config.json").write_text("{}")
    assert str(checkpoint) in refusal(checkpoint, UsageError)


@pytest.mark.fault("R1")
def test_broken_config_is_named(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": ')
    assert "config.json" in refusal(checkpoint)


@pytest.mark.fault("R2")
@pytest.mark.parametrize("kept", [0, 4, 100, 20_000, -1])
def test_truncated_shard_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path, kept: int) -> None:
    folder = Path(shutil.copytree(make_checkpoint("llama3", "60KB"), tmp_path / "model"))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    os.truncate(shard, kept if kept >= 0 else shard.stat().st_size + kept)
    assert shard.name in refusal(folder)


@pytest.mark.fault("R2")
def test_missing_shard_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_checkpoint("llama3", "60KB"), tmp_path / "model"))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(folder)


@pytest.mark.fault("R3")
def test_flipped_bit_is_seen_where_a_manifest_is_present(checkpoint: Path) -> None:
    write_manifest(checkpoint)
    inspect(checkpoint)
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    message = refusal(checkpoint)
    assert "sha256 mismatch" in message
    assert "model.safetensors" in message


@pytest.mark.fault("R4")
def test_tensors_missing_unexpected_or_misshaped_are_named(checkpoint: Path) -> None:
    name, other = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(checkpoint, lambda tensors: tensors.update({"stray.weight": torch.ones(2)}))
    assert "stray.weight" in refusal(checkpoint)
    edit_tensors(checkpoint, lambda tensors: (tensors.pop("stray.weight"), tensors.update({other: torch.ones(3, 5)}))[1])
    assert f"{other} [3, 5] instead of [32, 64]" in refusal(checkpoint)
    edit_tensors(checkpoint, lambda tensors: tensors.__delitem__(name))
    assert name in refusal(checkpoint)


@pytest.mark.fault("R4")
def test_untied_head_may_not_be_missing(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.__delitem__("lm_head.weight"))
    assert "lm_head.weight" in refusal(checkpoint)


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "64"}, {"num_attention_heads": 7}, {"vocab_size": -1}, {"hidden_act": "no such"}]
)
def test_config_that_transformers_cannot_build_is_one_line(checkpoint: Path, fields: dict[str, Any]) -> None:
    edit_config(checkpoint, **fields)
    assert "config.json" in refusal(checkpoint)


def test_quantised_weights_are_refused(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({"lm_head.weight": torch.ones(259, 64, dtype=torch.int8)}))
    assert "lm_head.weight (I8)" in refusal(checkpoint)
    edit_config(checkpoint, quantization_config={"quant_method": "fp8"})
    assert "quantised" in refusal(checkpoint)


@pytest.mark.fault("R5")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_that_is_not_finite_is_named(checkpoint: Path, value: float, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][3, 5] = value

    edit_tensors(checkpoint, change)
    assert name in refusal(checkpoint)


class _Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.fault("R6")
def test_pickled_weights_are_never_opened(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(_Exploit(tmp_path / "executed")))
    assert "pytorch_model.bin" in refusal(checkpoint)
    assert not (tmp_path / "executed").exists()


@pytest.mark.fault("R7")
@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json", "file"])
def test_remote_code_is_refused_without_a_question(
    checkpoint: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "executed"
    code = checkpoint / "modeling_own.py"
    code.write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    if where != "file":
        path = checkpoint / where
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}))
        code.rename(tmp_path / code.name)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    assert (where if where != "file" else "modeling_own.py") in refusal(checkpoint)
    assert not marker.exists()


@pytest.mark.fault("R9")
@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "qwen2_moe", "nothing"])
def test_other_architectures_get_the_supported_list(checkpoint: Path, model_type: str) -> None:
    edit_config(checkpoint, model_type=model_type)
    assert "supported: llama, mistral, qwen2, qwen3" in refusal(checkpoint)
