"""The routes that exist, and what becomes of whatever else happens on the way to them."""

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.call import KINDS, Kind
from server.connection import UpstreamError
from server.errors import ApiError, unavailable
from server.gateway import Gateway

log = logging.getLogger("server")

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_DISCARD_S = 1


def build_app(gateway: Gateway) -> FastAPI:
    """The application. A route that is not here does not exist, with or without a key.

    Generation is listed for its method and its place in the list; `FastLane` answers it before FastAPI sees it.
    """
    app = FastAPI(title="ard serve", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.gateway = gateway
    app.get("/livez")(gateway.live)
    app.get("/readyz")(gateway.ready)
    app.get("/metrics")(gateway.metrics)
    app.get("/dashboard", response_class=Response)(gateway.dashboard)
    app.get("/openapi.json")(gateway.openapi)
    app.post("/v1/plan", response_class=Response)(gateway.plan)
    app.get("/v1/models")(gateway.models)
    app.get("/v1/models/{name:path}")(gateway.model)
    for kind in KINDS:
        app.post(kind.path, response_class=Response)(_endpoint(gateway, kind))
    app.exception_handler(ApiError)(_api_error)
    app.exception_handler(UpstreamError)(_engine_failed)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(ClientDisconnect)(_client_left)
    app.add_middleware(FastLane, gateway=gateway)
    app.add_middleware(RequestIds)
    return app


def build_metrics_app(gateway: Gateway) -> FastAPI:
    """What an operator looks at, without a key: for a port that only the operator's network reaches."""
    app = FastAPI(title="ard serve metrics", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.get("/metrics")(gateway.scrape)
    app.get("/dashboard", response_class=Response)(gateway.dashboard)
    app.get("/v1/models")(gateway.cards)
    app.get("/livez")(gateway.live)
    app.get("/readyz")(gateway.ready)
    return app


class RequestIds:
    """Gives each request an id, the client's own where it is sane, and each answer the id of its request, a bug's too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("%s: a bug of the gateway", request_id)
            if not has_begun:  # an answer that has is cut off by uvicorn, since it has no end
                error = ApiError(500, "internal error; the request id leads to its log", "internal_error")
                answer = await _api_error(Request(scope), error)
                await answer(scope, receive, send_with_id)


class FastLane:
    """Answers generation without FastAPI's routing, which would take a third of what such a request costs."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway
        self._kinds = {kind.path: kind for kind in KINDS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = self._kinds.get(scope["path"]) if scope["method"] == "POST" else None
        if kind is None:
            return await self._app(scope, receive, send)
        scope["route"] = kind  # as FastAPI's routing would, for the log
        request = Request(scope, receive)
        try:
            answer: Response = await self._gateway.generate(request, kind)
        except ApiError as error:
            answer = await _api_error(request, error)
        except ClientDisconnect as error:
            answer = await _client_left(request, error)
        return await answer(scope, receive, send)


def _endpoint(gateway: Gateway, kind: Kind) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await gateway.generate(request, kind)

    return endpoint


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    _record(request, error.status, error.code)
    kind = _Lingering if error.status in (408, 413) else Response
    return kind(error.body(), error.status, error.all_headers())


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
    _record(request, 0, "client_left")
    return Response(status_code=499)


def _record(request: Request, status: int, outcome: str) -> None:
    """By the route's own path: each that a client makes up would be a label of its own in /metrics."""
    request.app.state.gateway.record(request, getattr(request.scope.get("route"), "path", "-"), status, outcome)


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
