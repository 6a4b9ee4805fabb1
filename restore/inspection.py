"""What a checkpoint must be before anything of it is loaded: safetensors only, whole, finite, and of a supported architecture.

Nothing here unpickles a file or imports code from the model's folder. Cheap checks come first, reading every weight last;
transformers is imported only to know which tensors an architecture has.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ard_serve import artifact, weights
from ard_serve.errors import ModelError, UsageError
from ard_serve.weights import TensorHeader
from restore.rope import check_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}
# Buffers that older exporters saved; transformers and vLLM compute them and skip what is in the file.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|self_attn\.(bias|masked_bias))$")
_SHOWN_NAMES = 3


@dataclass(frozen=True)
class Checkpoint:
    """A folder that passed every check: its config.json and its weights by name."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]

    @property
    def dtype(self) -> str:
        """Safetensors' name of the dtype that most parameters have, such as BF16."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.end - tensor.start
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def size_bytes(self) -> int:
        """Bytes of all weights as they lie on disk."""
        return sum(tensor.end - tensor.start for tensor in self.tensors.values())


def inspect(folder: Path) -> Checkpoint:
    """Check a base checkpoint without running anything it brings.

    Raises:
        UsageError: the path is missing or holds no model.
        ModelError: pickled weights only, remote code, an unsupported architecture, a truncated or changed file, tensors
            missing, unexpected or of another shape, or a weight that is not finite.
    """
    config = read_config(folder)
    _refuse_remote_code(folder, config)
    _require_safetensors(folder)
    check_architecture(config)
    if config.get("quantization_config") is not None:
        raise ModelError(f"{folder}: quantised weights cannot be trained; give the unquantised checkpoint")
    tensors = {name: header for name, header in weights.read_headers(folder).items() if not _COMPUTED.search(name)}
    if manifest := artifact.read_manifest(folder):
        artifact.verify(folder, manifest)
    _compare_with_architecture(folder, config, tensors)
    if name := weights.first_non_finite(tensors):
        raise ModelError(f"{tensors[name].file}: tensor '{name}' holds NaN or infinite values; copy the checkpoint again")
    return Checkpoint(folder, config, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a model folder.

    Raises:
        UsageError: there is no such folder, or no config.json in it.
        ModelError: config.json, or RoPE in it, is not a JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give a Hugging Face model folder or the name of one on the hub")
    if not path.is_file():
        raise UsageError(f"{folder}: not a Hugging Face model folder, it has no config.json")
    config = read_json(path)
    if "model_type" not in config:
        raise UsageError(f"{folder}: not a Hugging Face model folder, its config.json names no model_type")
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(found := config.get(name) or {}, dict):
            raise ModelError(f"{path}: {name} = {found!r} must be a JSON object or null; copy the checkpoint again")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise ModelError with the path."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); copy the checkpoint again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, found {type(value).__name__}")
    return value


def transformers_config(config: dict[str, Any]) -> "PreTrainedConfig":
    """The transformers config of a config.json.

    Raises:
        ModelError: transformers refuses a field.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    fields = {key: value for key, value in config.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(config["model_type"], **fields)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"config.json: {' '.join(str(error).split())}") from None


def build_empty(config: dict[str, Any]) -> "PreTrainedModel":
    """The model of a config.json with shapes but no memory behind them (meta tensors).

    Raises:
        ModelError: transformers refuses a field or cannot build the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedModel

    built = transformers_config(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except (AssertionError, ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(f"config.json: transformers cannot build this model ({' '.join(str(error).split())})") from None
    assert isinstance(model, PreTrainedModel)
    return model


def _refuse_remote_code(folder: Path, config: dict[str, Any]) -> None:
    for path in sorted(folder.rglob("*.py")):
        raise ModelError(f"{path}: the model brings its own code, which is never run; use a model that transformers knows")
    tokenizer = folder / "tokenizer_config.json"
    for source, values in ((folder / "config.json", config), (tokenizer, read_json(tokenizer) if tokenizer.exists() else {})):
        if "auto_map" in values:
            raise ModelError(
                f"{source}: 'auto_map' asks for remote code, which is never run; use a model that transformers knows"
            )


def _require_safetensors(folder: Path) -> None:
    if (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists():
        return
    pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(f"{pickles[0]}: pickled weights can run code and are never loaded; convert them to safetensors")
    raise UsageError(f"{folder}: not a model with weights, it has neither {SINGLE_FILE} nor {INDEX_FILE}")


def _compare_with_architecture(folder: Path, config: dict[str, Any], tensors: dict[str, TensorHeader]) -> None:
    expected, tied = _expected_shapes(config)
    missing = sorted(expected.keys() - tensors.keys() - tied)
    unexpected = sorted(tensors.keys() - expected.keys())
    misshaped = sorted(name for name in expected.keys() & tensors.keys() if tensors[name].shape != expected[name])
    if missing:
        raise ModelError(f"{folder}: tensors missing: {_some(missing)}; copy the checkpoint again")
    if unexpected:
        raise ModelError(f"{folder}: unexpected tensors: {_some(unexpected)}; is config.json that of these weights?")
    if misshaped:
        shown = [f"{name} {list(tensors[name].shape)} instead of {list(expected[name])}" for name in misshaped]
        raise ModelError(f"{folder}: tensors of another shape: {_some(shown)}; is config.json that of these weights?")
    if odd := sorted(f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in _FLOAT_DTYPES):
        raise ModelError(f"{folder}: weights that are not floating point: {_some(odd)}; give the unquantised checkpoint")


def _expected_shapes(config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes by name of the architecture's parameters, and the names that tied weights may leave out."""
    model = build_empty(config)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, tied


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "")
