"""Heat maps of the report: one figure of every cell, by prompt length and load."""

import math
from collections.abc import Callable, Sequence

from loadtests.page import Shade, card, heat
from loadtests.records import CellResult, Distribution
from loadtests.units import short_length

Pick = Callable[[CellResult], float | None]


def shown_length(tokens: int) -> str:
    """A prompt length as people read it; a replayed trace has many and states none."""
    return short_length(tokens) if tokens else "traced"


def percentile(latency: str, name: str) -> Pick:
    """Picks one percentile of one latency, such as `ttft_ms`, `p99`."""

    def pick(cell: CellResult) -> float | None:
        values: Distribution | None = getattr(cell, latency)
        return None if values is None else float(getattr(values, name))

    return pick


def grid(
    title: str, cells: Sequence[CellResult], pick: Pick, unit: Callable[[float], str], colour: str, share: bool = False
) -> str:
    """A card with the figures that `pick` takes from each cell, or nothing where no cell has one.

    `share`: the figures are parts of a whole, coloured from nothing to all; others by their logarithm, least to most.
    """
    loads = sorted({(cell.concurrency or 0, cell.rate or 0) for cell in cells})
    values = [value for cell in cells if not cell.refused and (value := pick(cell)) is not None]
    scale = (lambda value: value) if share else _logarithmic(values)
    body: list[tuple[str, list[Shade]]] = []
    for length in sorted({cell.length for cell in cells}):
        at = {(cell.concurrency or 0, cell.rate or 0): cell for cell in cells if cell.length == length}
        body.append((shown_length(length), [_shade(at.get(load), pick, unit, scale) for load in loads]))
    columns = [f"{rate:g}/s" if rate else f"{concurrency or 'as recorded'}" for concurrency, rate in loads]
    return card(title, heat("length \\ load", columns, body, colour) if values else "")


def _logarithmic(values: Sequence[float]) -> Callable[[float], float]:
    low, high = max(min(values, default=1), 1e-6), max(*values, 1e-6, 1e-6)
    # Full colour stands for a doubling at least: figures that hardly differ shall not look as if they did.
    spread = max(math.log(high / low), math.log(2))
    return lambda value: math.log(max(value, low) / low) / spread


def _shade(cell: CellResult | None, pick: Pick, unit: Callable[[float], str], scale: Callable[[float], float]) -> Shade:
    if cell is None:
        return "", None
    if cell.refused:
        return "refused", None
    value = pick(cell)
    return ("–", None) if value is None else (unit(value), scale(value))
