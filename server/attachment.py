"""An engine that runs elsewhere, on Kubernetes or Ray: watched like one of ours, never started, stopped or restarted."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from ard_serve.errors import UsageError
from server.config import ServeConfig
from server.connection import UpstreamError
from server.watch import Watch

log = logging.getLogger("server.attachment")

ENGINE_KEY = "ARD_ENGINE_KEY"  # environment, not a flag: other users can read a command line
_ASK_TIMEOUT_S = 5


class Attachment:
    """Waits for the engine at `url`, one of `--attach`, again after each of its absences; `watches` are those of all."""

    def __init__(self, config: ServeConfig, url: str, watch: Watch, watches: Sequence[Watch]) -> None:
        self._config, self._url, self.watch, self._watches = config, url, watch, watches

    async def run(self) -> None:
        """Follow the engine until cancelled.

        Raises:
            UsageError: it wants another key, or serves another model or a shorter window than ours, and no engine of
                `watches` has been ready yet.
        """
        told = ""
        while True:
            self.watch.health.loading(f"waiting for the engine at {self._url}")
            try:
                await self._until_it_answers()
                problem, told = await self.watch.run(), ""
            except UsageError as error:
                if not any(watch.health.was_ready for watch in self._watches):
                    raise
                problem = str(error)  # who is served goes on being served, and it may become the right one
                await asyncio.sleep(self._config.restart_backoff_s)
            self.watch.down(problem)
            if problem != told:
                log.error("engine at %s: %s", self._url, problem)
            told = problem

    async def stop(self, _grace_s: float) -> None:
        """Leave the engine alone: it is not ours."""

    async def _until_it_answers(self) -> None:
        while True:
            with contextlib.suppress(UpstreamError, TimeoutError):
                async with asyncio.timeout(_ASK_TIMEOUT_S):
                    status, answer = await self.watch.upstream.call("GET", "/v1/models")
                if status in (401, 403):
                    raise UsageError(f"{self._url} refused the key; put the engine's own into ${ENGINE_KEY}")
                if status == 200 and isinstance(answer, dict):
                    return self._check(answer.get("data", []))
            await asyncio.sleep(self._config.restart_backoff_s)

    def _check(self, models: list[dict[str, Any]]) -> None:
        windows = {model["id"]: model.get("max_model_len") for model in models}
        if self._config.model_name not in windows:
            names = ", ".join(map(repr, windows))
            raise UsageError(f"{self._url} serves {names}, not {self._config.model_name!r}; use --served-model-name")
        window = windows[self._config.model_name]
        if window is not None and window < self.watch.window:
            raise UsageError(
                f"{self._url} has a window of {window} tokens, {self.watch.window} were to be served; "
                f"use --max-model-len {window}"
            )
