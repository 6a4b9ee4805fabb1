"""The ledger of KV tokens, the two lanes and the queue, without any HTTP."""

import asyncio

import pytest

from server.admission import Admission, Capacity, Ticket
from server.errors import ApiError

ROOM = Capacity(kv_tokens=1000, block_tokens=10, long_tokens=100, max_long_prefills=2)


def admission(queue_size: int = 10, queue_timeout_s: float = 5.0) -> Admission:
    made = Admission(queue_size, queue_timeout_s)
    made.open(ROOM)
    return made


class Guest:
    """A request that enters in the background and stays until told to go."""

    def __init__(self, door: Admission, tokens: int, prompt_tokens: int = 1) -> None:
        self.inside, self._go = asyncio.Event(), asyncio.Event()
        self.ticket: Ticket | None = None
        self.task = asyncio.create_task(self._visit(door, tokens, prompt_tokens))

    async def _visit(self, door: Admission, tokens: int, prompt_tokens: int) -> None:
        async with door.slot(tokens, prompt_tokens) as self.ticket:
            self.inside.set()
            await self._go.wait()

    async def leave(self) -> None:
        self._go.set()
        await self.task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_reservation_is_whole_blocks_of_every_sequence() -> None:
    assert admission().reserve_tokens(n=1, prompt_tokens=(11,), max_tokens=8) == 20
    assert admission().reserve_tokens(n=3, prompt_tokens=(11,), max_tokens=10) == 3 * 30
    assert admission().reserve_tokens(n=2, prompt_tokens=(1, 15), max_tokens=5) == 2 * (10 + 20)


async def test_reservations_never_exceed_the_cache_and_come_back() -> None:
    door = admission()
    first, second = Guest(door, 600), Guest(door, 600)
    await settle()
    assert (first.inside.is_set(), second.inside.is_set()) == (True, False)
    assert (door.reserved_tokens, door.waiting) == (600, 1)
    await first.leave()
    await settle()
    assert second.inside.is_set()
    await second.leave()
    assert (door.reserved_tokens, door.running, door.waiting) == (0, 0, 0)


async def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    with pytest.raises(ApiError, match=r"1001 tokens.*1000") as caught:
        async with admission().slot(1001, 1):
            pass
    assert caught.value.status == 400


@pytest.mark.fault("S8")
async def test_a_full_queue_and_a_long_wait_are_429() -> None:
    door = admission(queue_size=1, queue_timeout_s=0.1)
    inside = Guest(door, 1000)
    await settle()
    waiting = Guest(door, 10)
    await settle()
    with pytest.raises(ApiError, match="1 requests are waiting") as full:
        async with door.slot(10, 1):
            pass
    with pytest.raises(ApiError, match=r"within 0\.1 s") as late:
        await waiting.task
    assert (full.value.status, late.value.status) == (429, 429)
    assert full.value.retry_after_s
    assert door.waiting == 0
    await inside.leave()


async def test_one_who_stops_waiting_leaves_no_trace() -> None:
    door = admission()
    inside, waiting, behind = Guest(door, 900), Guest(door, 200), Guest(door, 300)
    await settle()
    waiting.task.cancel()
    await inside.leave()
    await settle()
    assert behind.inside.is_set()
    assert door.reserved_tokens == 300


async def test_long_prompts_leave_room_in_the_batch_for_short_ones() -> None:
    door = admission()
    longs = [Guest(door, 150, prompt_tokens=140) for _ in range(3)]
    short = Guest(door, 50, prompt_tokens=5)
    await settle()
    assert [guest.inside.is_set() for guest in longs] == [True, True, False]
    assert short.inside.is_set()
    assert longs[0].ticket
    longs[0].ticket.prefilled()  # its first token is out: it decodes now and takes no share of the batch
    longs[0].ticket.prefilled()
    await settle()
    assert longs[2].inside.is_set()
    assert door.long_prefills == 2
    for guest in longs:
        await guest.leave()
    assert door.long_prefills == 0


@pytest.mark.timing
async def test_short_requests_overtake_a_blocked_long_one_but_not_for_ever() -> None:
    door = admission(queue_timeout_s=0.4)
    inside = Guest(door, 500, prompt_tokens=5)
    await settle()
    big = Guest(door, 800, prompt_tokens=700)
    early = Guest(door, 300, prompt_tokens=5)
    await settle()
    assert early.inside.is_set()
    await early.leave()
    await asyncio.sleep(0.25)  # the long one has waited more than half of its time
    late = Guest(door, 300, prompt_tokens=5)
    await settle()
    assert not late.inside.is_set()
    await inside.leave()
    await settle()
    assert big.inside.is_set()
    await big.leave()
    await late.leave()


async def test_a_closed_door_keeps_the_queue() -> None:
    door = admission()
    door.close()
    waiting = Guest(door, 10)
    await settle()
    assert not waiting.inside.is_set()
    door.open(ROOM)
    await settle()
    assert waiting.inside.is_set()
    await waiting.leave()
