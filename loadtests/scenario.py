"""What is sent and when: the cells of the grid, their order, and the arrivals of open loops."""

import math
import random
from dataclasses import dataclass

from ard_serve.errors import UsageError
from loadtests.config import LoadConfig
from loadtests.traces import Arrival, read_trace

_SMALLEST_DEFAULT_LENGTH = 1024
_UNKNOWN_KV_CONCURRENCY = 8


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a closed loop has a concurrency, an open loop a rate in requests per second."""

    length: int
    output_tokens: int
    concurrency: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """How the cell is called in records and reports, such as 4096x8 or 4096@0.5."""
        if self.concurrency is not None:
            return f"{self.length}x{self.concurrency}"
        return f"{self.length}@{self.rate:g}" if self.rate is not None else "trace"

    def requests(self, config: LoadConfig) -> int:
        """Measured requests of one repeat: in a closed loop enough to replace the whole first wave once."""
        if self.concurrency is None and self.rate is None:
            return config.trace_requests
        return max(config.requests_per_cell, self.concurrency or 0)


def plan(config: LoadConfig, served_limit: int | None, kv_tokens: int | None, block_tokens: int) -> list[Cell]:
    """The cells of a run, in the order of the report.

    Raises:
        UsageError: a length beyond the server's window, or no way to know the lengths.
    """
    if config.arrival == "trace":
        return [Cell(0, config.output_tokens)]
    lengths = config.lengths or _default_lengths(config, served_limit)
    for length in lengths:
        if served_limit is not None and length + config.output_tokens > served_limit:
            raise UsageError(
                f"length {length} + {config.output_tokens} output tokens: beyond the server's window of {served_limit}; "
                f"use --lengths up to {served_limit - config.output_tokens}"
            )
    if config.arrival in ("poisson", "constant"):
        return [Cell(length, config.output_tokens, rate=rate) for length in lengths for rate in config.rates]
    return [
        Cell(length, config.output_tokens, concurrency)
        for length in lengths
        for concurrency in config.concurrencies or _default_concurrencies(config, length, kv_tokens, block_tokens)
    ]


def _default_lengths(config: LoadConfig, served_limit: int | None) -> tuple[int, ...]:
    if served_limit is None:
        raise UsageError("the server does not report its window; give --lengths, or --served-limit for the default lengths")
    longest = served_limit - config.output_tokens
    if longest < 1:
        raise UsageError(
            f"output of {config.output_tokens} tokens: leaves nothing of a window of {served_limit} for the prompt"
        )
    doublings = max(0, math.ceil(math.log2(longest / _SMALLEST_DEFAULT_LENGTH)))
    return (*(_SMALLEST_DEFAULT_LENGTH << step for step in range(doublings)), longest)


def _default_concurrencies(config: LoadConfig, length: int, kv_tokens: int | None, block_tokens: int) -> tuple[int, ...]:
    """Doubling up to the first that no longer fits, so that the preemption point is crossed and not only approached."""
    if kv_tokens is None:
        top = _UNKNOWN_KV_CONCURRENCY
    else:
        held = math.ceil((length + config.output_tokens) / block_tokens) * block_tokens
        top = 1 << math.ceil(math.log2(max(1, kv_tokens // held) + 1))
    top = min(top, config.max_concurrency)
    return tuple(1 << step for step in range(top.bit_length()))


def schedule(cells: list[Cell], config: LoadConfig) -> list[tuple[int, Cell]]:
    """(repeat, cell) in the order of running: each repeat visits every cell once, shuffled, so that drift hits all alike."""
    order = random.Random(config.seed)
    return [(repeat, cell) for repeat in range(config.repeats) for cell in order.sample(cells, len(cells))]


def arrivals(cell: Cell, config: LoadConfig, repeat: int) -> list[Arrival]:
    """When each request of an open-loop cell is due, in seconds from the cell's start."""
    if config.arrival == "trace":
        assert config.trace is not None
        return read_trace(config.trace, config.trace_requests, config.trace_speed, config.trace_length_scale)
    assert cell.rate is not None
    clock = random.Random(f"{config.seed}/{cell.name}/{repeat}")
    at_s, planned = 0.0, []
    for _ in range(cell.requests(config)):
        planned.append(Arrival(at_s, cell.length, cell.output_tokens))
        at_s += clock.expovariate(cell.rate) if config.arrival == "poisson" else 1 / cell.rate
    return planned
