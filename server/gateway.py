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
from server.call import CHAT, COMPLETION, RESPONSES, Call, CallLimits, Kind, decode, parse
from server.config import ServeConfig
from server.errors import ApiError
from server.exchange import Exchange, Services
from server.literal import Literal
from server.pace import Pace
from server.sizing import size
from server.traces import Traces
from server.watch import Watch

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
        self, config: ServeConfig, limits: CallLimits, card: dict[str, Any], keys: Keys, literal: Literal,
        watch: Watch, traces: Traces | None,
    ) -> None:  # fmt: skip
        self._config, self._card, self._keys, self._literal, self._traces = config, card, keys, literal, traces
        self._watch, self._health, self._admission, self._metrics = watch, watch.health, watch.admission, watch.metrics
        self._services = Services(watch, watch.admission, watch.metrics, Pace(), limits, config.request_timeout_s, self._ended)
        self._max_body_bytes = config.max_body_bytes or 32 * limits.window + (1 << 20)
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
        return exchange

    async def plan(self, request: Request) -> Response:
        """Whether a request would fit and how long it would take, without sending it: the same body as for generation."""
        _, call = await self._accept(request, None)
        sized = await size(call, self._services.limits, None, self._watch.upstream, request.state.request_id)
        capacity, prompt_tokens = self._admission.capacity, sum(sized.prompt_tokens)
        assert capacity is not None
        kv_tokens = self._admission.reserve_tokens(call.n, sized.prompt_tokens, sized.max_tokens)
        first_s, last_s = self._services.pace.estimate_s(prompt_tokens, sized.max_tokens)
        return _json(
            {
                "object": "plan",
                "fits": kv_tokens <= capacity.kv_tokens,
                "fits_now": kv_tokens <= capacity.kv_tokens - self._admission.reserved_tokens,
                "prompt_tokens": prompt_tokens,
                "max_tokens": sized.max_tokens,
                "window": self._services.limits.window,
                "beyond_measured": sized.beyond_measured,
                "kv_tokens": kv_tokens,
                "kv_tokens_free": capacity.kv_tokens - self._admission.reserved_tokens,
                "lane": "long" if max(sized.prompt_tokens) > capacity.long_tokens else "short",
                "requests_waiting": self._admission.waiting,
                "estimated_first_token_s": first_s,
                "estimated_last_token_s": last_s,
            }
        )

    async def _accept(self, request: Request, kind: Kind | None) -> tuple[Caller, Call]:
        """Everything that can be said of a request before it is counted."""
        caller = self._keys.identify(request.headers.get("authorization"))
        if refusal := self._health.refusal(self._config.drain_s if self._health.is_draining else _RETRY_AFTER_S):
            raise refusal
        caller.check_quota()
        body = await self._read_body(request)
        kind = kind or (CHAT if "messages" in decode(body) else COMPLETION)
        known = self._watch.parameters.get(kind.schema, frozenset())
        if kind is RESPONSES and not known:
            raise ApiError(404, "this engine has no /v1/responses", "not_found")
        return caller, self._literal.clean(parse(body, kind, self._services.limits, known, self._card["id"]))

    async def models(self, request: Request) -> Response:
        self._keys.identify(request.headers.get("authorization"))
        return await self.cards()

    async def cards(self) -> Response:
        return _json({"object": "list", "data": [self._card]})

    async def model(self, request: Request, name: str) -> Response:
        self._keys.identify(request.headers.get("authorization"))
        if name != self._card["id"]:
            raise ApiError(404, f"model {name[:100]!r} is not served here; use {self._card['id']!r}", "model_not_found")
        return _json(self._card)

    async def openapi(self, request: Request) -> Response:
        self._keys.identify(request.headers.get("authorization"))
        return _json(openapi.document(self._services.limits, self._watch.parameters, self._keys.are_required))

    async def live(self) -> Response:
        return _json({"status": "live"})

    async def ready(self) -> Response:
        return _json({"status": str(self._health.phase), "reason": self._health.reason}, 200 if self._health.is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        caller = self._keys.identify(request.headers.get("authorization"))
        if not caller.is_admin:
            raise ApiError(403, f"key '{caller.name}' may not read /metrics; set admin = true for it", "not_admin")
        return await self.scrape()

    async def dashboard(self) -> Response:
        """A page without data: it asks /metrics and /v1/models, with the key that its reader types."""
        return Response(_DASHBOARD.read_bytes(), headers=_DASHBOARD_HEADERS)

    async def scrape(self) -> Response:
        """Our metrics and the engine's in one answer, for whoever may see them."""
        engine_text = await self._watch.engine_metrics()
        for lane, waiting in zip(("short", "long"), self._admission.waiting_by_lane(), strict=True):
            self._metrics.waiting.labels(lane).set(waiting)
        self._metrics.in_flight.set(self.in_flight)
        self._metrics.reserved.set(self._admission.reserved_tokens)
        self._metrics.long_prefills.set(self._admission.long_prefills)
        return Response(self._metrics.render(engine_text), media_type="text/plain; version=0.0.4")

    def _ended(self, exchange: Exchange) -> None:
        self._exchanges.discard(exchange)
        route = exchange.call.kind.path
        self._metrics.requests.labels(exchange.caller.name, route, exchange.outcome).inc()
        fields = {
            "request_id": exchange.request_id,
            "key": exchange.caller.name,
            "route": route,
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
