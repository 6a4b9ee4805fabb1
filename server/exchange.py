"""One request's life: counted, admitted, sent to the engine, its answer passed on byte for byte, and always an end."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import NoReturn

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.admission import Ticket
from server.auth import Caller
from server.call import Call
from server.connection import Connection, UpstreamError
from server.errors import ApiError, deadline_exceeded, unavailable
from server.ledger import Need
from server.metrics import Metrics
from server.pace import Pace
from server.profiles import Profiles
from server.sizing import Sized
from server.traces import Trace
from server.watch import Watch

_LAST_WORDS_S = 1
_BYTES_PER_TOKEN = 16  # of a text, at most; where a token is longer, a full queue may refuse what it might have let in
_STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
_ERROR_EVENTS = (b'data: {"error"', b"event: error", b"event: response.failed")
_BEFORE_PREFILL = (b"event: response.created", b"event: response.in_progress")
_LAST_EVENTS = (b"data: [DONE]", b"event: response.completed", b"event: response.incomplete")


@dataclass(frozen=True)
class Services:
    """What every exchange shares. `timeout_s` is a request's deadline; `on_end` hears of each exchange's end."""

    profiles: Profiles
    metrics: Metrics
    pace: Pace
    timeout_s: float
    on_end: Callable[["Exchange"], None]


class Exchange(Response):
    """The answer to one generation request.

    It ends by itself, by its deadline, by the client's leaving or by `abort`; in each case the engine's work for it ends too.
    """

    def __init__(self, call: Call, caller: Caller, request_id: str, services: Services, trace: Trace | None) -> None:
        super().__init__()
        self.call, self.caller, self.request_id, self.trace = call, caller, request_id, trace
        self.outcome, self.status, self.events = "lost", 0, 0
        self.ttft_s: float | None = None
        self.sized: Sized | None = None
        self.profile, self.engine = "", ""
        self._services = services
        self._started_at = self._last_event_at = time.monotonic()
        self._work: asyncio.Task[None] | None = None
        self._abort_error: ApiError | None = None
        self._client_left = False

    @property
    def duration_s(self) -> float:
        return time.monotonic() - self._started_at

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._work = asyncio.current_task()
        watch = asyncio.create_task(self._watch_client(receive))
        try:
            await self._serve(send)
        except asyncio.CancelledError:
            if not self._client_left:
                raise
        finally:
            watch.cancel()
            self._work = None
            self._services.on_end(self)

    def abort(self, error: ApiError) -> None:
        """End now, telling the client why."""
        if self._work and not self._abort_error:
            self._abort_error = error
            self._work.cancel()

    async def _watch_client(self, receive: Receive) -> None:
        """End the work when the client leaves; after the last event that is no failure."""
        while (await receive())["type"] != "http.disconnect":
            pass
        if self._work:
            self._client_left = True
            if self.outcome != "ok":
                self.outcome = "client_left"
            self._work.cancel()

    async def _serve(self, send: Send) -> None:
        try:
            async with asyncio.timeout(self._services.timeout_s):
                await self._generate(send)
            return
        except ApiError as caught:
            error = caught
        except TimeoutError:
            error = deadline_exceeded(self._services.timeout_s)
        except UpstreamError:
            error = unavailable("the engine failed while it worked on this request; try again", "engine_failed")
        except asyncio.CancelledError:
            if not self._abort_error or self._client_left:
                raise
            error = self._abort_error
        self.outcome = error.code
        with contextlib.suppress(TimeoutError):  # a client that has stopped reading must not hold up its own end
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._fail(error, send)

    async def _generate(self, send: Send) -> None:
        if self.call.prompt_tokens is None:
            self._check_queue()
        pool, self.sized = await self._services.profiles.place(self.call, self.caller, self.request_id)
        self.profile = pool.profile
        need = Need(self.call.n, self.sized.prompt_tokens, self.sized.max_tokens)
        async with pool.admission.slot(need) as ticket:
            self.caller.check_quota()  # again: what this key had in flight while the request waited is paid for by now
            engine = pool.engine_of(ticket)
            self.engine = engine.name
            self._services.metrics.queue_wait.labels(self.profile, _lane(ticket)).observe(self.duration_s)
            try:
                onward = self.trace.headers if self.trace else {}
                asked = engine.upstream.ask("POST", self.call.kind.path, self.sized.payload, self.request_id, onward)
                with closing(await asked) as answer:
                    if self.call.stream and answer.status == 200:
                        await self._relay(answer, engine, ticket, send)
                    else:
                        await self._forward(answer, engine, ticket, send)
            except UpstreamError:
                engine.suspect()  # before the slot is free: the next in the queue must not run into the same engine
                raise
            finally:
                kv_token_seconds = ticket.tokens * ticket.held_s()
                self.caller.charge(kv_token_seconds)
                self._services.metrics.kv_token_seconds.labels(self.caller.name).inc(kv_token_seconds)

    def _check_queue(self) -> None:
        """Refuse a text by its bytes before an engine counts its tokens: a flood of long ones must not cost it that work.

        Raises:
            ApiError: 429, no queue has a place for it.
        """
        call, profiles = self.call, self._services.profiles
        tokens = len(call.body) // (_BYTES_PER_TOKEN * call.prompts)
        least = Need(call.n, (tokens,) * call.prompts, call.max_tokens or 1)
        pools = profiles.pools if profiles.short and tokens <= profiles.short.limit else (profiles.main,)
        refusals = [refusal for pool in pools if (refusal := pool.admission.refusal(least))]
        if len(refusals) == len(pools):
            raise refusals[0]

    async def _forward(self, answer: Connection, engine: Watch, ticket: Ticket, send: Send) -> None:
        body = await answer.read()
        if answer.status >= 500:
            await self._given_up(engine)
        engine.heard()
        if answer.status < 400:
            self._first_event(ticket)
        self.outcome = "ok" if answer.status < 400 else "refused_by_engine"
        content_type = answer.content_type or "application/json"
        await self._start(answer.status, {"content-type": content_type, "content-length": str(len(body))}, send)
        await send({"type": "http.response.body", "body": body})

    async def _relay(self, answer: Connection, engine: Watch, ticket: Ticket, send: Send) -> None:
        """Pass whole events on as they come. Bytes after an error or the last event are not passed on.

        The head goes with the first event: until then a failure has a status of its own, and a balancer may try elsewhere.
        """
        pending = b""
        while piece := await answer.piece():
            pending += piece
            end = pending.rfind(b"\n\n") + 2
            if end < 2:
                continue
            events, pending = pending[:end], pending[end:]
            if (cut := _end_of_error(events)) is not None:
                if not self.status:
                    await self._given_up(engine)
                self.outcome = "engine_error"
                engine.suspect()
                await send({"type": "http.response.body", "body": events[:cut]})
                return
            if not events.startswith(_BEFORE_PREFILL):
                self._count_event(ticket)
                engine.heard()
            if not self.status:
                await self._start(200, _STREAM_HEADERS, send)
            await send({"type": "http.response.body", "body": events, "more_body": True})
            if any(_starts(events, mark) for mark in _LAST_EVENTS):
                self.outcome = "ok"
                break
        if self.outcome != "ok":
            raise UpstreamError("the stream ended before its last event")
        with contextlib.suppress(UpstreamError):  # after its last event no failure may be told any more
            await answer.read()
        await send({"type": "http.response.body", "body": b""})

    @staticmethod
    async def _given_up(engine: Watch) -> NoReturn:
        """The engine failed at this request before the client was told anything.

        Raises:
            ApiError: 500, the engine lives.
            UpstreamError: it does not.
        """
        engine.suspect()
        if await engine.is_alive():
            message = "the engine gave this request up and goes on with others; the same request may fail again"
            raise ApiError(500, message, "engine_error")
        raise UpstreamError("the engine has died")

    async def _fail(self, error: ApiError, send: Send) -> None:
        if not self.status:
            body = error.body()
            await self._start(error.status, {**error.all_headers(), "content-length": str(len(body))}, send)
            await send({"type": "http.response.body", "body": body})
        elif self.call.stream:
            await send({"type": "http.response.body", "body": error.event()})

    async def _start(self, status: int, headers: dict[str, str], send: Send) -> None:
        self.status = status
        profiles = self._services.profiles
        if self.sized and self.sized.beyond_measured:
            headers = {**headers, "x-ard-beyond-measured": str(profiles.limits.measured)}
        if self.profile and profiles.short:
            headers = {**headers, "x-ard-profile": self.profile}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})

    def _first_event(self, ticket: Ticket) -> None:
        ticket.prefilled()
        self.ttft_s = self.duration_s
        if self.call.stream and self.sized:
            self._services.pace.saw_prefill(sum(self.sized.prompt_tokens), ticket.held_s())
        self._services.metrics.ttft.labels(self.profile, _lane(ticket)).observe(self.ttft_s)

    def _count_event(self, ticket: Ticket) -> None:
        now = time.monotonic()
        if self.events == 0:
            self._first_event(ticket)
        else:
            self._services.metrics.gap.observe(now - self._last_event_at)
            self._services.pace.saw_gap(now - self._last_event_at)
        self._last_event_at = now
        self.events += 1


def _lane(ticket: Ticket) -> str:
    return "long" if ticket.is_long else "short"


def _starts(events: bytes, mark: bytes) -> list[int]:
    """Where an event begins with `mark`: inside an event's JSON no newline stands unescaped."""
    found = events.find(b"\n" + mark)
    return [0] if events.startswith(mark) else [found + 1] if found >= 0 else []


def _end_of_error(events: bytes) -> int | None:
    """Where the first error event ends, or None."""
    starts = [at for mark in _ERROR_EVENTS for at in _starts(events, mark)]
    return events.find(b"\n\n", min(starts)) + 2 if starts else None
