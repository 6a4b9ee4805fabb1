"""The folder of a run: one owner at a time, and a graceful stop when the owner is told to leave."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ard_serve.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, ResourceError, UsageError

_LOCK = ".lock"
# What a run leaves in its folder.
CONFIG, DATA, HELD_OUT, CHECKPOINTS, MODEL = "config.yaml", "data.json", "held-out.jsonl", "checkpoints", "model"
EVALUATION = "evaluation.json"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder and hold it against other runs; the lock dies with the process, however it ends.

    Raises:
        UsageError: another process holds it.
        ResourceError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a+")
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"{folder}: in use by process {file.read().strip() or '?'}; wait for it or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class Stopped(BaseException):
    """A signal came where nothing is under way that must be finished."""


class StopSignal:
    """Notes SIGINT and SIGTERM instead of dying, so that the step under way can finish and be saved.

    A second signal of the same kind acts at once, as it would without us.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at_once = False

    def act_at_once(self) -> None:
        """From here on a signal raises Stopped wherever it meets the program, and one that was noted before does now."""
        self._at_once = True
        if self.received is not None:
            raise Stopped

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(number, self._previous[self.received])
        if self._at_once:
            raise Stopped

    @property
    def exit_code(self) -> int:
        return EXIT_INTERRUPTED if self.received == signal.SIGINT else EXIT_TERMINATED
