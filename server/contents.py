"""The slow half of checking a model folder, every byte of it, beside the engine that loads the same bytes meanwhile."""

import asyncio
import contextlib
import threading
from concurrent.futures import Future

from server.preflight import Checkpoint, check_contents


class Contents:
    """Checks the folders in a thread, which keeps no ending process waiting."""

    def __init__(self, *checkpoints: Checkpoint) -> None:
        self._checkpoints = checkpoints
        self._result: Future[None] = Future()
        threading.Thread(target=self._check, daemon=True).start()

    def wait(self, seconds: float) -> None:
        """Wait for the end of the check for a moment, which is enough for a small model.

        Raises:
            ModelError: the file or tensor that is damaged.
        """
        with contextlib.suppress(TimeoutError):
            self._result.result(seconds)

    async def passed(self) -> None:
        """Wait until all has been checked; raises as `wait` does."""
        await asyncio.wrap_future(self._result)

    async def damage(self) -> None:
        """Raise as `wait` does, and otherwise never return."""
        await self.passed()
        await asyncio.get_running_loop().create_future()

    def _check(self) -> None:
        self._result.set_running_or_notify_cancel()  # so that whoever stops waiting does not cancel it
        try:
            for checkpoint in self._checkpoints:
                check_contents(checkpoint)
        except Exception as error:  # noqa: BLE001 - it is raised where the result is waited for
            self._result.set_exception(error)
        else:
            self._result.set_result(None)
