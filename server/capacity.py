"""Start-up arithmetic: memory of weights and KV cache, how many requests of which length fit, which flag to change."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from math import prod
from typing import Any

import psutil

from ard_serve.errors import ResourceError
from server.config import ServeConfig
from server.preflight import Checkpoint, head_dim, kv_heads

_GIB = 1 << 30
_CPU_SPACE = "VLLM_CPU_KVCACHE_SPACE"
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_GPU_SHARE = 0.92  # vLLM's default for --gpu-memory-utilization
_SHORT_SHARE = 0.25  # of the restored model's KV cache, for the native one beside it
_GPU_OVERHEAD_BYTES = 2 * _GIB  # activations and CUDA graphs, measured generously


@dataclass(frozen=True)
class Plan:
    """Memory of one engine: what the weights take, and the room for the KV cache."""

    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int

    @property
    def kv_tokens(self) -> int:
        return self.kv_bytes // self.kv_bytes_per_token

    def title(self, model: str) -> str:
        """One line: weights in GiB, KV bytes of a token, tokens that the cache holds."""
        weights_gib = self.weight_bytes / _GIB
        return f"{model}: weights {weights_gib:.2f} GiB, KV {self.kv_bytes_per_token:,} B/token, {self.kv_tokens:,} tokens fit"

    def rows(self, window: int) -> list[tuple[str, str, str]]:
        """Table of length, KV memory of one request in GiB, and how many fit at once."""
        lengths = sorted({window, *(window // part for part in (2, 4, 8))}, reverse=True)
        return [
            (
                f"{length:,}",
                f"{length * self.kv_bytes_per_token / _GIB:.3f}",
                f"{self.kv_tokens // length:,}",
            )
            for length in lengths
        ]


def gpu_memory_bytes() -> tuple[int, ...]:
    """Total memory of each NVIDIA GPU; empty where there is none."""
    if not (tool := shutil.which("nvidia-smi")):
        return ()
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return tuple(int(line) << 20 for line in answer.stdout.split() if line.isdigit())


def kv_cache_bytes(config: ServeConfig, on_gpu: bool) -> int | None:
    """Size of the KV cache that vLLM is told, or None where vLLM finds it or the operator's environment says it."""
    if config.kv_cache_gib:
        return int(config.kv_cache_gib * _GIB)
    if on_gpu or _CPU_SPACE in os.environ:
        return None
    return max(_GIB, min(4 * _GIB, psutil.virtual_memory().available // 4))


def split(
    config: ServeConfig, short: ServeConfig, main: Checkpoint, native: Checkpoint, gpus: tuple[int, ...]
) -> tuple[ServeConfig, ServeConfig]:
    """The settings of two engines on one memory: each with its KV cache said, on a GPU with its share of the memory too.

    Raises:
        ResourceError: weights and KV caches of both do not fit together; names the flags.
    """
    ranks = _ranks(config.engine_args)
    weights = [_weight_bytes(checkpoint) // ranks for checkpoint in (main, native)]
    if gpus:
        share = float(_option(config.engine_args, "--gpu-memory-utilization") or _GPU_SHARE)
        room = int(min(gpus) * share) - 2 * _GPU_OVERHEAD_BYTES - sum(weights)
    else:
        room = psutil.virtual_memory().available - sum(weights)
    told_bytes = kv_cache_bytes(config, bool(gpus)) or (None if gpus else int(os.environ[_CPU_SPACE]) * _GIB)
    short_bytes = int((config.profile_short_kv_gib or 0) * _GIB) or int(
        told_bytes * _SHORT_SHARE if told_bytes else room * _SHORT_SHARE / (1 + _SHORT_SHARE)
    )
    main_bytes = told_bytes or room - short_bytes
    if min(main_bytes, short_bytes) <= 0 or main_bytes + short_bytes > room:
        raise ResourceError(
            f"two models leave {max(0, room) / _GIB:.2f} GiB for their KV caches, {main_bytes / _GIB:.2f} and "
            f"{short_bytes / _GIB:.2f} GiB were to be used; lower --kv-cache-gib or --profile-short-kv-gib"
        )
    pairs = zip((config, short), weights, (main_bytes, short_bytes), strict=True)
    made = []
    for settings, weight_bytes, kv_bytes in pairs:
        used = (weight_bytes + _GPU_OVERHEAD_BYTES + kv_bytes) / min(gpus) if gpus else 0
        args = ("--gpu-memory-utilization", f"{used:.3f}") if gpus else ()
        update = {"kv_cache_gib": kv_bytes / _GIB, "engine_args": (*settings.engine_args, *args)}
        made.append(settings.model_copy(update=update))
    return made[0], made[1]


def plan(checkpoint: Checkpoint, gpus: tuple[int, ...], told_bytes: int | None, engine_args: tuple[str, ...]) -> Plan:
    """Compute what fits from config.json, the tensors' headers and the memory that is there.

    Raises:
        ResourceError: one request of the whole window does not fit; names the flag and the value that would.
    """
    config = checkpoint.config
    weight_bytes = _weight_bytes(checkpoint)
    per_token = kv_bytes_per_token(config, _option(engine_args, "--kv-cache-dtype"))
    if told_bytes:
        kv_bytes = told_bytes
    elif gpus:
        ranks = _ranks(engine_args)
        share = float(_option(engine_args, "--gpu-memory-utilization") or _GPU_SHARE)
        kv_bytes = int(ranks * (min(gpus) * share - _GPU_OVERHEAD_BYTES)) - weight_bytes
    else:
        kv_bytes = int(os.environ[_CPU_SPACE]) * _GIB
    result = Plan(weight_bytes, per_token, kv_bytes)
    if (fits := max(0, kv_bytes) // per_token) < checkpoint.window:
        need_gib = checkpoint.window * per_token / _GIB
        remedy = (
            "--tensor-parallel-size or --kv-cache-dtype fp8 after --"
            if gpus and not told_bytes
            else f"--kv-cache-gib {need_gib:.2f}"
        )
        raise ResourceError(
            f"a window of {checkpoint.window} tokens needs {need_gib:.2f} GiB of KV cache, there is room for "
            f"{max(0, kv_bytes) / _GIB:.2f} GiB; use --max-model-len {fits} or {remedy}"
        )
    return result


def kv_bytes_per_token(config: dict[str, Any], cache_dtype: str | None) -> int:
    """Bytes of keys and values that one token takes over all layers."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    size = 1 if cache_dtype and cache_dtype.startswith("fp8") else _DTYPE_BYTES.get(dtype, 2)
    return 2 * int(config["num_hidden_layers"]) * prod((kv_heads(config), head_dim(config))) * size


def _weight_bytes(checkpoint: Checkpoint) -> int:
    return sum(tensor.end - tensor.start for tensor in checkpoint.tensors.values())


def _ranks(engine_args: tuple[str, ...]) -> int:
    """GPUs that share one copy of the weights."""
    return prod(int(_option(engine_args, flag) or 1) for flag in ("--tensor-parallel-size", "--pipeline-parallel-size"))


def _option(args: tuple[str, ...], flag: str) -> str | None:
    """Value of `flag VALUE` or `flag=VALUE` among the engine's arguments."""
    for index, arg in enumerate(args):
        if arg == flag and index + 1 < len(args):
            return args[index + 1]
        if arg.startswith(flag + "="):
            return arg.partition("=")[2]
    return None
