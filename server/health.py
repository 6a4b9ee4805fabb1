"""What the probes say: live as long as the process runs, ready when the engine has just proved that it generates."""

import asyncio
import math
import time
from enum import StrEnum

from server.errors import ApiError, unavailable


class Phase(StrEnum):
    LOADING = "loading"
    READY = "ready"
    UNREADY = "unready"
    CORRUPT = "corrupt"
    DOWN = "down"
    DRAINING = "draining"


class Health:
    """Knows of one engine whether requests may come in. Draining is final."""

    def __init__(self) -> None:
        self.phase = Phase.LOADING
        self.reason = "starting"
        self.ready_at = -math.inf  # of the monotonic clock, when it was last found ready
        self._first_ready = asyncio.Event()

    @property
    def was_ready(self) -> bool:
        """Whether the engine has ever been ready."""
        return self._first_ready.is_set()

    async def until_first_ready(self) -> None:
        """Wait until the engine has been ready once."""
        await self._first_ready.wait()

    @property
    def is_ready(self) -> bool:
        """Whether /readyz says 200."""
        return self.phase is Phase.READY

    @property
    def is_draining(self) -> bool:
        return self.phase is Phase.DRAINING

    def loading(self, reason: str) -> None:
        self._enter(Phase.LOADING, reason)

    def ready(self) -> None:
        self.ready_at = time.monotonic()
        self._first_ready.set()
        self._enter(Phase.READY, "ok")

    def unready(self, reason: str) -> None:
        self._enter(Phase.UNREADY if self.was_ready else Phase.LOADING, reason)

    def corrupt(self, reason: str) -> None:
        self._enter(Phase.CORRUPT, reason)

    def down(self, reason: str) -> None:
        self._enter(Phase.DOWN, reason)

    def drain(self) -> None:
        self._enter(Phase.DRAINING, "the server is shutting down")

    def refusal(self, retry_after_s: float) -> ApiError | None:
        """The answer to a new request while nobody may come in, or None.

        An engine that is slow to answer its canary still takes requests: they wait with a deadline.
        """
        if self.phase in (Phase.READY, Phase.UNREADY):
            return None
        if self.phase is Phase.CORRUPT:
            return ApiError(500, f"{self.reason}; its answers would be meaningless", "non_finite_logits")
        return unavailable(f"not ready: {self.reason}", f"server_{self.phase}", retry_after_s)

    def _enter(self, phase: Phase, reason: str) -> None:
        if not self.is_draining:
            self.phase, self.reason = phase, reason
