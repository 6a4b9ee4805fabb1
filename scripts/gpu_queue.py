"""Work through a list of commands on several GPUs, a few at a time on each: a small model leaves most of a card idle.

    python -m scripts.gpu_queue LIST --logs FOLDER [--gpus 0 1 2 3] [--each 4] [--minutes 9]

LIST is a file of lines `NAME COMMAND`, best first; it may grow while the queue runs, at its top or its end. A line that
begins with `GPU!`, such as `0!name command`, is for that card alone. Every command is bash's, sees its card alone
(CUDA_VISIBLE_DEVICES) and writes FOLDER/NAME.log; FOLDER/queue.log says what began and ended when, and FOLDER/NAME.claimed
keeps a command from running twice, by another queue over the same folder too. After `--minutes` nothing more begins; what runs
is waited for.
"""

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

_BETWEEN_S = 0.5
_LINE = re.compile(r"(?:(?P<gpu>\d+)!)?(?P<name>[\w.-]+)\s+(?P<command>\S.*)")


@dataclass
class Queue:
    """Commands of a list, each taken once."""

    commands: Path
    logs: Path
    deadline: float
    started: float = field(default_factory=time.monotonic)

    def work(self, gpu: str) -> None:
        """Run what is next for `gpu`, until there is nothing left or the time is over."""
        while time.monotonic() < self.deadline and (taken := self.take(gpu)):
            name, command = taken
            self._tell(f"{name} begins on GPU {gpu}")
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
            with (self.logs / f"{name}.log").open("a") as log:
                done = subprocess.run(
                    ["bash", "-c", command], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
                )
            self._tell(f"{name} ended with {done.returncode}")

    def take(self, gpu: str) -> tuple[str, str] | None:
        """Name and command of the first line that nobody has taken and that may run on `gpu`."""
        for line in map(_LINE.fullmatch, self.commands.read_text(encoding="utf-8").splitlines()):
            if line and line["gpu"] in (None, gpu) and self._claim(line["name"]):
                return line["name"], line["command"]
        return None

    def _claim(self, name: str) -> bool:
        try:
            (self.logs / f"{name}.claimed").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _tell(self, what: str) -> None:
        with (self.logs / "queue.log").open("a") as log:
            print(f"{time.monotonic() - self.started:7.1f} s  {what}", file=log, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, help="file of lines NAME COMMAND")
    parser.add_argument("--logs", type=Path, required=True, help="folder of the logs")
    parser.add_argument("--gpus", nargs="+", default=["0"], help="numbers of the cards (default: 0)")
    parser.add_argument("--each", type=int, default=4, help="commands at a time on a card (default: 4)")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing more begins (default: 9)")
    given = parser.parse_args(arguments)
    given.logs.mkdir(parents=True, exist_ok=True)
    queue = Queue(given.list, given.logs, time.monotonic() + 60 * given.minutes)
    workers = [threading.Thread(target=queue.work, args=(gpu,)) for _ in range(given.each) for gpu in given.gpus]
    for worker in workers:
        worker.start()
        time.sleep(_BETWEEN_S)  # so that the best are taken first, by one card after the other
    for worker in workers:
        worker.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
