"""One load test in progress: sends requests, keeps a record of each, and reads the server beside them."""

import asyncio
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ard_serve.errors import EngineDiedError
from loadtests.client import Exchange, Stream
from loadtests.config import LoadConfig
from loadtests.engine import EngineMetrics
from loadtests.lag import watched_loop
from loadtests.load import Send, closed_loop, open_loop, roles
from loadtests.machine import ServerMemory
from loadtests.output import unwritable
from loadtests.prompts import Prompt, PromptMaker, Words, grade
from loadtests.records import RequestRecord, Role
from loadtests.scenario import Cell, arrivals
from loadtests.summary import CellRun, Readings
from loadtests.target import Target
from loadtests.traces import Arrival

_SAMPLE_EVERY_S = 0.25
_ANSWER_CHARS = 120
# Tasks set aside for each repeat; divisible by every small number of depths, so that the strata go on where they stopped.
_TASKS = 720_720
_GONE_AFTER_TRIES, _TRY_EVERY_S = 5, 0.4

Shape = tuple[int, int]  # prompt tokens, output tokens


class Session:
    """Runs cells against one target.

    Every request is appended to `journal` as one JSON line when it ends, so that a run that is killed loses nothing it
    had measured. `on_request` is called after each, for a progress display.
    """

    def __init__(
        self,
        config: LoadConfig,
        target: Target,
        prompts: PromptMaker,
        engine: EngineMetrics,
        stream: Stream,
        journal: IO[str],
        on_request: Callable[[RequestRecord], None],
    ) -> None:
        self.config, self.target = config, target
        self._prompts, self._engine, self._stream = prompts, engine, stream
        self._journal, self._on_request = journal, on_request
        self._memory = ServerMemory(target.address, engine.address)
        self._began_s = time.perf_counter()
        self.runs: dict[str, CellRun] = {}

    def elapsed_s(self) -> float:
        """Seconds since the session began."""
        return time.perf_counter() - self._began_s

    async def warm_up(self, lengths: list[int]) -> None:
        """Unmeasured requests, so that compilation and first allocations fall into no cell."""
        for length in lengths:
            run = CellRun(Cell(length, self.config.output_tokens, 1))
            for number in range(self.config.warm_up):
                bodies = await self._prepare([(length, self.config.output_tokens)], [number], f"warm_up/{length}/{number}")
                await self._send(run, 0, bodies)(0, "warm_up", time.perf_counter())

    async def run_cell(self, repeat: int, cell: Cell) -> None:
        """Run one cell once and add what it measured to `runs`."""
        run = self.runs.get(cell.name) or CellRun(cell)
        planned = [] if cell.concurrency else self._fitting(run, arrivals(cell, self.config, repeat))
        shapes, ramp = [(arrival.prompt_tokens, arrival.output_tokens) for arrival in planned], 0
        if cell.concurrency:
            ramp, measured = roles(cell.concurrency, cell.requests(self.config))
            shapes = [(cell.length, cell.output_tokens)] * (ramp + measured + cell.concurrency)
        # The ramp's tasks come last, so that the measured ones are the same tasks at every concurrency.
        first = repeat * (_TASKS + self.config.requests_per_cell)
        tasks = [first + (number - ramp) % _TASKS for number in range(len(shapes))]
        bodies = await self._prepare(shapes, tasks, f"{cell.name}/{repeat}")
        # Kept from here on: a trace that cannot be read, or a length too short for its needles, leaves no empty cell.
        self.runs[cell.name] = run
        await self._engine.idle()
        readings = Readings(load_average=os.getloadavg()[0])
        before = await self._engine.read()
        async with self._engine.peaks(_SAMPLE_EVERY_S, self._memory.sample) as peaks, watched_loop() as lag:
            try:
                if cell.concurrency:
                    await closed_loop(self._send(run, repeat, bodies), cell.concurrency, cell.requests(self.config))
                else:
                    await open_loop(self._send(run, repeat, bodies), planned, self.config.max_in_flight)
            finally:
                readings.kv_use = peaks.get("kv_use")
                readings.waiting = int(peaks["waiting"]) if "waiting" in peaks else None
                readings.client_lag_ms = round(lag.longest_ms, 1)
                readings.server_rss_bytes, readings.gpu_bytes = self._memory.take()
                run.readings.add(readings)
        after = await self._engine.read()
        run.readings.add(Readings(after.rise(before, "cached_tokens"), after.rise(before, "preemptions")))

    def _fitting(self, run: CellRun, planned: list[Arrival]) -> list[Arrival]:
        """The arrivals within the server's window; a trace may hold longer ones, which it would only refuse."""
        limit = self.target.served_limit
        fitting = [one for one in planned if limit is None or one.prompt_tokens + one.output_tokens <= limit]
        run.too_long += len(planned) - len(fitting)
        return fitting

    async def _prepare(self, shapes: list[Shape], tasks: list[int], label: str) -> list[tuple[Prompt, bytes]]:
        """Prompts and their JSON, made before the clock runs: building one of 64K tokens would delay the others' events."""

        def make() -> list[tuple[Prompt, bytes]]:
            made = []
            for number, (task, (length, output_tokens)) in enumerate(zip(tasks, shapes, strict=True)):
                prompt = self._make(length, task, f"{label}/{number}")
                made.append((prompt, self.target.body(prompt.tokens, output_tokens)))
            return made

        return await asyncio.to_thread(make)

    def _make(self, length: int, index: int, label: str) -> Prompt:
        source = self.target.source
        units = source.words_for(length) if isinstance(source, Words) else length
        return self._prompts.make(units, index, label, needle_required=self.config.arrival != "trace")

    def _send(self, run: CellRun, repeat: int, bodies: list[tuple[Prompt, bytes]]) -> Send:
        async def send(number: int, role: Role, planned_s: float) -> bool:
            # A cell whose requests fail at once may need more fill than was made; the cache gate sees any repetition.
            prompt, body = bodies[number % len(bodies)]
            exchange = Exchange()
            try:
                await self._stream(self.target.address, self.target.path, body, self.config.request_timeout_s, exchange)
            finally:
                if exchange.sent_s or exchange.outcome != "cancelled":
                    self._keep(run, repeat, number, role, planned_s, prompt, exchange)
            if exchange.outcome in ("connection", "no_done", "error_event") and not await self._alive():
                raise EngineDiedError(f"{self.target.address.base}: the server died during {run.cell.name} ({exchange.detail})")
            return exchange.outcome == "ok"

        return send

    def _keep(
        self, run: CellRun, repeat: int, number: int, role: Role, planned_s: float, prompt: Prompt, exchange: Exchange
    ) -> None:
        times_s, sent_s = exchange.token_times_s, exchange.sent_s or planned_s
        details = exchange.usage.get("prompt_tokens_details") or {}
        ok = exchange.outcome == "ok"
        reported = exchange.usage.get("prompt_tokens")
        gaps_ms = [round((later - earlier) * 1000, 3) for earlier, later in itertools.pairwise(times_s)]
        record = RequestRecord(
            cell=run.cell.name,
            repeat=repeat,
            index=number,
            role=role,
            outcome=exchange.outcome,
            status=exchange.status,
            detail=exchange.detail[:300],
            prompt_tokens=len(prompt.tokens) if self.target.exact else reported or run.cell.length,
            reported_prompt_tokens=reported,
            cached_tokens=details.get("cached_tokens"),
            output_tokens=exchange.usage.get("completion_tokens") or len(times_s),
            events=len(times_s),
            planned_s=round(planned_s - self._began_s, 6),
            sent_s=round(sent_s - self._began_s, 6),
            late_ms=round((sent_s - planned_s) * 1000, 3),
            connect_ms=round(exchange.connect_ms, 3),
            ttft_ms=round((times_s[0] - sent_s) * 1000, 3) if times_s else None,
            e2e_ms=round((times_s[-1] - sent_s) * 1000, 3) if times_s else None,
            gaps_ms=gaps_ms,
            longest_gap_ms=max(gaps_ms, default=None),
            depth=prompt.depth,
            expected=prompt.expected,
            answer=exchange.text[:_ANSWER_CHARS],
            correct=grade(exchange.text[:_ANSWER_CHARS], prompt.expected) if ok and prompt.expected else None,
        )
        run.records.append(record)
        try:
            self._journal.write(record.model_dump_json() + "\n")
            self._journal.flush()
        except OSError as error:
            raise unwritable(Path(self._journal.name), error) from None
        self._on_request(record)

    async def _alive(self) -> bool:
        """Whether anyone still listens; a supervised server gets two seconds to come back."""
        address = self.target.address
        for _ in range(_GONE_AFTER_TRIES):
            try:
                _, writer = await asyncio.open_connection(address.host, address.port)
            except OSError:
                await asyncio.sleep(_TRY_EVERY_S)
            else:
                writer.close()
                return True
        return False
