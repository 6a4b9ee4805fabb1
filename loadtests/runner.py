"""`ard loadtest URL`: find out what the server is, run the grid, write the report, whatever happens meanwhile."""

import asyncio
import contextlib
import logging
import os
import secrets
import shlex
import signal
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import uvloop

from ard_serve import console
from ard_serve.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, ArdError, EngineDiedError
from loadtests import fits
from loadtests.address import Address, parse_address
from loadtests.bias import measure_bias
from loadtests.client import Stream, stream
from loadtests.config import LoadConfig
from loadtests.engine import EngineMetrics, Snapshot
from loadtests.kv_report import describe_kv
from loadtests.machine import commit, describe_machine
from loadtests.output import client_share, summary_table, unwritable, write_result, write_tables
from loadtests.prompts import PromptMaker
from loadtests.records import CellResult, RequestRecord, RunResult
from loadtests.scenario import Cell, plan, schedule
from loadtests.senders import sender_pool
from loadtests.session import Session
from loadtests.summary import summarise
from loadtests.target import discover
from loadtests.units import short_ms, short_number

log = logging.getLogger(__name__)

_BIAS_LIMIT = 0.1
# At what the client is checked where the plan does not say how much will be in flight, or how long.
_OPEN_LOOP_STREAMS, _TRACED_TOKENS = 32, 1024
# What a terminal of 80 columns has room for.
_SHOWN = ("length", "load", "TTFT p50", "TTFT p99", "ITL p99", "scheduled p99", "tok/s", "right", "KV")


def run(config: LoadConfig) -> int:
    """Run one load test and write its folder; returns the exit code 0, 130 (Ctrl-C) or 143 (SIGTERM).

    Raises:
        UsageError: the address, the plan or the server's answers do not allow a run.
        EngineDiedError: the server died meanwhile; what was measured until then is written.
        ResourceError: the run's folder cannot be written.
    """
    address = parse_address(config.url, config.allow_host, config.api_key_env)
    test = _LoadTest(config, address)
    try:
        uvloop.run(test.measure())
        return 0
    except KeyboardInterrupt:
        test.result.status = "interrupted"
        return EXIT_INTERRUPTED
    except asyncio.CancelledError:
        test.result.status = "terminated"
        return EXIT_TERMINATED
    except EngineDiedError as error:
        test.result.status, test.result.detail = "server_died", str(error)
        raise EngineDiedError(f"{error}; {test.measured()} measured requests are in {config.out}") from None
    except ArdError as error:
        test.result.status, test.result.detail = "failed", str(error)
        raise
    finally:
        if test.session is not None and test.session.runs:
            test.update()
            write_result(test.result, config.out)
            write_tables(test.result, config.out, config.report)
            _show(test.result, config.out)


def _open_journal(folder: Path) -> IO[str]:
    """The raw record in the run's folder. Opened once the server has answered: a mistyped address wipes no older run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / "requests.jsonl").open("w", encoding="utf-8")
    except OSError as error:
        raise unwritable(folder, error) from None


def _close(journal: IO[str]) -> None:
    # What a full disk did not take has been told when it was written.
    with contextlib.suppress(OSError):
        journal.close()


class _LoadTest:
    """The state that survives an interruption."""

    def __init__(self, config: LoadConfig, address: Address) -> None:
        self._config, self._address = config, address
        self._cells: list[Cell] = []
        self._bar: console.Bar | None = None
        self._began_s = time.perf_counter()
        self.session: Session | None = None
        self.result = RunResult(
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            command=shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
            commit=commit(),
            settings=config.model_dump(mode="json"),
            server={},
            machine=describe_machine(),
        )

    async def measure(self) -> None:
        """The whole run; raises whatever ends it early."""
        task = asyncio.current_task()
        assert task is not None
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        config = self._config
        engine, readings = await self._engine()
        target = await discover(config, self._address, readings, engine.address)
        self._cells = plan(config, target.served_limit, target.kv_tokens, target.block_tokens)
        self.result.server = target.describe() | {"cache": readings.labels, "engine_metrics": engine.available}
        keys = config.needle_keys if config.needle else 0
        prompts = PromptMaker(target.source, config.seed, secrets.token_hex(8), keys, config.depths)
        order = schedule(self._cells, config)
        async with contextlib.AsyncExitStack() as stack:
            follow: Stream = stream
            if config.processes > 1:
                follow = (await stack.enter_async_context(sender_pool(config.processes))).stream
            journal = _open_journal(config.out)
            stack.callback(_close, journal)
            session = self.session = Session(config, target, prompts, engine, follow, journal, self._advance)
            if config.check_client:
                await self._check_client(follow)
            self._bar = stack.enter_context(console.progress("load test", sum(_work(cell, config) for _, cell in order)))
            await session.warm_up(sorted({cell.length for cell in self._cells if cell.length}))
            await self._run_cells(session, order)
        if self.result.status == "running":
            self.result.status = "complete"

    async def _run_cells(self, session: Session, order: list[tuple[int, Cell]]) -> None:
        for position, (repeat, cell) in enumerate(order):
            if session.elapsed_s() > self._config.time_limit_s:
                self.result.status = "time_limit"
                self.result.not_run = [f"{left.name} (repeat {number + 1})" for number, left in order[position:]]
                log.warning(
                    "time limit of %g s reached; %d cells are left out", self._config.time_limit_s, len(order) - position
                )
                return
            await session.run_cell(repeat, cell)
            self.update()
            write_result(self.result, self._config.out)
            _say(next(result for result in self.result.cells if result.cell == cell.name))

    async def _engine(self) -> tuple[EngineMetrics, Snapshot]:
        config = self._config
        if config.metrics_url:
            address = parse_address(config.metrics_url, config.allow_host, config.api_key_env)
            root = replace(address, prefix=address.prefix.removesuffix("/metrics"))
            engine = EngineMetrics(root, "" if root.prefix else "/metrics")
        else:
            engine = EngineMetrics(self._address)
        return engine, await engine.probe()

    async def _check_client(self, follow: Stream) -> None:
        top = max(cell.concurrency or _OPEN_LOOP_STREAMS for cell in self._cells)
        longest = min(max(cell.length or _TRACED_TOKENS for cell in self._cells), 8192)
        bias = await measure_bias(top, longest, min(self._config.output_tokens, 128), follow=follow)
        self.result.client = bias.model_dump()
        console.err.print(client_share(self.result.client), highlight=False, soft_wrap=True)
        if bias.ttft_added_p50_ms > _BIAS_LIMIT * bias.true_ttft_ms:
            log.warning(
                "this client adds %.0f ms to a TTFT of %.0f ms at concurrency %d; try --processes %d",
                bias.ttft_added_p50_ms, bias.true_ttft_ms, top, 2 * self._config.processes,
            )  # fmt: skip

    def _advance(self, record: RequestRecord) -> None:
        if self._bar is not None and record.role in ("measured", "ramp"):
            shown = f"{record.ttft_ms:.0f} ms to the first token" if record.ttft_ms is not None else record.outcome
            cell = next(cell for cell in self._cells if cell.name == record.cell)
            self._bar.advance(_cost(cell), f"{record.cell}: {shown}")

    def measured(self) -> int:
        """Measured requests that succeeded so far."""
        records = [record for run in self.session.runs.values() for record in run.records] if self.session else []
        return sum(record.role == "measured" and record.outcome == "ok" for record in records)

    def update(self) -> None:
        """Bring the result up to what has been measured."""
        assert self.session is not None
        config, target, runs = self._config, self.session.target, self.session.runs
        shown = [runs[cell.name] for cell in self._cells if cell.name in runs]
        self.result.cells = [summarise(run, config, target) for run in shown]
        self.result.requests = [record for run in shown for record in run.records]
        self.result.duration_s = round(time.perf_counter() - self._began_s, 2)
        self.result.kv = describe_kv(self.result, target)
        fits.add_fits(self.result, config)


def _say(cell: CellResult) -> None:
    """One line for a cell that has run, above the progress bar."""
    if cell.refused or cell.ttft_ms is None:
        console.err.print(f"{cell.cell}: {cell.refused or cell.outcomes}", highlight=False)
        return
    told = [f"{cell.cell}: first token {short_ms(cell.ttft_ms.p50)} (p99 {short_ms(cell.ttft_ms.p99)})"]
    told += [f"gap {short_ms(cell.itl_ms.p50)}"] if cell.itl_ms else []
    told += [f"{short_number(cell.output_tokens_per_s)} tokens/s"] if cell.output_tokens_per_s else []
    told += [f"{cell.accuracy.right}/{cell.accuracy.n} right"] if cell.accuracy else []
    told += [f"KV {cell.memory.observed_kv:.0%}"] if cell.memory.observed_kv is not None else []
    told += [f"{cell.memory.preemptions} preempted"] if cell.memory.preemptions else []
    console.err.print(", ".join(told + cell.flags), highlight=False, soft_wrap=True)


def _show(result: RunResult, folder: Path) -> None:
    """The table of a finished run on stdout, the alarms and the paths on stderr."""
    header, rows = summary_table(result.cells, _SHOWN)
    console.print_table(f"Load test of {result.server['model']}: {result.status}", header, rows)
    if (limits := result.fits.get("limits")) and limits["by_length"]:
        fitting = [f"{length} tokens: {most or 'none'}" for length, most in limits["by_length"].items()]
        console.err.print(f"requests at once within the limits: {', '.join(fitting)}", highlight=False, soft_wrap=True)
    for alarm in result.alarms:
        console.err.print(f"alarm: {alarm}", style="red", highlight=False)
    page = folder / "report.html" if result.settings["report"] else folder / "summary.md"
    console.err.print(f"written: {page}, {folder / 'result.json'}", highlight=False, soft_wrap=True)


def _cost(cell: Cell) -> float:
    """Rough work of one request, so that the time left follows the tokens and not the requests; a trace has no length."""
    return (cell.length or _TRACED_TOKENS) + 16 * cell.output_tokens


def _work(cell: Cell, config: LoadConfig) -> float:
    ramp = cell.concurrency if cell.concurrency and cell.concurrency > 1 else 0
    return (cell.requests(config) + ramp) * _cost(cell)
