"""Work done in forked children that are killed, or whose disk fails, at chosen system calls.

One process imports torch, then forks a child for each try: a child costs what its work costs, and no import.
"""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

# A script defines `run(*words)`, which does its work once its process has been stopped and continued again.
_SERVER = """

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            run(*line.split())
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(getattr(error, "exit_code", 1))
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Forks:
    """Children that each stop themselves before they begin to write, until they are told to go on."""

    def __init__(self, script: str, *words: str) -> None:
        """`script` imports os, signal and sys, reads `words` from sys.argv and calls SIGSTOP on itself in `run`."""
        command = [sys.executable, "-c", textwrap.dedent(script) + _SERVER, *words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._read() == "ready"

    def start(self, *words: object) -> int:
        """Fork a child that runs `words`, and return its pid once it has stopped."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return int(self._read())

    def finish(self, pid: int, fault: str | None = None, path: Path | None = None) -> int:
        """Let the child go on, under a fault of strace's (at `path` alone); returns its exit code, negative for a signal."""
        if fault is None:
            os.kill(pid, signal.SIGCONT)
            return int(self._read())
        where = ["-P", str(path)] if path else []
        command = ["strace", "-f", "-o", "/dev/null", "-p", str(pid), *where, f"--inject={fault}"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            assert "attached" in tracer.stderr.readline()
            os.kill(pid, signal.SIGCONT)
            code = int(self._read())
            tracer.communicate(timeout=30)
        return code

    def kill_after(self, pid: int, seconds: float) -> int:
        """Let the child go on and kill it after so long."""
        os.kill(pid, signal.SIGCONT)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return int(self._read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()
