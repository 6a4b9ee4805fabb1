"""What a request meets: its key, its quota, the body limit, its parameters, and then an exchange with the engine."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from server import openapi
from server.auth import Caller, Keys
from server.call import CHAT, COMPLETION, RESPONSES, Call, Kind, decode, parse
from server.config import ServeConfig
from server.errors import ApiError, deadline_exceeded
from server.exchange import Exchange, Services
from server.ledger import Need
from server.literal import Literal
from server.metrics import Metrics
from server.pace import Pace
from server.profiles import Profiles
from server.traces import Traces

access_log = logging.getLogger("server.access")

_RETRY_AFTER_S = 5
_DASHBOARD = Path(__file__).with_name("dashboard.html")
_DASHBOARD_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
}


class Gateway:
    """Everything a request meets, in the order in which it meets it."""

    def __init__(
        self, config: ServeConfig, profiles: Profiles, card: dict[str, Any], keys: Keys, literal: Literal,
        metrics: Metrics, traces: Traces | None,
    ) -> None:  # fmt: skip
        self._config, self._card, self._keys, self._literal, self._traces = config, card, keys, literal, traces
        self._profiles, self._limits, self._metrics = profiles, profiles.limits, metrics
        self._services = Services(profiles, metrics, Pace(), config.request_timeout_s, self._ended)
        self._max_body_bytes = config.max_body_bytes or 32 * self._limits.window + (1 << 20)
        self._exchanges: set[Exchange] = set()

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._exchanges)

    def abort_all(self, error: ApiError) -> None:
        """End every request in flight."""
        for exchange in tuple(self._exchanges):
            exchange.abort(error)

    async def generate(self, request: Request, kind: Kind) -> Response:
        caller, call = await self._accept(request, kind)
        trace = self._traces.begin(f"POST {kind.path}", request.headers) if self._traces else None
        exchange = Exchange(call, caller, request.state.request_id, self._services, trace)
        self._exchanges.add(exchange)
        request.state.exchange = exchange
        return exchange

    async def plan(self, request: Request) -> Response:
        """Whether a request would fit and how long it would take, without sending it: the same body as for generation."""
        caller, call = await self._accept(request, None)
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                pool, sized = await self._profiles.place(call, caller, request.state.request_id, remember=False)
        except TimeoutError:
            raise deadline_exceeded(self._config.request_timeout_s) from None
        prompt_tokens, need = sum(sized.prompt_tokens), Need(call.n, sized.prompt_tokens, sized.max_tokens)
        admission, largest = pool.admission, pool.admission.roomiest()
        free_tokens = max(ledger.free_tokens for ledger in admission.ledgers)
        first_s, last_s = self._services.pace.estimate_s(prompt_tokens, sized.max_tokens)
        self.record(request, "/v1/plan", 200, "ok")
        return _json(
            {
                "object": "plan",
                "fits": largest.cost(need) <= largest.kv_tokens,
                "fits_now": any(ledger.fits(need) for ledger in admission.ledgers),
                "profile": pool.profile,
                "prompt_tokens": prompt_tokens,
                "max_tokens": sized.max_tokens,
                "window": self._limits.window,
                "beyond_measured": sized.beyond_measured,
                "kv_tokens": largest.cost(need),
                "kv_tokens_free": free_tokens,
                "lane": "long" if admission.is_long(need) else "short",
                "requests_waiting": admission.waiting,
                "estimated_first_token_s": first_s,
                "estimated_last_token_s": last_s,
            }
        )

    def record(self, request: Request, route: str, status: int, outcome: str) -> None:
        """Count and log a request that was refused, planned or left before it became an exchange, which does so itself."""
        if hasattr(request.state, "exchange"):
            return
        key = getattr(request.state, "key", "-")
        self._metrics.requests.labels(key, route, "", outcome).inc()
        fields = {"request_id": request.state.request_id, "key": key, "route": route, "status": status, "outcome": outcome}
        access_log.info(json.dumps(fields | {"client": request.client and request.client.host}))

    def _identify(self, request: Request) -> Caller:
        """Who asks; raises ApiError 401."""
        caller = self._keys.identify(request.headers.get("authorization"))
        request.state.key = caller.name
        return caller

    async def _accept(self, request: Request, kind: Kind | None) -> tuple[Caller, Call]:
        """Everything that can be said of a request before it is counted."""
        caller = self._identify(request)
        self._check_health()
        caller.check_quota()
        body = await self._read_body(request)
        self._check_health()  # again: who came in now after a SIGTERM would be cut off without a word
        kind = kind or (CHAT if "messages" in decode(body) else COMPLETION)
        known = self._profiles.main.parameters.get(kind.schema, frozenset())
        if kind is RESPONSES and not known:
            raise ApiError(404, "this engine has no /v1/responses", "not_found")
        return caller, self._literal.clean(parse(body, kind, self._limits, known, self._card["id"]))

    def _check_health(self) -> None:
        health = self._profiles.main.health
        if refusal := health.refusal(self._config.drain_s if health.is_draining else _RETRY_AFTER_S):
            raise refusal

    async def models(self, request: Request) -> Response:
        self._identify(request)
        return await self.cards()

    async def cards(self) -> Response:
        return _json({"object": "list", "data": [self._card]})

    async def model(self, request: Request, name: str) -> Response:
        self._identify(request)
        if name != self._card["id"]:
            raise ApiError(404, f"model {name[:100]!r} is not served here; use {self._card['id']!r}", "model_not_found")
        return _json(self._card)

    async def openapi(self, request: Request) -> Response:
        self._identify(request)
        return _json(openapi.document(self._limits, self._profiles.main.parameters, self._keys.are_required))

    async def live(self) -> Response:
        return _json({"status": "live"})

    async def ready(self) -> Response:
        health = self._profiles.main.health
        return _json({"status": str(health.phase), "reason": health.reason}, 200 if health.is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        caller = self._identify(request)
        if not caller.is_admin:
            raise ApiError(403, f"key '{caller.name}' may not read /metrics; set admin = true for it", "not_admin")
        return await self.scrape()

    async def dashboard(self) -> Response:
        """A page without data: it asks /metrics and /v1/models, with the key that its reader types."""
        return Response(_DASHBOARD.read_bytes(), headers=_DASHBOARD_HEADERS)

    async def scrape(self) -> Response:
        """Our metrics and the engine's in one answer, for whoever may see them."""
        watches = [watch for pool in self._profiles.pools for watch in pool.watches]
        texts = await asyncio.gather(*(watch.engine_metrics() for watch in watches))
        for pool in self._profiles.pools:
            for lane, waiting in zip(("short", "long"), pool.admission.waiting_by_lane(), strict=True):
                self._metrics.waiting.labels(pool.profile, lane).set(waiting)
        self._metrics.in_flight.set(self.in_flight)
        for watch in watches:
            self._metrics.reserved.labels(watch.name).set(watch.ledger.reserved_tokens)
            self._metrics.reserved_seats.labels(watch.name).set(watch.ledger.reserved_seats)
            self._metrics.long_prefills.labels(watch.name).set(watch.ledger.long_prefills)
        text = self._metrics.render({watch.name: text for watch, text in zip(watches, texts, strict=True)})
        return Response(text, media_type="text/plain; version=0.0.4")

    def _ended(self, exchange: Exchange) -> None:
        self._exchanges.discard(exchange)
        route = exchange.call.kind.path
        self._metrics.requests.labels(exchange.caller.name, route, exchange.profile, exchange.outcome).inc()
        fields = {
            "request_id": exchange.request_id,
            "key": exchange.caller.name,
            "route": route,
            "profile": exchange.profile,
            "engine": exchange.engine,
            "status": exchange.status,
            "outcome": exchange.outcome,
            "stream": exchange.call.stream,
            "prompt_tokens": sum(exchange.sized.prompt_tokens) if exchange.sized else None,
            "max_tokens": exchange.sized.max_tokens if exchange.sized else None,
            "events": exchange.events,
            "ttft_s": exchange.ttft_s and round(exchange.ttft_s, 4),
            "duration_s": round(exchange.duration_s, 4),
        }
        access_log.info(json.dumps(fields))
        if exchange.trace:
            exchange.trace.end(fields)

    async def _read_body(self, request: Request) -> bytes:
        too_large = ApiError(
            413, f"the body is over {self._max_body_bytes} bytes; send a shorter prompt", "body_too_large",
            headers={"connection": "close"},
        )  # fmt: skip
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._max_body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self._max_body_bytes:
                        raise too_large
        except TimeoutError:
            message = f"the body did not arrive within {self._config.body_timeout_s:g} s"
            raise ApiError(408, message, "body_timeout", headers={"connection": "close"}) from None
        return bytes(body)


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")
