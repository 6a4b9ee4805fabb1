"""The HTTP face: an allow list of routes, keys, body limits, and an exchange for each generation request."""

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.admission import Admission
from server.auth import Caller, Keys
from server.call import CHAT, COMPLETION, KINDS, RESPONSES, Call, CallLimits, Kind, decode, parse
from server.config import ServeConfig
from server.errors import ApiError, unavailable
from server.exchange import Exchange, Services
from server.health import Health
from server.literal import Literal
from server.metrics import Metrics
from server.pace import Pace
from server.sizing import size
from server.supervisor import Supervisor
from server.upstream import UpstreamError

access_log = logging.getLogger("server.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_DISCARD_S = 1
_RETRY_AFTER_S = 5


class Gateway:
    """Everything a request meets, in the order in which it meets it."""

    def __init__(
        self, config: ServeConfig, limits: CallLimits, card: dict[str, Any], keys: Keys, literal: Literal,
        supervisor: Supervisor, health: Health, admission: Admission, metrics: Metrics,
    ) -> None:  # fmt: skip
        self._config, self._card, self._keys, self._literal = config, card, keys, literal
        self._supervisor, self._health, self._admission, self._metrics = supervisor, health, admission, metrics
        self._services = Services(supervisor, admission, metrics, Pace(), limits, config.request_timeout_s, self._ended)
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
        exchange = Exchange(call, caller, request.state.request_id, self._services, {})
        self._exchanges.add(exchange)
        return exchange

    async def plan(self, request: Request) -> Response:
        """Whether a request would fit and how long it would take, without sending it: the same body as for generation."""
        _, call = await self._accept(request, None)
        sized = await size(call, self._services.limits, None, self._supervisor.upstream, request.state.request_id)
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
        known = self._supervisor.parameters.get(kind.schema, frozenset())
        if kind is RESPONSES and not known:
            raise ApiError(404, "this engine has no /v1/responses", "not_found")
        return caller, self._literal.clean(parse(body, kind, self._services.limits, known, self._card["id"]))

    async def models(self, request: Request) -> Response:
        self._keys.identify(request.headers.get("authorization"))
        return _json({"object": "list", "data": [self._card]})

    async def model(self, request: Request, name: str) -> Response:
        self._keys.identify(request.headers.get("authorization"))
        if name != self._card["id"]:
            raise ApiError(404, f"model {name[:100]!r} is not served here; use {self._card['id']!r}", "model_not_found")
        return _json(self._card)

    async def live(self) -> Response:
        return _json({"status": "live"})

    async def ready(self) -> Response:
        return _json({"status": str(self._health.phase), "reason": self._health.reason}, 200 if self._health.is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        caller = self._keys.identify(request.headers.get("authorization"))
        if not caller.is_admin:
            raise ApiError(403, f"key '{caller.name}' may not read /metrics; set admin = true for it", "not_admin")
        return await self.scrape()

    async def scrape(self) -> Response:
        """Our metrics and the engine's in one answer, for whoever may see them."""
        engine_text = await self._supervisor.engine_metrics()
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
        access_log.info(
            json.dumps(
                {
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
            )
        )

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


def build_app(gateway: Gateway) -> FastAPI:
    """The application. A route that is not here does not exist, with or without a key."""
    app = FastAPI(title="ard serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/livez")(gateway.live)
    app.get("/readyz")(gateway.ready)
    app.get("/metrics")(gateway.metrics)
    app.post("/v1/plan", response_class=Response)(gateway.plan)
    app.get("/v1/models")(gateway.models)
    app.get("/v1/models/{name:path}")(gateway.model)
    for kind in KINDS:
        app.post(kind.path, response_class=Response)(_endpoint(gateway, kind))
    app.exception_handler(ApiError)(_api_error)
    app.exception_handler(UpstreamError)(_engine_failed)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(ClientDisconnect)(_client_left)
    app.exception_handler(Exception)(_bug)
    app.add_middleware(RequestIds)
    return app


def build_metrics_app(gateway: Gateway) -> FastAPI:
    """/metrics and the probes alone, without a key: for a port that only the operator's network reaches."""
    app = FastAPI(title="ard serve metrics", docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/metrics")(gateway.scrape)
    app.get("/livez")(gateway.live)
    app.get("/readyz")(gateway.ready)
    return app


class RequestIds:
    """Gives each request an id, the client's own where it is sane."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
            request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
            scope.setdefault("state", {})["request_id"] = request_id
        await self._app(scope, receive, send)


def _endpoint(gateway: Gateway, kind: Kind) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await gateway.generate(request, kind)

    return endpoint


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"x-request-id": request.state.request_id, **error.all_headers()}
    if error.status in (408, 413):
        return _Lingering(error.body(), error.status, headers)
    return Response(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{request.method} is not allowed on {path}; use {allowed}"
        return await _api_error(request, ApiError(405, message, "method_not_allowed", headers={"allow": allowed}))
    return await _api_error(request, ApiError(error.status_code, f"there is no {path} here", "not_found"))


async def _engine_failed(request: Request, error: Exception) -> Response:
    return await _api_error(request, unavailable("the engine did not answer; try again", "engine_failed"))


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _bug(request: Request, error: Exception) -> Response:
    return await _api_error(request, ApiError(500, "internal error; the request id leads to its log", "internal_error"))


class _Lingering(Response):
    """An answer that comes before the body has been read.

    Closing at once would reset the connection, and the client might never see the answer; so what still comes in is thrown
    away for a moment first.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(_DISCARD_S):
                while (await receive()).get("more_body"):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})
