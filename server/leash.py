"""Run the engine in a process group that cannot outlive the gateway: `python -m server.leash COMMAND...`.

Standard input is a pipe whose other end only the gateway holds. It closes when the gateway ends for whatever reason,
kill -9 included, and then the whole group is killed: vLLM's engine and worker processes survive their API process.
"""

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    """Run `command`, wait for it, and return its exit code, 128 + n for a death by signal n."""
    threading.Thread(target=_kill_group_when_orphaned, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        # The gateway signals the whole group and the engine decides when it ends. A handler, unlike SIG_IGN, is not inherited.
        signal.signal(number, lambda *_: None)
    code = subprocess.Popen(command, stdin=subprocess.DEVNULL).wait()
    return code if code >= 0 else 128 - code


def _kill_group_when_orphaned() -> None:
    while os.read(0, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
