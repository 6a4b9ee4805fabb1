"""Devices: which one is meant, what its data sheet lets a plan reckon with, how it computes, and when its memory is full."""

import gc
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ard_serve.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: as flags and results call it.
        matrix_tflops: TFLOP/s of bf16 matrix products with fp32 sums, without sparsity, by the data sheet.
        memory_mib: MiB that nvidia-smi shows.
    """

    name: str
    matrix_tflops: float
    memory_mib: int

    @property
    def usable_bytes(self) -> int:
        """What is left for tensors beside the context that CUDA and its libraries keep."""
        return (self.memory_mib << 20) - _CONTEXT_BYTES


# A context with cuBLAS, cuDNN and NCCL loaded, and what PyTorch's allocator cannot use of its blocks.
_CONTEXT_BYTES = 1 << 30

# NVIDIA's data sheets; the H100 and the A100 are the SXM cards of 80 GB.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 989.4, 81_559),
        Gpu("H200", 989.4, 143_771),
        Gpu("A100", 312.0, 81_920),
        Gpu("L40S", 362.1, 46_068),
        Gpu("RTX 4090", 165.2, 24_564),
    )
}
# Other cards of the same chip are slower than the one in the table.
_OTHER_CARDS = ("PCIe", "NVL", "Laptop", "40GB", "4090 D")


_FULL = re.compile(r"out of memory|ALLOC_FAILED|can't allocate memory", re.IGNORECASE)
_log = logging.getLogger(__name__)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Where `wanted`, run only operations that give the same bits for the same input, and refuse any that has no such form.

    Entered before the GPU is used: cuBLAS reads its setting then.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.use_deterministic_algorithms(True)
    # Its backward adds up in any order, and nothing says so until it runs; cuDNN's attention leaves by itself.
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cuda.enable_mem_efficient_sdp(before[1])


def type_of(wanted: str) -> str:
    """The type of device, "cuda" or "cpu", that is meant by one of these or "auto".

    Raises:
        UsageError: no CUDA device is visible.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UsageError("device = cuda: no CUDA device is visible here; use --device cpu or auto")
    return "cuda" if available and wanted != "cpu" else "cpu"


def give_back() -> None:
    """Let go of what nothing refers to any more; PyTorch's allocator would keep its blocks, and free memory look taken."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def full(error: BaseException) -> str | None:
    """The line of an error that says that memory ran out, on the host or the device; None of any other error.

    CUDA, cuBLAS, NCCL, Triton and PyTorch's host allocator have no exception of their own for it.
    """
    if isinstance(error, MemoryError):
        return str(error) or "host memory"
    if not isinstance(error, RuntimeError):
        return None
    lines = str(error).splitlines() or [type(error).__name__]
    found = next((line for line in lines if _FULL.search(line)), None)
    return found or (lines[0] if isinstance(error, torch.OutOfMemoryError) else None)


def is_fast(dtype: str, device_type: str) -> bool:
    """Whether `device_type` ("cuda" or "cpu") multiplies matrices of `dtype` ("bf16" or "fp32") at its own pace.

    PyTorch has fast bf16 products on x86 CPUs with AVX-512 or AMX and on newer Arm ones; elsewhere it adds number by number.
    """
    if device_type != "cpu" or dtype != "bf16":
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_if_slow(dtype: str, device_type: str) -> None:
    """Tell whoever asked for a slow dtype, before it costs them hours."""
    if not is_fast(dtype, device_type):
        _log.warning("dtype = %s: this CPU takes many times as long for its products as for fp32's; try --dtype fp32", dtype)


def named(device: torch.device) -> Gpu | None:
    """What is known of a device; None for a CPU and for a card that is not in the table."""
    if device.type != "cuda":
        return None
    return by_name(torch.cuda.get_device_name(device))


def lookup(name: str) -> Gpu:
    """The GPU that a user means by, for example, `h100` or `rtx-4090`.

    Raises:
        UsageError: it is not in the table.
    """
    found = [gpu for known, gpu in GPUS.items() if _letters(name) and _letters(name) in _letters(known)]
    if len(found) != 1:
        raise UsageError(f"gpu = {name}: not known; one of {', '.join(GPUS)}")
    return found[0]


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def by_name(reported: str) -> Gpu | None:
    """The GPU that a driver reports as, for example, `NVIDIA H100 80GB HBM3`."""
    if any(word in reported for word in _OTHER_CARDS):
        return None
    return next((gpu for name, gpu in GPUS.items() if name in reported), None)
