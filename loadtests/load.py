"""The two ways of loading a server: closed (a number of requests in flight) and open (arrivals that wait for nobody)."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable

from loadtests.records import Role
from loadtests.traces import Arrival

# (number within the cell, role, planned perf_counter seconds) -> whether the server took it.
Send = Callable[[int, Role, float], Awaitable[bool]]
_PAUSE_AFTER_FAILURE_S = 0.1


def roles(concurrency: int, measured: int) -> tuple[int, int]:
    """(ramp, measured) requests of a closed loop.

    The first wave starts at once and would measure a stampede: it only fills the server. Requests after the measured
    ones keep the concurrency until the last measured one has ended; they are then cancelled.
    """
    return (concurrency if concurrency > 1 else 0), measured


async def closed_loop(send: Send, concurrency: int, measured: int) -> None:
    """Keep `concurrency` requests in flight until `measured` of them have ended under full load."""
    ramp, measured = roles(concurrency, measured)
    numbers, left = itertools.count(), measured
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        nonlocal left
        while not finished.done():
            number = next(numbers)
            role: Role = "ramp" if number < ramp else "measured" if number < ramp + measured else "fill"
            taken = await send(number, role, time.perf_counter())
            left -= role == "measured"
            if left == 0 and not finished.done():
                finished.set_result(None)
            if not taken:
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    for worker in workers:
        worker.add_done_callback(lambda ended: _pass_on(ended, finished))
    try:
        await finished
    finally:
        await _cancel(workers)


async def open_loop(send: Send, planned: list[Arrival], max_in_flight: int) -> None:
    """Send each request when it is due, however the server fares; only `max_in_flight` holds one back."""
    room = asyncio.Semaphore(max_in_flight)
    start_s = time.perf_counter()

    async def one(number: int, due_s: float) -> None:
        await asyncio.sleep(max(0, due_s - time.perf_counter()))
        async with room:
            await send(number, "measured", due_s)

    tasks = [asyncio.create_task(one(number, start_s + arrival.at_s)) for number, arrival in enumerate(planned)]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


def _pass_on(worker: asyncio.Task[None], finished: asyncio.Future[None]) -> None:
    if not worker.cancelled() and not finished.done() and (error := worker.exception()):
        finished.set_exception(error)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
