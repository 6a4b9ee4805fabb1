"""Keeps an engine of our own running: start, restart with backoff, give up, stop."""

import asyncio
import logging
import time
from collections import deque

from ard_serve.errors import EngineDiedError
from server.config import ServeConfig
from server.engine import Engine, EngineSpec
from server.watch import Watch

log = logging.getLogger("server.supervisor")

_RESTART_WINDOW_S = 600
_LONGEST_BACKOFF_S = 60
_LAST_WORDS_S = 0.2


class Supervisor:
    """Owns the engine process, and has `watch` say how it does. It starts after `first`, so that both measure their memory."""

    def __init__(self, config: ServeConfig, spec: EngineSpec, watch: Watch, first: Watch | None = None) -> None:
        self._config, self._spec, self.watch, self._first = config, spec, watch, first
        self._engine: Engine | None = None

    async def run(self) -> None:
        """Run engines one after another until cancelled.

        Raises:
            EngineDiedError: the first one never became ready, or too many died in a row.
        """
        if self._first:
            await self._first.health.until_first_ready()
        deaths: deque[float] = deque()
        while True:
            self.watch.health.loading("the engine is loading the model")
            self._spec.socket.unlink(missing_ok=True)
            started_at = time.monotonic()
            self._engine = await Engine.start(self._spec)
            problem = await self._attend(self._engine)
            was_ready = self.watch.health.was_ready
            self.watch.down(problem)
            await self._engine.stop(grace_s=0)
            if not was_ready:
                raise EngineDiedError(f"the engine never became ready: {problem}")
            deaths.append(time.monotonic())
            if self.watch.health.ready_at > started_at:  # one that never is, however long it takes, must not go on for ever
                while deaths[0] < deaths[-1] - _RESTART_WINDOW_S:
                    deaths.popleft()
            if len(deaths) > self._config.max_restarts:
                raise EngineDiedError(
                    f"the engine died {len(deaths)} times in {(deaths[-1] - deaths[0]) / 60:.0f} minutes, the limit is "
                    f"{self._config.max_restarts} restarts (--max-restarts); last: {problem}"
                )
            first_s = self._config.restart_backoff_s
            backoff_s = min(first_s * 2 ** min(len(deaths) - 1, 10), max(first_s, _LONGEST_BACKOFF_S))
            log.error("engine %s down: %s; restart %d in %.1f s", self.watch.name, problem, len(deaths), backoff_s)
            self.watch.metrics.restarts.labels(self.watch.name).inc()
            await asyncio.sleep(backoff_s)

    async def stop(self, grace_s: float) -> None:
        """Stop the engine, killing after `grace_s` seconds what has not ended."""
        if self._engine:
            await self._engine.stop(grace_s)

    async def _attend(self, engine: Engine) -> str:
        """Watch one engine until it is dead or hopeless; says what is wrong with it."""
        ended = asyncio.create_task(engine.wait())
        watch = asyncio.create_task(self.watch.run())
        try:
            await asyncio.wait({ended, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                problem = watch.result()
                return problem if self.watch.health.was_ready else f"{problem}; last in its log: {engine.reason()}"
            await asyncio.sleep(_LAST_WORDS_S)  # they are still in the pipe
            return f"it ended with exit code {ended.result()}: {engine.reason()}"
        finally:
            ended.cancel()
            watch.cancel()
