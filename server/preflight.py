"""What must be true of a model folder before an engine may load it, and what the server will say of it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ard_serve import artifact, weights
from ard_serve.artifact import Manifest
from ard_serve.errors import ModelError, UsageError
from ard_serve.weights import TensorHeader
from server.config import ServeConfig

_DENSE_DECODERS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that passed."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]
    manifest: Manifest | None
    window: int
    measured_limit: int | None


def check_model(config: ServeConfig) -> Checkpoint:
    """Read the model folder and hold its parts against each other; what the weights are is `check_contents`'.

    Raises:
        UsageError: there is no model folder, or the window asked for is longer than was measured.
        ModelError: the folder is damaged, holds code, or is not safetensors; names the file or tensor.
    """
    folder = config.model
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: not a model folder, there is no config.json in it")
    model_config = _read_config(folder / "config.json")
    _refuse_code(folder, model_config)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: no *.safetensors file; pickle checkpoints are not loaded, convert them first")
    tensors = weights.read_headers(folder)
    manifest = artifact.read_manifest(folder)
    _check_tensors(folder, model_config, tensors)
    window, limit = _window(config, model_config, manifest)
    return Checkpoint(folder, model_config, tensors, manifest, window, limit)


def check_contents(checkpoint: Checkpoint) -> None:
    """Read every byte: hashes against the manifest where there is one, and that all weights are finite.

    Raises:
        ModelError: names the file or tensor.
    """
    tensors = checkpoint.tensors
    if checkpoint.manifest:
        artifact.verify(checkpoint.folder, checkpoint.manifest)
    if name := weights.first_non_finite(tensors):
        raise ModelError(f"{tensors[name].file}: tensor '{name}' holds a NaN or an infinity; export the model again")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError(f"{path}: not readable JSON; copy or export the model again") from None
    if not isinstance(fields, dict):
        raise ModelError(f"{path}: not a JSON object; copy or export the model again")
    return fields


def _refuse_code(folder: Path, model_config: dict[str, Any]) -> None:
    files = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    configs = [("config.json", model_config)] + [
        (name, _read_config(folder / name)) for name in files if (folder / name).exists()
    ]
    for name, fields in configs:
        if fields.get("auto_map"):
            raise ModelError(
                f"{folder / name}: 'auto_map' asks to run code from the model folder, which is never done; remove it"
            )
    if code := sorted(folder.rglob("*.py")):
        raise ModelError(f"{code[0]}: Python code in a model folder, which is never run; remove the file")


def _check_tensors(folder: Path, model_config: dict[str, Any], tensors: dict[str, TensorHeader]) -> None:
    expected = expected_shapes(model_config)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ModelError(f"{folder}: tensor '{missing[0]}' is missing ({len(missing)} in all); copy or export the model again")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ModelError(
                f"{tensors[name].file}: tensor '{name}' has shape {tensors[name].shape}, config.json means {shape}"
            )


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes that config.json promises for a dense decoder of the Llama family; empty for any other or a quantised one."""
    if not _DENSE_DECODERS & set(config.get("architectures") or ()) or config.get("quantization_config"):
        return {}
    try:
        hidden, vocab, inner = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
        query = config["num_attention_heads"] * head_dim(config)
        key = kv_heads(config) * head_dim(config)
        layers = range(config["num_hidden_layers"])
    except (KeyError, TypeError):
        raise ModelError("config.json lacks hidden_size, vocab_size, intermediate_size or a head count") from None
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    layer = {
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    return shapes | {f"model.layers.{index}.{name}": shape for index in layers for name, shape in layer.items()}


def head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def kv_heads(config: dict[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _window(config: ServeConfig, model_config: dict[str, Any], manifest: Manifest | None) -> tuple[int, int | None]:
    """The window to serve and the longest one that was measured, in tokens."""
    limit = (manifest.quality.served_limit or manifest.rope.target_length) if manifest else None
    longest = limit or _positions(model_config)
    window = config.max_model_len or longest
    if limit and window > limit and config.beyond_measured == "refuse":
        raise UsageError(
            f"--max-model-len {window}: the export was measured up to {limit} tokens; "
            f"use {limit} or less, or serve beyond it with --beyond-measured mark"
        )
    return window, limit


def _positions(model_config: dict[str, Any]) -> int:
    """Window that config.json promises; the native length times the factor for linear scaling, see docs on RoPE."""
    positions = model_config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 1:
        raise ModelError(f"config.json: max_position_embeddings = {positions!r} must be a positive integer")
    rope = model_config.get("rope_parameters") or model_config.get("rope_scaling") or {}
    if rope.get("rope_type") == "linear":
        return int(positions * rope.get("factor", 1))
    return positions


def model_card(config: ServeConfig, checkpoint: Checkpoint, created: int) -> dict[str, Any]:
    """The entry of /v1/models: OpenAI's fields, the window, and where the weights come from."""
    card: dict[str, Any] = {"id": config.model_name, "object": "model", "created": created, "owned_by": "ard-serve"}
    card |= {"max_model_len": checkpoint.window, "default_max_tokens": config.default_max_tokens}
    if manifest := checkpoint.manifest:
        card["provenance"] = {
            "measured_limit": checkpoint.measured_limit,
            "beyond_measured": checkpoint.window > (checkpoint.measured_limit or 0),
            **manifest.model_dump(mode="json", include={"created_at", "base", "rope", "recipe", "quality", "forced"}),
            "files": {
                record.path: record.sha256 for record in manifest.files if re.search(r"\.(safetensors|json)$", record.path)
            },
        }
    return card
