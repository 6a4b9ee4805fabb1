"""One vLLM server process on a Unix socket: its command line, its start, its log, its end."""

import asyncio
import logging
import os
import re
import signal
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from server.config import ServeConfig

log = logging.getLogger("server.engine")

_LOG_TAIL_LINES = 1000  # a failed start writes several tracebacks after the one that tells
_ERROR_LINE = re.compile(r"(?:[Ee]rror|Exception)[:,] (.+)")
_NOT_THE_CAUSE = re.compile(r" (?:INFO|WARNING) |root cause above")


@dataclass(frozen=True)
class EngineSpec:
    """What to run: the full command, the environment that goes on top of ours, and the socket that will appear."""

    command: tuple[str, ...]
    environment: dict[str, str]
    socket: Path


def engine_spec(config: ServeConfig, socket: Path, key: str, max_model_len: int, extra_flags: tuple[str, ...]) -> EngineSpec:
    """Build vLLM's command line; `extra_flags` are those that were probed to exist."""
    command = (
        *config.engine_command,
        *("--model", str(config.model)),
        *("--served-model-name", config.model_name),
        *("--uds", str(socket)),
        *("--max-model-len", str(max_model_len)),
        *("--load-format", "safetensors"),
        *extra_flags,
        *config.engine_args,
    )
    environment = {
        "VLLM_API_KEY": key,  # not a flag: other users can read a command line
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
    }
    if config.profile_short:
        # On a CPU, vLLM binds each engine to the same cores, where one that spins starves the other.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return EngineSpec(command, environment, socket)


class Engine:
    """A running engine. It leads its own process group, and a leash kills that group when this process ends."""

    def __init__(self, process: asyncio.subprocess.Process, log_fd: int) -> None:
        self._process = process
        self._tail: deque[str] = deque(maxlen=_LOG_TAIL_LINES)
        self._reader = asyncio.create_task(self._read_log(log_fd))

    @classmethod
    async def start(cls, spec: EngineSpec) -> "Engine":
        # A pipe of our own: asyncio's would hold `wait` until the last surviving grandchild has closed it.
        log_fd, engine_fd = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "server.leash", *spec.command),
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | spec.environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=engine_fd,
                stderr=engine_fd,
                start_new_session=True,
            )
        finally:
            os.close(engine_fd)
        log.info("engine started, pid %d: %s", process.pid, " ".join(spec.command))
        return cls(process, log_fd)

    @property
    def pid(self) -> int:
        """Process id of the leash, which is also the id of the engine's process group."""
        return self._process.pid

    async def wait(self) -> int:
        """Wait for the engine's end; its exit code, 128 + n for signal n."""
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """Ask the process group to end, wait `grace_s` seconds, then kill what is left of it."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            log.warning("engine did not stop within %.1f s, killing its process group", grace_s)
        self._signal(signal.SIGKILL)
        await self._process.wait()
        self._reader.cancel()

    def reason(self) -> str:
        """The last line of the engine's log that names an error, or its last line."""
        for line in reversed(self._tail):
            if (found := _ERROR_LINE.search(line)) and not _NOT_THE_CAUSE.search(line):
                return found.group(1).strip()[:500]
        return self._tail[-1].strip()[:500] if self._tail else "it wrote nothing"

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    async def _read_log(self, log_fd: int) -> None:
        reader = asyncio.StreamReader(limit=1 << 20)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(log_fd, "rb")
        )
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # a line longer than the reader's limit
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._tail.append(text)
            log.info("%s", text)
