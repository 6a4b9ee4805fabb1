"""What the KV cache costs, from config.json alone: bytes per token, use by a load, and the load that fits.

Sources: grouped-query attention holds a key and a value per KV head (arXiv:2305.13245); multi-head latent attention one
compressed vector and one rotary key per layer (arXiv:2405.04434); a sliding-window layer holds its window at most and one
of chunked attention its chunk; a linear-attention or state-space layer holds no KV at all.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ard_serve import weights
from ard_serve.errors import ModelError
from loadtests.records import RequestRecord

_DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
_STATE_LAYERS = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "ssm")
_NO_KV_LAYERS = (*_STATE_LAYERS, "mlp", "moe")
_NEMOTRON_LAYERS = {"M": "mamba", "*": "full_attention", "-": "mlp", "E": "moe"}


@dataclass(frozen=True)
class KvLayer:
    """One layer's share: bytes for each token it holds, of which a sliding window keeps at most `window_tokens`."""

    bytes_per_token: int
    window_tokens: int | None = None


@dataclass(frozen=True)
class KvShape:
    """A model's KV cache. `kind` is grouped-query, multi-head, latent or hybrid; state layers are counted, not sized."""

    layers: tuple[KvLayer, ...]
    kind: str
    state_layers: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes for one more token while every window is still open."""
        return sum(layer.bytes_per_token for layer in self.layers)

    def bytes_for(self, tokens: int) -> int:
        """Bytes that a request of `tokens` holds."""
        return sum(layer.bytes_per_token * min(tokens, layer.window_tokens or tokens) for layer in self.layers)


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json, the text part where it has several.

    Raises:
        ModelError: missing or not JSON.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); name a Hugging Face model folder") from None
    except ValueError:
        raise ModelError(f"{path}: not valid JSON; copy the model again") from None
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def kv_shape(config: dict[str, Any], kv_dtype: str = "auto", tensor_parallel: int = 1) -> KvShape:
    """The KV cache of a model on one of `tensor_parallel` devices.

    Raises:
        ModelError: a field that it needs is missing.
    """
    try:
        return _kv_shape(config, _dtype_bytes(config, kv_dtype), tensor_parallel)
    except KeyError as error:
        raise ModelError(f"config.json: no {error.args[0]}; its KV cache cannot be predicted") from None


def _kv_shape(config: dict[str, Any], dtype_bytes: int, tensor_parallel: int) -> KvShape:
    kinds = layer_kinds(config)
    state_layers = sum(kind in _STATE_LAYERS for kind in kinds)
    # The last layers of Gemma 3n read the keys and values of earlier ones.
    holding = kinds[: len(kinds) - int(config.get("num_kv_shared_layers") or 0)]
    holding = [kind for kind in holding if kind not in _NO_KV_LAYERS]
    if config.get("kv_lora_rank"):
        # The latent vector is shared by all heads, so that tensor parallelism copies it.
        layer = KvLayer((config["kv_lora_rank"] + config["qk_rope_head_dim"]) * dtype_bytes)
        return KvShape((layer,) * len(holding), "latent", state_layers)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    bytes_per_token = 2 * max(1, math.ceil(kv_heads / tensor_parallel)) * head_dim * dtype_bytes
    windows = {"sliding_attention": config.get("sliding_window"), "chunked_attention": config.get("attention_chunk_size")}
    layers = tuple(KvLayer(bytes_per_token, windows.get(kind)) for kind in holding)
    kind = "hybrid" if state_layers else "grouped-query" if kv_heads < heads else "multi-head"
    return KvShape(layers, kind, state_layers)


def layer_kinds(config: dict[str, Any]) -> list[str]:
    """What each layer is, by the several ways in which configurations say it; raises KeyError without a layer count."""
    layers = range(config["num_hidden_layers"])
    if listed := config.get("layer_types") or config.get("layers_block_type"):
        return list(listed[: len(layers)])
    if letters := config.get("hybrid_override_pattern"):
        return [_NEMOTRON_LAYERS[letter] for letter in letters]
    if every := config.get("full_attention_interval"):
        return ["linear_attention" if (layer + 1) % every else "full_attention" for layer in layers]
    if every := config.get("attn_layer_period"):
        offset = config.get("attn_layer_offset", 0)
        return ["full_attention" if layer % every == offset else "mamba" for layer in layers]
    if not config.get("sliding_window") or not config.get("use_sliding_window", True):
        return ["full_attention"] * len(layers)
    every = config.get("sliding_window_pattern") or (2 if config.get("model_type") == "gemma2" else 0)
    return ["full_attention" if every and (layer + 1) % every == 0 else "sliding_attention" for layer in layers]


def _dtype_bytes(config: dict[str, Any], kv_dtype: str) -> int:
    scheme = (config.get("quantization_config") or {}).get("kv_cache_scheme")
    if kv_dtype == "auto" and scheme:
        return math.ceil(int(scheme["num_bits"]) / 8)
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16") if kv_dtype == "auto" else kv_dtype
    if (name := name.removeprefix("torch.")) not in _DTYPE_BYTES:
        raise ModelError(f"KV dtype '{name}': unknown; one of auto, {', '.join(_DTYPE_BYTES)}")
    return _DTYPE_BYTES[name]


def weight_bytes(folder: Path) -> int:
    """Bytes of the checkpoint's tensors, from the safetensors headers.

    Raises:
        ModelError: there are none, or one is damaged.
    """
    total = sum(tensor.end - tensor.start for tensor in weights.read_headers(folder).values())
    if not total:
        raise ModelError(f"{folder}: no safetensors weights, so that their size is unknown; give --weights-memory")
    return total


def blocks_held(tokens: int, block_tokens: int) -> int:
    """KV blocks that one request of `tokens` holds."""
    return math.ceil(tokens / block_tokens)


def fitting_concurrency(tokens: int, kv_tokens: int, block_tokens: int) -> int:
    """How many requests of `tokens` the cache holds at once; one more preempts."""
    return (kv_tokens // block_tokens) // blocks_held(tokens, block_tokens)


def peak_use(records: Iterable[RequestRecord], kv_tokens: int, block_tokens: int) -> float | None:
    """Largest share of the KV pool that requests held together, from their own times.

    A request counts from its first token, when all of its prompt is held, to its last. Evaluated at each end, where
    what a request holds is largest; None when nothing was held.
    """
    held = [record for record in records if record.ttft_ms is not None and record.e2e_ms is not None]
    if not held:
        return None
    blocks = max(sum(_blocks_at(record, instant.end_s, block_tokens) for record in held) for instant in held)
    return blocks / (kv_tokens // block_tokens)


def _blocks_at(record: RequestRecord, at_s: float, block_tokens: int) -> int:
    assert record.ttft_ms is not None
    first_s = record.sent_s + record.ttft_ms / 1000
    if not first_s <= at_s <= record.end_s:
        return 0
    share = (at_s - first_s) / (record.end_s - first_s) if record.end_s > first_s else 1
    generated = max(1, round(record.output_tokens * share))
    # The newest token is not in the cache until the step after it.
    return blocks_held(record.prompt_tokens + generated - 1, block_tokens)
