"""Knows whether an engine answers: waits until it has loaded, then asks it for a token again and again."""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable

from server import cache
from server.admission import Admission
from server.call import KINDS
from server.config import ServeConfig
from server.connection import UpstreamError
from server.health import Health
from server.ledger import Capacity, Ledger
from server.metrics import Metrics, engine_sample
from server.upstream import Upstream

_POLL_S = 0.05
_SCRAPE_TIMEOUT_S = 2
# What a working engine changes: tokens that come out, and memory that fills while prompts are read.
_WORK = ("vllm:generation_tokens_total", "vllm:kv_cache_usage_perc")
_CORRUPTED = "vllm:corrupted_requests_total"

# Ends when the model's files have been checked.
Checked = Callable[[], Awaitable[None]]


class Watch:
    """Tells `health`, `ledger` and `admission` what it learns of the engine behind `upstream`, whoever started that.

    `window` is in tokens; `seats` are those of each of the engine's ranks, None where unknown; `name` is the engine's in
    metrics and logs.
    """

    def __init__(
        self,
        name: str,
        config: ServeConfig,
        upstream: Upstream,
        window: int,
        seats: int | None,
        ledger: Ledger,
        admission: Admission,
        metrics: Metrics,
        checked: Checked,
    ) -> None:
        self.name, self.upstream, self.window, self.ledger = name, upstream, window, ledger
        self.health, self.metrics = Health(), metrics
        self.parameters: dict[str, frozenset[str]] = {}
        self._config, self._seats, self._admission, self._checked = config, seats, admission, checked
        self._suspect = asyncio.Event()
        self._corrupted_requests = 0.0
        self._counts_nans = False
        self._finite_canary = True
        self._met_nan = False
        self._work: list[float] = []
        self._last_event_at = time.monotonic()
        metrics.know(name)

    def suspect(self) -> None:
        """A request saw the engine fail: let nobody in until the next canary, and send that now."""
        self.ledger.close()
        self._suspect.set()

    async def is_alive(self) -> bool:
        """Whether the engine says so itself: one that has died does not, one that hangs may."""
        with contextlib.suppress(TimeoutError, UpstreamError):
            async with asyncio.timeout(_SCRAPE_TIMEOUT_S):
                return (await self.upstream.call("GET", "/health"))[0] == 200
        return False

    def heard(self) -> None:
        """The engine has sent something."""
        self._last_event_at = time.monotonic()

    def down(self, problem: str) -> None:
        """Nobody may come in until the engine is there again."""
        self.health.down(problem)
        self.ledger.close()
        self.metrics.ready.labels(self.name).set(False)

    async def engine_metrics(self) -> str | None:
        """The engine's own metrics, or None when it does not give them in time."""
        try:
            async with asyncio.timeout(_SCRAPE_TIMEOUT_S):
                status, text = await self.upstream.call("GET", "/metrics")
        except (TimeoutError, UpstreamError):
            return None
        return text if status == 200 and isinstance(text, str) else None

    async def run(self) -> str:
        """Watch until the engine is hopeless; says what is wrong with it."""
        if problem := await self._until_loaded():
            return problem
        self.health.loading("the model's files are being checked")
        await self._checked()
        self.heard()
        while True:
            self._suspect.clear()  # before the canary: a failure meanwhile asks for another one
            problem, is_fatal = await self._canary()
            if problem is not None and is_fatal:
                return problem
            engine_text = await self.engine_metrics()
            if self._has_worked(engine_text) or problem is None:
                self.heard()
            if problem is None:
                self._answered(engine_text)
            else:
                self.health.unready(problem)
                self.ledger.is_ready = False
                silence_s = time.monotonic() - self._last_event_at
                if silence_s > self._config.hang_timeout_s:
                    return f"{problem}, nothing heard for {silence_s:.0f} s"
            self.metrics.ready.labels(self.name).set(self.health.is_ready)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.canary_interval_s):
                    await self._suspect.wait()

    def _answered(self, engine_text: str | None) -> None:
        if self._is_corrupt(engine_text):
            self.health.corrupt("the engine computes non-finite logits")
            self.ledger.close()
        else:
            self._admission.open(self.ledger, self._measure_capacity(engine_text))
            self.health.ready()

    async def _until_loaded(self) -> str | None:
        deadline = time.monotonic() + self._config.start_timeout_s
        while time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
            with contextlib.suppress(UpstreamError, TimeoutError):
                async with asyncio.timeout(self._config.canary_timeout_s):
                    status, _ = await self.upstream.call("GET", "/health")
                    if status == 200:
                        await self._learn_parameters()
                        await self._learn_counter()
                        return None
        return f"not loaded within {self._config.start_timeout_s:g} s (--start-timeout-s)"

    async def _learn_parameters(self) -> None:
        """Names of each request's fields from the engine's own OpenAPI document, so that no version of vLLM is hard-coded.

        Making the document takes the engine a second, so what it says is kept by the version that the engine names.
        """
        status, answer = await self.upstream.call("GET", "/version")
        version = answer.get("version") if status == 200 and isinstance(answer, dict) else None
        names = cache.read(f"vllm-{version}-parameters", dict) if version else None
        if not names:
            status, document = await self.upstream.call("GET", "/openapi.json")
            schemas = document.get("components", {}).get("schemas", {}) if status == 200 and isinstance(document, dict) else {}
            names = {kind.schema: list(schemas[kind.schema].get("properties", ())) for kind in KINDS if kind.schema in schemas}
            if version and names:
                cache.write(f"vllm-{version}-parameters", names)
        self.parameters = {name: frozenset(fields) for name, fields in names.items()}

    async def _learn_counter(self) -> None:
        """Whether the engine counts requests that met a NaN, and where its count begins."""
        samples = _samples(await self.engine_metrics() or "", _CORRUPTED)
        self._met_nan = False
        self._counts_nans, self._corrupted_requests = bool(samples), sum(value for _, value in samples)

    async def _canary(self) -> tuple[str | None, bool]:
        """Ask for one token. What is wrong, if anything, and whether only a restart can help."""
        payload = {"model": self._config.model_name, "prompt": [1], "max_tokens": 1, "temperature": 0}
        if not self._counts_nans:  # a logprob shows a NaN as well, but an engine may compile for seconds for its first
            payload["logprobs"] = 1
        try:
            async with asyncio.timeout(self._config.canary_timeout_s):
                status, answer = await self.upstream.call("POST", "/v1/completions", payload, "canary")
                if status != 200 and self._is_corrupt(await self.engine_metrics()):
                    self._finite_canary = False  # and so its logprob could not be written as JSON
                    return None, False
                if status != 200:
                    return f"the canary got status {status}", not await self.is_alive()
        except TimeoutError:
            return f"no answer to the canary within {self._config.canary_timeout_s:g} s", False
        except UpstreamError as error:
            return f"the canary failed ({error})", False
        self._finite_canary = self._counts_nans or _has_finite_logprob(answer)
        return None, False

    def _has_worked(self, engine_text: str | None) -> bool:
        """Whether the engine has computed since the last look: a canary may wait in its queue for longer than a hang takes."""
        work = [value for name in _WORK for _, value in _samples(engine_text or "", name)]
        has_worked = bool(work) and work != self._work
        self._work = work or self._work
        return has_worked

    def _is_corrupt(self, engine_text: str | None) -> bool:
        """Whether the canary, or any request since the last one, met non-finite logits.

        An engine that counts them and gives no metrics this time is what it was found to be the last time.
        """
        if engine_text is not None or not self._counts_nans:
            samples = _samples(engine_text or "", _CORRUPTED)
            total = sum(value for _, value in samples) if samples else self._corrupted_requests
            self._met_nan = total > self._corrupted_requests
            self._corrupted_requests = total
        is_corrupt = self._met_nan or not self._finite_canary
        self.metrics.non_finite.labels(self.name).set(is_corrupt)
        return is_corrupt

    def _measure_capacity(self, engine_text: str | None) -> Capacity:
        """The KV cache by the engine's own metrics, or as it was before where they did not come in time.

        Room for one window where the engine has never said.
        """
        if engine_text is None and self.ledger.capacity:
            return self.ledger.capacity
        samples = _samples(engine_text or "", "vllm:cache_config_info")
        blocks = sum(int(labels["num_gpu_blocks"]) for labels, _ in samples if labels.get("num_gpu_blocks", "").isdigit())
        block_tokens = int(samples[0][0]["block_size"]) if blocks else 16
        kv_tokens = (blocks - len(samples)) * block_tokens if blocks else self.window  # one block of each is vLLM's own
        self.metrics.capacity.labels(self.name).set(kv_tokens)
        seats = self._seats and self._seats * max(1, len(samples))  # each data-parallel rank has its own, and a sample
        if seats:
            self.metrics.seats.labels(self.name).set(seats)
        return Capacity(kv_tokens, block_tokens, seats)


def _samples(engine_text: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Samples called `name`. Parsing all that vLLM says takes 40 ms, for which every stream would wait."""
    return engine_sample("".join(line for line in engine_text.splitlines(True) if line.startswith(name)), name)


def _has_finite_logprob(answer: object) -> bool:
    try:
        return math.isfinite(answer["choices"][0]["logprobs"]["token_logprobs"][0])  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        return False
