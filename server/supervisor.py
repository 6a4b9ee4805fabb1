"""Keeps an engine running and knows whether it answers: start, canary, restart with backoff, give up, stop."""

import asyncio
import contextlib
import logging
import math
import secrets
import tempfile
import time
from collections import deque
from pathlib import Path

from ard_serve.errors import EngineDiedError
from server.admission import Admission, Capacity
from server.config import ServeConfig
from server.engine import Engine, engine_spec
from server.health import Health
from server.metrics import Metrics, engine_sample
from server.upstream import Upstream, UpstreamError

log = logging.getLogger("server.supervisor")

_RESTART_WINDOW_S = 600
_POLL_S = 0.2
_STOP_GRACE_S = 5
_SCRAPE_TIMEOUT_S = 2


class Supervisor:
    """Owns the engine process and tells `health` and `admission` what it knows of it."""

    def __init__(
        self,
        config: ServeConfig,
        window: int,
        flags: tuple[str, ...],
        lanes: tuple[int, int],
        health: Health,
        admission: Admission,
        metrics: Metrics,
    ) -> None:
        self._config, self._health, self._admission, self._metrics = config, health, admission, metrics
        self._folder = tempfile.TemporaryDirectory(prefix="ard-serve-")
        self._socket = Path(self._folder.name) / "engine.sock"
        key = secrets.token_hex(32)
        self._spec = engine_spec(config, self._socket, key, window, flags)
        self._window, self._lanes = window, lanes
        self._engine: Engine | None = None
        self._suspect = asyncio.Event()
        self._corrupted_requests = 0.0
        self._finite_canary = True
        self.last_event_at = time.monotonic()
        self.parameters: dict[str, frozenset[str]] = {}
        self.upstream = Upstream(self._socket, key)

    async def run(self) -> None:
        """Run engines one after another until cancelled.

        Raises:
            EngineDiedError: the first one never became ready, or too many died in a row.
        """
        deaths: deque[float] = deque()
        while True:
            self._health.loading("the engine is loading the model")
            self._socket.unlink(missing_ok=True)
            self._engine = await Engine.start(self._spec)
            problem = await self._attend(self._engine)
            was_ready = self._health.was_ready
            self._health.down(problem)
            self._admission.close()
            await self._engine.stop(grace_s=0)
            if not was_ready:
                raise EngineDiedError(f"the engine never became ready: {problem}")
            deaths.append(time.monotonic())
            while deaths[0] < deaths[-1] - _RESTART_WINDOW_S:
                deaths.popleft()
            if len(deaths) > self._config.max_restarts:
                raise EngineDiedError(
                    f"the engine died {len(deaths)} times in {_RESTART_WINDOW_S // 60} minutes, the limit is "
                    f"{self._config.max_restarts} restarts (--max-restarts); last: {problem}"
                )
            backoff_s = self._config.restart_backoff_s * 2 ** (len(deaths) - 1)
            log.error("engine down: %s; restart %d in %.1f s", problem, len(deaths), backoff_s)
            self._metrics.restarts.inc()
            await asyncio.sleep(backoff_s)

    async def stop(self, grace_s: float = _STOP_GRACE_S) -> None:
        """Stop the engine and remove its socket."""
        if self._engine:
            await self._engine.stop(grace_s)
        await self.upstream.close()
        self._folder.cleanup()

    def suspect(self) -> None:
        """A request saw the engine fail: let nobody in until the next canary, and send that now."""
        self._admission.close()
        self._suspect.set()

    def heard(self) -> None:
        """The engine has sent something."""
        self.last_event_at = time.monotonic()

    async def engine_metrics(self) -> str | None:
        """The engine's own metrics, or None when it does not give them in time."""
        try:
            async with asyncio.timeout(_SCRAPE_TIMEOUT_S):
                status, text = await self.upstream.call("GET", "/metrics")
        except (TimeoutError, UpstreamError):
            return None
        return text if status == 200 and isinstance(text, str) else None

    async def _attend(self, engine: Engine) -> str:
        """Watch one engine until it is dead or hopeless; says what is wrong with it."""
        ended = asyncio.create_task(engine.wait())
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({ended, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                return watch.result()
            await asyncio.sleep(_POLL_S)  # its last words are still in the pipe
            return f"it ended with exit code {ended.result()}: {engine.reason()}"
        finally:
            ended.cancel()
            watch.cancel()

    async def _watch(self) -> str:
        if problem := await self._until_loaded():
            return problem
        self.heard()
        while True:
            problem, is_fatal = await self._canary()
            if problem is None:
                self.heard()
                await self._answered()
            elif is_fatal:
                return problem
            else:
                self._health.unready(problem)
                silence_s = time.monotonic() - self.last_event_at
                if silence_s > self._config.hang_timeout_s:
                    return f"{problem}, nothing heard for {silence_s:.0f} s"
            self._metrics.ready.set(self._health.is_ready)
            self._suspect.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.canary_interval_s):
                    await self._suspect.wait()

    async def _answered(self) -> None:
        engine_text = await self.engine_metrics() or ""
        if self._is_corrupt(engine_text):
            self._health.corrupt("the engine computes non-finite logits")
        else:
            self._admission.open(self._measure_capacity(engine_text))
            self._health.ready()

    async def _until_loaded(self) -> str | None:
        deadline = time.monotonic() + self._config.start_timeout_s
        while time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
            if self._socket.exists():
                with contextlib.suppress(UpstreamError, TimeoutError):
                    async with asyncio.timeout(self._config.canary_timeout_s):
                        status, _ = await self.upstream.call("GET", "/health")
                        if status == 200:
                            await self._learn_parameters()
                            return None
        return f"not loaded within {self._config.start_timeout_s:g} s (--start-timeout-s)"

    async def _learn_parameters(self) -> None:
        """Names of each request's fields from the engine's own OpenAPI document, so that no version of vLLM is hard-coded."""
        status, document = await self.upstream.call("GET", "/openapi.json")
        schemas = document.get("components", {}).get("schemas", {}) if status == 200 and isinstance(document, dict) else {}
        self.parameters = {name: frozenset(schema.get("properties", ())) for name, schema in schemas.items()}

    async def _canary(self) -> tuple[str | None, bool]:
        """Ask for one token. What is wrong, if anything, and whether only a restart can help."""
        payload = {"model": self._config.model_name, "prompt": [1], "max_tokens": 1, "temperature": 0, "logprobs": 1}
        try:
            async with asyncio.timeout(self._config.canary_timeout_s):
                status, answer = await self.upstream.call("POST", "/v1/completions", payload, "canary")
                if status != 200:
                    health_status, _ = await self.upstream.call("GET", "/health")
                    return f"the canary got status {status}", health_status != 200
        except TimeoutError:
            return f"no answer to the canary within {self._config.canary_timeout_s:g} s", False
        except UpstreamError as error:
            return f"the canary failed ({error})", False
        self._finite_canary = _has_finite_logprob(answer)
        return None, False

    def _is_corrupt(self, engine_text: str) -> bool:
        """Whether the canary, or any request since the last one, met non-finite logits."""
        total = sum(value for _, value in engine_sample(engine_text, "vllm:corrupted_requests_total"))
        is_corrupt = total > self._corrupted_requests or not self._finite_canary
        self._corrupted_requests = total
        self._metrics.non_finite.set(is_corrupt)
        return is_corrupt

    def _measure_capacity(self, engine_text: str) -> Capacity:
        batch_tokens, long_tokens = self._lanes
        samples = engine_sample(engine_text, "vllm:cache_config_info")
        blocks = sum(int(labels["num_gpu_blocks"]) for labels, _ in samples if labels.get("num_gpu_blocks", "").isdigit())
        block_tokens = int(samples[0][0]["block_size"]) if blocks else 16
        kv_tokens = (blocks - len(samples)) * block_tokens if blocks else self._window  # one block of each is vLLM's own
        self._metrics.capacity.set(kv_tokens)
        return Capacity(kv_tokens, block_tokens, long_tokens, max(1, batch_tokens // long_tokens - 1))


def _has_finite_logprob(answer: object) -> bool:
    try:
        return math.isfinite(answer["choices"][0]["logprobs"]["token_logprobs"][0])  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        return False
