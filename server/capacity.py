"""Start-up arithmetic: memory of weights and KV cache, how many requests of which length fit, which flag to change."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from math import prod
from typing import Any

import psutil

from ard_serve.errors import ResourceError, UsageError
from server.config import ServeConfig
from server.preflight import Checkpoint, head_dim, kv_heads

_GIB = 1 << 30
_CPU_SPACE = "VLLM_CPU_KVCACHE_SPACE"
_DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
_FLOATS = ("F32", "F16", "BF16")
_SHORT_NAMES = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-n": "--nnodes"}
_NVIDIA_SMI_TIMEOUT_S = 30
_GPU_SHARE = 0.92  # vLLM's default for --gpu-memory-utilization
_SHORT_SHARE = 0.25  # of the restored model's KV cache, for the native one beside it
_LARGE_GPU_BYTES = 70 * _GIB
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
    """Total memory of each NVIDIA GPU; empty where there is none.

    Raises:
        ResourceError: the driver hangs.
    """
    if not (tool := shutil.which("nvidia-smi")):
        return ()
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        query.append(f"--id={visible}")  # the driver shows all of them, whatever CUDA may see
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ResourceError(f"{tool} did not answer within {_NVIDIA_SMI_TIMEOUT_S} s; the GPU's driver hangs") from None
    return tuple(int(line) << 20 for line in answer.stdout.split() if line.isdigit())


def kv_cache_bytes(config: ServeConfig, on_gpu: bool) -> int | None:
    """Size of the KV cache that vLLM is told, or None where vLLM finds it or the operator's environment says it."""
    if config.kv_cache_gib:
        return int(config.kv_cache_gib * _GIB)
    if on_gpu or _CPU_SPACE in os.environ:
        return None
    return max(_GIB, min(4 * _GIB, psutil.virtual_memory().available // 4))


def default_seats(gpus: tuple[int, ...]) -> int:
    """Sequences at once that vLLM takes by itself on such a device, an A100 apart. It tells nobody, so it is told."""
    if not gpus:
        return 128
    return 1024 if min(gpus) >= _LARGE_GPU_BYTES else 256


def seats(command: tuple[str, ...]) -> int | None:
    """Sequences at once by an engine's command line, None where that says nothing.

    Raises:
        UsageError: it is no number.
    """
    given = (flag for flag in ("--max-num-seqs", "--max-num-active-seqs") if _option(command, flag))
    return min((_whole(command, flag) for flag in given), default=None)


def split(
    config: ServeConfig, short: ServeConfig, main: Checkpoint, native: Checkpoint, gpus: tuple[int, ...]
) -> tuple[ServeConfig, ServeConfig]:
    """The settings of two engines on one memory: each with its KV cache said, on a GPU with its share of the memory too.

    Raises:
        UsageError: a flag of the engine's that cannot be.
        ResourceError: weights and KV caches of both do not fit together; names the flags.
    """
    ranks = _ranks(config.engine_args, gpus)
    weights = [_weight_bytes(checkpoint, config.engine_args) // ranks for checkpoint in (main, native)]
    if gpus:
        room = int(min(gpus) * _gpu_share(config.engine_args)) - 2 * _GPU_OVERHEAD_BYTES - sum(weights)
    else:
        room = psutil.virtual_memory().available - sum(weights)
    told_bytes = kv_cache_bytes(config, bool(gpus)) or (None if gpus else _cpu_space_bytes())
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
    """Compute what fits from config.json, the tensors' headers and the memory that is there; `told_bytes` are each rank's.

    Raises:
        UsageError: a flag of the engine's that cannot be.
        ResourceError: one request of the whole window does not fit; names the flag and the value that would.
    """
    ranks = _ranks(engine_args, gpus)
    weight_bytes = _weight_bytes(checkpoint, engine_args)
    cache_dtype, dtype = (_option(engine_args, flag) for flag in ("--kv-cache-dtype", "--dtype"))
    copies = max(1, _whole(engine_args, "--tensor-parallel-size") // kv_heads(checkpoint.config))  # each rank holds a head
    per_token = copies * kv_bytes_per_token(checkpoint.config, cache_dtype, dtype)
    if gpus and not told_bytes:
        kv_bytes = int(ranks * (min(gpus) * _gpu_share(engine_args) - _GPU_OVERHEAD_BYTES)) - weight_bytes
    else:
        kv_bytes = ranks * (told_bytes or _cpu_space_bytes())
    result = Plan(weight_bytes, per_token, kv_bytes)
    if (fits := max(0, kv_bytes) // per_token) < checkpoint.window:
        need_gib = checkpoint.window * per_token / _GIB
        remedy = (
            "--tensor-parallel-size or --kv-cache-dtype fp8 after --"
            if gpus and not told_bytes
            else f"--kv-cache-gib {need_gib / ranks:.2f}"
        )
        raise ResourceError(
            f"a window of {checkpoint.window} tokens needs {need_gib:.2f} GiB of KV cache, there is room for "
            f"{max(0, kv_bytes) / _GIB:.2f} GiB; use --max-model-len {fits} or {remedy}"
        )
    return result


def kv_bytes_per_token(config: dict[str, Any], cache_dtype: str | None, dtype: str | None = None) -> int:
    """Bytes of keys and values that one token takes over all layers; `dtype` is the model's where it is not config.json's."""
    names = (cache_dtype, dtype, config.get("dtype"), config.get("torch_dtype"))
    is_fp8 = cache_dtype is not None and cache_dtype.startswith("fp8")
    size = 1 if is_fp8 else next((_DTYPE_BYTES[name] for name in names if name in _DTYPE_BYTES), 2)
    return 2 * int(config["num_hidden_layers"]) * prod((kv_heads(config), head_dim(config))) * size


def _weight_bytes(checkpoint: Checkpoint, engine_args: tuple[str, ...]) -> int:
    """As stored, or in the operator's `--dtype`; packed weights keep their own."""
    size = _DTYPE_BYTES.get(_option(engine_args, "--dtype") or "")
    return sum(
        prod(tensor.shape) * size if size and tensor.dtype in _FLOATS else tensor.end - tensor.start
        for tensor in checkpoint.tensors.values()
    )


def _ranks(engine_args: tuple[str, ...], gpus: tuple[int, ...]) -> int:
    """GPUs that share one copy of the weights.

    Raises:
        UsageError: this machine has GPUs, but not so many, and no other machine is to give more.
    """
    counts = {flag: _whole(engine_args, flag) for flag in ("--tensor-parallel-size", "--pipeline-parallel-size")}
    ranks = prod(counts.values())
    goes_beyond = _option(engine_args, "--distributed-executor-backend") == "ray" or _whole(engine_args, "--nnodes") > 1
    if gpus and ranks > len(gpus) and not goes_beyond:
        named = " x ".join(f"{flag} {count}" for flag, count in counts.items() if count > 1)
        raise UsageError(f"{named} after --: that is {ranks} GPUs and this machine has {len(gpus)}; use at most {len(gpus)}")
    return ranks


def _whole(args: tuple[str, ...], flag: str) -> int:
    given = _option(args, flag) or "1"
    if not given.isdecimal() or int(given) < 1:
        raise UsageError(f"{flag} {given} after --: it must be a whole number, 1 or more")
    return int(given)


def _gpu_share(args: tuple[str, ...]) -> float:
    given = _option(args, "--gpu-memory-utilization") or str(_GPU_SHARE)
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--gpu-memory-utilization {given} after --: it must be a number above 0 and at most 1")
    return share


def _cpu_space_bytes() -> int:
    given = os.environ[_CPU_SPACE]
    if not given.isdecimal():
        raise UsageError(f"{_CPU_SPACE}={given}: vLLM takes whole GiB only; round it, or unset it and use --kv-cache-gib")
    return int(given) * _GIB


def _option(args: tuple[str, ...], flag: str) -> str | None:
    """The value that vLLM would take for `flag`: the last one given, by any spelling that it knows.

    Raises:
        UsageError: no value follows.
    """
    value = None
    for index, arg in enumerate(args):
        name, is_joined, given = arg.partition("=")
        if _SHORT_NAMES.get(name, name.replace("_", "-")) == flag:
            value = given if is_joined else next(iter(args[index + 1 :]), "")
            if not value or value.startswith("--"):
                raise UsageError(f"{arg} after --: no value follows it; give one")
    return value
