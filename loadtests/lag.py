"""How long this client itself was kept from running: what an event waits for that costs it, no server is to blame for."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_EVERY_S = 0.02


class Lag:
    """The longest hold-up so far, in milliseconds."""

    def __init__(self) -> None:
        self.longest_ms = 0.0


@asynccontextmanager
async def watched_loop() -> AsyncIterator[Lag]:
    """Watch the running event loop while the body runs: a timer that wakes late was kept waiting like every event."""
    lag = Lag()

    async def watch() -> None:
        while True:
            due_s = time.perf_counter() + _EVERY_S
            await asyncio.sleep(_EVERY_S)
            lag.longest_ms = max(lag.longest_ms, 1000 * (time.perf_counter() - due_s))

    task = asyncio.create_task(watch())
    try:
        yield lag
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
