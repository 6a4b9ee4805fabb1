"""Who may enter which engine now: one queue with two lanes, a length and a deadline, before the ledgers of its engines."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server.errors import ApiError, bad_request
from server.ledger import Capacity, Ledger, Need

# A request at the head that waits for room longer than this share of its deadline is no longer overtaken by short ones.
_OVERTAKE_SHARE = 0.5


@dataclass(frozen=True)
class Lanes:
    """Prompts over `long_tokens` are long; an engine reads at most `max_long_prefills` of them at once."""

    long_tokens: int
    max_long_prefills: int


@dataclass(eq=False)
class Ticket:
    """One request's reservation, `tokens` and `seats` of `ledger` once it is granted.

    `prefilled` is to be called at its first token.
    """

    need: Need
    is_long: bool
    admission: "Admission"
    asked_at: float
    granted: asyncio.Future[None]
    ledger: Ledger | None = None
    tokens: int = 0
    seats: int = 0
    prefilling: int = 0  # long prompts of it that are being read
    granted_at: float = field(default=0.0)

    def prefilled(self) -> None:
        if self.prefilling and self.ledger:
            self.ledger.long_prefills -= self.prefilling
            self.prefilling = 0
            self.admission.grant()

    def held_s(self) -> float:
        """Seconds since the reservation was granted; 0 before that."""
        return time.monotonic() - self.granted_at if self.granted_at else 0.0


class Admission:
    """Keeps what is reserved within each engine's KV cache and seats, so that none ever preempts or has a queue of its own."""

    def __init__(self, ledgers: Sequence[Ledger], lanes: Lanes, queue_size: int, queue_timeout_s: float) -> None:
        self.ledgers, self.lanes = tuple(ledgers), lanes
        self._queue_size = queue_size
        self._queue_timeout_s = queue_timeout_s
        self._queues: tuple[deque[Ticket], deque[Ticket]] = (deque(), deque())

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(map(len, self._queues))

    def waiting_by_lane(self) -> tuple[int, int]:
        """Requests in the queue: short ones, long ones."""
        return len(self._queues[0]), len(self._queues[1])

    def is_long(self, need: Need) -> bool:
        """Whether a request takes the long lane."""
        return self._long_prompts(need) > 0

    def _long_prompts(self, need: Need) -> int:
        """Places of the long lane that a request takes; one with more long prompts than there are takes them all."""
        return min(sum(length > self.lanes.long_tokens for length in need.prompt_tokens), self.lanes.max_long_prefills)

    def roomiest(self) -> Ledger:
        """The engine with the largest KV cache."""
        return max(self.ledgers, key=lambda ledger: ledger.kv_tokens)

    def refusal(self, least: Need) -> ApiError | None:
        """The answer to a request of this size or more that could neither enter now nor wait, or None."""
        is_long = self.is_long(least)
        enters = not self._queues[is_long] and any(ledger.fits(least) for ledger in self._doors(least))
        return None if enters or self.waiting < self._queue_size else self._full()

    @asynccontextmanager
    async def slot(self, need: Need) -> AsyncIterator[Ticket]:
        """Wait until an engine has the KV memory and the seats, and hold them for the length of the block.

        Raises:
            ApiError: 400 if it can never fit, 429 if the queue is full or the wait is over.
        """
        largest = self.roomiest()
        if (tokens := largest.cost(need)) > largest.kv_tokens:
            raise bad_request(
                f"the request needs {tokens} tokens of KV memory, the server has {largest.kv_tokens}; "
                "lower n, max_tokens or the prompt",
                code="request_too_large",
            )
        is_long = self.is_long(need)
        ticket = Ticket(need, is_long, self, time.monotonic(), asyncio.get_running_loop().create_future())
        self._queues[is_long].append(ticket)
        try:
            await self._granted(ticket)
            yield ticket
        finally:
            self._leave(ticket)

    async def _granted(self, ticket: Ticket) -> None:
        self.grant()
        if ticket.ledger:
            return
        if self.waiting > self._queue_size:
            raise self._full()
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await ticket.granted
        except TimeoutError:
            raise self._busy(f"no room within {self._queue_timeout_s:g} s") from None

    def _leave(self, ticket: Ticket) -> None:
        if ticket.ledger:
            ticket.ledger.reserved_tokens -= ticket.tokens
            ticket.ledger.reserved_seats -= ticket.seats
            ticket.ledger.running -= 1
            ticket.prefilled()
        else:
            self._queues[ticket.is_long].remove(ticket)
        self.grant()

    def open(self, ledger: Ledger, capacity: Capacity) -> None:
        """Let requests into an engine that has just proved to be ready."""
        ledger.capacity, ledger.is_open, ledger.is_ready = capacity, True, True
        self.grant()

    def grant(self) -> None:
        """Let in whoever fits, the oldest first; a short prompt may overtake a long one, but not for ever."""
        while (pair := self._next()) is not None:
            ticket, ledger = pair
            self._queues[ticket.is_long].popleft()
            ticket.ledger, ticket.tokens, ticket.seats = ledger, ledger.cost(ticket.need), ledger.seats_of(ticket.need)
            ledger.reserved_tokens += ticket.tokens
            ledger.reserved_seats += ticket.seats
            ledger.running += 1
            ticket.prefilling = self._long_prompts(ticket.need)
            ledger.long_prefills += ticket.prefilling
            ticket.granted_at = time.monotonic()
            if not ticket.granted.done():
                ticket.granted.set_result(None)

    def _next(self) -> tuple[Ticket, Ledger] | None:
        """The next to enter, and the engine with the most free memory."""
        for ticket in sorted((queue[0] for queue in self._queues if queue), key=lambda t: t.asked_at):
            doors = self._doors(ticket.need)
            if fitting := [ledger for ledger in doors if ledger.fits(ticket.need)]:
                return ticket, max(fitting, key=lambda ledger: ledger.free_tokens)
            if doors and time.monotonic() - ticket.asked_at > _OVERTAKE_SHARE * self._queue_timeout_s:
                return None
        return None

    def _doors(self, need: Need) -> list[Ledger]:
        """Engines that take such a prompt if they have the room. One that hangs gets new work only if no other runs."""
        doors = [ledger for ledger in self.ledgers if ledger.is_open]
        doors = [ledger for ledger in doors if ledger.is_ready] or doors
        places = self._long_prompts(need)
        return [ledger for ledger in doors if not places or ledger.long_prefills + places <= self.lanes.max_long_prefills]

    def _full(self) -> ApiError:
        return self._busy(f"{self._queue_size} requests are waiting already")

    def _busy(self, why: str) -> ApiError:
        return ApiError(429, f"the server is full: {why}; try again later", "server_busy", retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> float:
        return min(30.0, 1.0 + self.waiting / max(1, sum(ledger.running for ledger in self.ledgers)))
