"""Who may enter the engine now: a ledger of KV tokens, two lanes, and a queue with a length and a deadline."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server.errors import ApiError, bad_request

# A request at the head that waits for memory longer than this share of its deadline is no longer overtaken by short ones.
_OVERTAKE_SHARE = 0.5


@dataclass(frozen=True)
class Capacity:
    """What the engine holds: KV tokens in all, in blocks of `block_tokens`; prompts over `long_tokens` are long."""

    kv_tokens: int
    block_tokens: int
    long_tokens: int
    max_long_prefills: int


@dataclass(eq=False)
class Ticket:
    """One request's reservation. `prefilled` is to be called at its first token."""

    tokens: int
    is_long: bool
    admission: "Admission"
    asked_at: float
    granted: asyncio.Future[None]
    prefilling: bool = False
    granted_at: float = field(default=0.0)

    def prefilled(self) -> None:
        if self.prefilling:
            self.prefilling = False
            self.admission.long_prefills -= 1
            self.admission.grant()

    def held_s(self) -> float:
        """Seconds since the reservation was granted; 0 before that."""
        return time.monotonic() - self.granted_at if self.granted_at else 0.0


class Admission:
    """Keeps the reserved tokens within the engine's KV cache, so that the engine never has to preempt."""

    def __init__(self, queue_size: int, queue_timeout_s: float) -> None:
        self._queue_size = queue_size
        self._queue_timeout_s = queue_timeout_s
        self._lanes: tuple[deque[Ticket], deque[Ticket]] = (deque(), deque())
        self.capacity: Capacity | None = None
        self.is_open = False
        self.reserved_tokens = 0
        self.long_prefills = 0
        self.running = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(map(len, self._lanes))

    def waiting_by_lane(self) -> tuple[int, int]:
        """Requests in the queue: short ones, long ones."""
        return len(self._lanes[0]), len(self._lanes[1])

    def reserve_tokens(self, n: int, prompt_tokens: tuple[int, ...], max_tokens: int) -> int:
        """KV tokens of a request at its largest, in whole blocks: n sequences of each prompt."""
        assert self.capacity is not None
        block = self.capacity.block_tokens
        return n * sum(-(-(length + max_tokens) // block) * block for length in prompt_tokens)

    @asynccontextmanager
    async def slot(self, tokens: int, prompt_tokens: int) -> AsyncIterator[Ticket]:
        """Wait for `tokens` of KV memory and hold them for the length of the block.

        Raises:
            ApiError: 400 if they can never fit, 429 if the queue is full or the wait is over.
        """
        assert self.capacity is not None
        if tokens > self.capacity.kv_tokens:
            raise bad_request(
                f"the request needs {tokens} tokens of KV memory, the server has {self.capacity.kv_tokens}; "
                "lower n, max_tokens or the prompt",
                code="request_too_large",
            )
        is_long = prompt_tokens > self.capacity.long_tokens
        ticket = Ticket(tokens, is_long, self, time.monotonic(), asyncio.get_running_loop().create_future())
        self._lanes[is_long].append(ticket)
        try:
            await self._granted(ticket)
            yield ticket
        finally:
            self._leave(ticket)

    async def _granted(self, ticket: Ticket) -> None:
        self.grant()
        if not ticket.granted_at and self.waiting > self._queue_size:
            raise self._busy(f"{self._queue_size} requests are waiting already")
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await ticket.granted
        except TimeoutError:
            raise self._busy(f"no room within {self._queue_timeout_s:g} s") from None

    def _leave(self, ticket: Ticket) -> None:
        if ticket.granted_at:
            self.reserved_tokens -= ticket.tokens
            self.running -= 1
            ticket.prefilled()
        else:
            self._lanes[ticket.is_long].remove(ticket)
        self.grant()

    def open(self, capacity: Capacity) -> None:
        """Let requests into an engine that is ready."""
        self.capacity, self.is_open = capacity, True
        self.grant()

    def close(self) -> None:
        """Let nobody in; those who wait go on waiting."""
        self.is_open = False

    def grant(self) -> None:
        """Let in whoever fits, the oldest first; a short prompt may overtake a long one, but not for ever."""
        while (ticket := self._next()) is not None:
            self._lanes[ticket.is_long].popleft()
            self.reserved_tokens += ticket.tokens
            self.running += 1
            if ticket.is_long:
                ticket.prefilling = True
                self.long_prefills += 1
            ticket.granted_at = time.monotonic()
            if not ticket.granted.done():
                ticket.granted.set_result(None)

    def _next(self) -> Ticket | None:
        if self.capacity is None or not self.is_open:
            return None
        free_tokens = self.capacity.kv_tokens - self.reserved_tokens
        for ticket in sorted((lane[0] for lane in self._lanes if lane), key=lambda t: t.asked_at):
            if ticket.is_long and self.long_prefills >= self.capacity.max_long_prefills:
                continue
            if ticket.tokens <= free_tokens:
                return ticket
            if time.monotonic() - ticket.asked_at > _OVERTAKE_SHARE * self._queue_timeout_s:
                return None
        return None

    def _busy(self, why: str) -> ApiError:
        return ApiError(429, f"the server is full: {why}; try again later", "server_busy", retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> float:
        return min(30.0, 1.0 + self.waiting / max(1, self.running))
