"""The ledger of KV tokens and seats, the two lanes and the queue, without any HTTP."""

import asyncio
from dataclasses import replace

import pytest

from server.admission import Admission, Lanes, Ticket
from server.errors import ApiError
from server.ledger import Capacity, Ledger, Need

ROOM = Capacity(kv_tokens=1000, block_tokens=10)


class Door(Admission):
    """The queue before engines with 1,000 tokens each, asked by the tokens of a whole request."""

    def __init__(self, queue_size: int = 10, queue_timeout_s: float = 5.0, engines: int = 1, seats: int | None = None) -> None:
        lanes = Lanes(long_tokens=100, max_long_prefills=2)
        super().__init__([Ledger() for _ in range(engines)], lanes, queue_size, queue_timeout_s)
        for ledger in self.ledgers:
            self.open(ledger, replace(ROOM, seats=seats))

    @property
    def ledger(self) -> Ledger:
        return self.ledgers[0]


def need(tokens: int, prompt_tokens: int = 1, n: int = 1) -> Need:
    return Need(n, (prompt_tokens,), tokens - prompt_tokens)


class Guest:
    """A request that enters in the background and stays until told to go."""

    def __init__(self, door: Door, tokens: int, prompt_tokens: int = 1, n: int = 1) -> None:
        self.inside, self._go = asyncio.Event(), asyncio.Event()
        self.ticket: Ticket | None = None
        self.task = asyncio.create_task(self._visit(door, need(tokens, prompt_tokens, n)))

    async def _visit(self, door: Door, what: Need) -> None:
        async with door.slot(what) as self.ticket:
            self.inside.set()
            await self._go.wait()

    async def leave(self) -> None:
        self._go.set()
        await self.task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_reservation_is_whole_blocks_of_every_sequence() -> None:
    assert Need(n=1, prompt_tokens=(11,), max_tokens=8).kv_tokens(ROOM) == 20
    assert Need(n=3, prompt_tokens=(11,), max_tokens=10).kv_tokens(ROOM) == 3 * 30
    assert Need(n=2, prompt_tokens=(1, 15), max_tokens=5).kv_tokens(ROOM) == 2 * (10 + 20)


async def test_reservations_never_exceed_the_cache_and_come_back() -> None:
    door = Door()
    first, second = Guest(door, 600), Guest(door, 600)
    await settle()
    assert (first.inside.is_set(), second.inside.is_set()) == (True, False)
    assert (door.ledger.reserved_tokens, door.waiting) == (600, 1)
    await first.leave()
    await settle()
    assert second.inside.is_set()
    await second.leave()
    assert (door.ledger.reserved_tokens, door.ledger.running, door.waiting) == (0, 0, 0)


async def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    with pytest.raises(ApiError, match=r"1010 tokens.*1000") as caught:
        async with Door().slot(need(1001)):
            pass
    assert caught.value.status == 400


@pytest.mark.fault("S8")
async def test_a_full_queue_and_a_long_wait_are_429() -> None:
    door = Door(queue_size=1, queue_timeout_s=0.1)
    inside = Guest(door, 1000)
    await settle()
    waiting = Guest(door, 10)
    await settle()
    with pytest.raises(ApiError, match="1 requests are waiting") as full:
        async with door.slot(need(10)):
            pass
    with pytest.raises(ApiError, match=r"within 0\.1 s") as late:
        await waiting.task
    assert (full.value.status, late.value.status) == (429, 429)
    assert full.value.retry_after_s
    assert door.waiting == 0
    await inside.leave()


@pytest.mark.fault("S8")
async def test_a_full_queue_refuses_at_once_what_could_not_enter() -> None:
    door = Door(queue_size=1)
    assert door.refusal(need(2000, prompt_tokens=1500)) is None
    longs = [Guest(door, 150, prompt_tokens=140) for _ in range(3)]
    await settle()
    assert door.waiting == 1
    refusal = door.refusal(need(150, prompt_tokens=140))
    assert refusal
    assert refusal.status == 429
    assert door.refusal(need(700)) is None  # a short one may overtake, where it fits
    assert door.refusal(need(710))
    for guest in longs:
        await guest.leave()


async def test_one_who_stops_waiting_leaves_no_trace() -> None:
    door = Door()
    inside, waiting, behind = Guest(door, 900), Guest(door, 200), Guest(door, 300)
    await settle()
    waiting.task.cancel()
    await inside.leave()
    await settle()
    assert behind.inside.is_set()
    assert door.ledger.reserved_tokens == 300


async def test_long_prompts_leave_room_in_the_batch_for_short_ones() -> None:
    door = Door()
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
    assert door.ledger.long_prefills == 2
    for guest in longs:
        await guest.leave()
    assert door.ledger.long_prefills == 0


@pytest.mark.timing
async def test_each_long_prompt_of_a_request_takes_a_place() -> None:
    door = Door()
    several = door.slot(Need(1, (101, 101, 1), 1))
    async with door.slot(Need(1, (101,), 1)) as first:
        waits = asyncio.create_task(several.__aenter__())
        await settle()
        assert (waits.done(), door.ledger.long_prefills) == (False, 1)
        first.prefilled()
        ticket = await waits
        assert door.ledger.long_prefills == 2
        ticket.prefilled()
        assert door.ledger.long_prefills == 0
        async with door.slot(Need(1, (101,) * 3, 1)):  # more than there are places: it takes them all
            assert door.ledger.long_prefills == 2
    await several.__aexit__(None, None, None)
    assert (door.ledger.long_prefills, door.ledger.reserved_tokens) == (0, 0)


async def test_short_requests_overtake_a_blocked_long_one_but_not_for_ever() -> None:
    door = Door(queue_timeout_s=0.4)
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
    door = Door()
    door.ledger.close()
    waiting = Guest(door, 10)
    await settle()
    assert not waiting.inside.is_set()
    door.open(door.ledger, ROOM)
    await settle()
    assert waiting.inside.is_set()
    await waiting.leave()


async def test_of_several_engines_the_one_with_most_room_gets_the_next_request() -> None:
    door = Door(engines=2)
    guests = []
    for tokens in (600, 300, 300, 400):
        guests.append(Guest(door, tokens))
        await settle()
    assert [door.ledgers.index(guest.ticket.ledger) for guest in guests if guest.ticket and guest.ticket.ledger] == [0, 1, 1, 0]
    assert [ledger.reserved_tokens for ledger in door.ledgers] == [1000, 600]
    for guest in guests:
        await guest.leave()
    assert [ledger.reserved_tokens for ledger in door.ledgers] == [0, 0]


async def test_an_engine_that_is_gone_or_silent_gets_nothing_while_another_is_ready() -> None:
    door = Door(engines=2)
    door.ledgers[0].is_ready = False
    guests = [Guest(door, 600), Guest(door, 600)]
    await settle()
    assert [guest.inside.is_set() for guest in guests] == [True, False]
    door.ledgers[1].close()
    await guests[0].leave()  # what it held is gone with its engine; the silent one is all that is left
    await settle()
    assert guests[1].ticket
    assert guests[1].ticket.ledger is door.ledgers[0]
    await guests[1].leave()


async def test_each_engine_reads_so_many_long_prompts_of_its_own() -> None:
    door = Door(engines=2)
    longs = [Guest(door, 150, prompt_tokens=140) for _ in range(5)]
    await settle()
    assert [guest.inside.is_set() for guest in longs] == [True] * 4 + [False]
    assert [ledger.long_prefills for ledger in door.ledgers] == [2, 2]
    for guest in longs:
        await guest.leave()


def test_a_sequence_is_each_prompt_n_times() -> None:
    assert Need(n=3, prompt_tokens=(1, 15), max_tokens=5).sequences == 6


async def test_seats_are_reserved_but_for_the_canarys_and_come_back() -> None:
    door = Door(seats=4)
    guests = [Guest(door, 10, n=2), Guest(door, 10), Guest(door, 10)]
    await settle()
    assert [guest.inside.is_set() for guest in guests] == [True, True, False]
    assert (door.ledger.reserved_seats, door.ledger.free_tokens, door.waiting) == (3, 970, 1)
    assert not door.ledger.fits(need(10))
    guests[0].task.cancel()
    await settle()
    assert guests[2].inside.is_set()
    await guests[1].leave()
    await guests[2].leave()
    assert (door.ledger.reserved_seats, door.ledger.reserved_tokens) == (0, 0)


async def test_one_who_stops_waiting_for_a_seat_takes_none() -> None:
    door = Door(seats=2)
    inside, waiting = Guest(door, 10), Guest(door, 10)
    await settle()
    waiting.task.cancel()
    await settle()
    await inside.leave()
    assert (door.ledger.reserved_seats, door.waiting) == (0, 0)


async def test_a_request_with_more_sequences_than_seats_enters_alone_and_not_never() -> None:
    door = Door(seats=4)
    before, wide, behind = Guest(door, 10), Guest(door, 10, n=8), Guest(door, 10)
    await settle()
    assert [guest.inside.is_set() for guest in (before, wide, behind)] == [True, False, False]
    await before.leave()
    await settle()
    assert [guest.inside.is_set() for guest in (wide, behind)] == [True, False]
    assert (door.ledger.reserved_seats, door.ledger.reserved_tokens) == (3, 80)
    await wide.leave()
    await settle()
    assert behind.inside.is_set()
    await behind.leave()
    assert door.ledger.reserved_seats == 0


async def test_an_engine_with_a_single_seat_is_used() -> None:
    door = Door(seats=1)
    async with door.slot(need(10)):
        assert not door.ledger.fits(need(10))
    assert door.ledger.fits(need(10))


async def test_seats_that_nobody_knows_are_no_limit() -> None:
    door = Door()
    guests = [Guest(door, 10, n=8) for _ in range(12)]
    await settle()
    assert door.waiting == 0
    assert door.ledger.reserved_seats == 96
    for guest in guests:
        await guest.leave()


async def test_a_full_queue_refuses_at_once_what_finds_no_seat() -> None:
    door = Door(queue_size=0, seats=2)
    assert door.refusal(need(10)) is None
    async with door.slot(need(10)):
        assert door.refusal(need(10))


async def test_of_several_engines_one_with_a_seat_gets_the_request_whatever_its_memory() -> None:
    door = Door(engines=2, seats=3)
    first, second = door.ledgers
    guests = [Guest(door, 500), Guest(door, 10, n=2), Guest(door, 10)]
    await settle()
    # The first engine has less memory left than the second, whose two seats are taken.
    assert [guest.ticket.ledger for guest in guests if guest.ticket] == [first, second, first]
    for guest in guests:
        await guest.leave()
