"""`ard loadtest --cost RESULT`: what a long prompt costs against a short one, from a run that measured both."""

from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from ard_serve import console
from ard_serve.errors import UsageError
from ard_serve.settings import Settings
from loadtests.grids import percentile
from loadtests.output import read_result
from loadtests.records import CellResult, RunResult
from loadtests.units import short_bytes, short_length, short_ms, short_number

Table = tuple[list[str], list[list[str]]]  # header, rows
_SHORT_TOKENS = 8192
_UNKNOWN = "–"


class CostConfig(Settings):
    """Which lengths of which run are set against each other."""

    result: Path = Field(description="result.json of a run (or its folder)")
    short: int = Field(0, ge=0, description="the short prompts in tokens; 8192 where measured, else the shortest, when 0")
    long: int = Field(0, ge=0, description="the long prompts in tokens; the longest measured when 0")


def run(config: CostConfig) -> int:
    """Print both tables as Markdown, for a page or a pull request; returns 0.

    Raises:
        DataError: there is no result, or it is not one of this version.
        UsageError: a length was not measured.
    """
    result = read_result(config.result)
    short, long = chosen_lengths(result, config.short, config.long)
    title = f"What {short_length(long)} tokens cost against {short_length(short)}"
    told = f"What each length costs, {at_lowest(result)}:\n\n{markdown(by_length(result))}\n{title}:\n\n"
    console.out.print(told + markdown(against(result, short, long)), markup=False, highlight=False, soft_wrap=True, end="")
    return 0


def chosen_lengths(result: RunResult, short: int = 0, long: int = 0) -> tuple[int, int]:
    """The lengths to compare, of those that were measured in a closed loop.

    Raises:
        UsageError: there are no two such lengths, or one that is asked for is none of them.
    """
    lengths = sorted({cell.length for cell in _believed(result)})
    if len(lengths) < 2:
        raise UsageError("this run measured fewer than two lengths in a closed loop; run 'ard loadtest' with more --lengths")
    for asked in (short, long):
        if asked and asked not in lengths:
            raise UsageError(f"{asked}: not a length of this run; it measured {', '.join(map(str, lengths))}")
    long = long or lengths[-1]
    usual = _SHORT_TOKENS if _SHORT_TOKENS in lengths and long > _SHORT_TOKENS else lengths[0]
    return short or usual, long


def by_length(result: RunResult) -> Table:
    """One row for each length, at the lowest load that was run; answers are those of all loads. What is unknown is left out."""
    header = ["prompt", "n", "first token, median", "worst", "against the shortest", "prompt tokens/s", "gap, median",
              "KV of a request", "fit at once", "right"]  # fmt: skip
    cells = [cell for cell in _believed(result) if cell.concurrency == _lowest(result) and cell.ttft_ms]
    rows = []
    for cell in cells:
        assert cell.ttft_ms is not None
        assert cells[0].ttft_ms is not None
        rows.append([
            short_length(cell.length), str(cell.ttft_ms.n), short_ms(cell.ttft_ms.p50), short_ms(cell.ttft_ms.max),
            f"× {short_number(cell.ttft_ms.p50 / cells[0].ttft_ms.p50)}", _shown(cell.prompt_tokens_per_s),
            short_ms(cell.itl_ms.p50) if cell.itl_ms else _UNKNOWN, _kv_of_request(result, cell.length),
            _fits(result, cell.length), _right(result, cell.length),
        ])  # fmt: skip
    told = [at for at in range(len(header)) if any(row[at] != _UNKNOWN for row in rows)]
    return [header[at] for at in told], [[row[at] for at in told] for row in rows]


_FIGURES: tuple[tuple[str, Callable[[CellResult], float | None], Callable[[float], str]], ...] = (
    ("first token, median", percentile("ttft_ms", "p50"), short_ms),
    ("first token, worst", percentile("ttft_ms", "max"), short_ms),
    ("gap, median", percentile("itl_ms", "p50"), short_ms),
    ("longest silence", percentile("itl_ms", "max"), short_ms),
    ("whole answer, median", percentile("e2e_ms", "p50"), short_ms),
    ("output tokens/s", lambda cell: cell.output_tokens_per_s, short_number),
    ("prompt tokens/s", lambda cell: cell.prompt_tokens_per_s, short_number),
)


def against(result: RunResult, short: int, long: int) -> Table:
    """One row for each figure at each load that both lengths ran at, then what they take of the KV cache and their answers."""
    cells = {(cell.length, cell.concurrency): cell for cell in _believed(result)}
    loads = sorted({load for length, load in cells if load is not None and (short, load) in cells and (long, load) in cells})
    rows = []
    for name, pick, unit in _FIGURES:
        for load in loads:
            before, after = pick(cells[short, load]), pick(cells[long, load])
            if before and after:
                rows.append([name, str(load), unit(before), unit(after), f"× {short_number(after / before)}"])
    for name, told in (("KV of a request", _kv_of_request), ("fit at once", _fits), ("right answers", _right)):
        if _UNKNOWN not in (pair := [told(result, short), told(result, long)]):
            rows.append([name, "all" if told is _right else "", *pair, ""])
    return ["", "at once", short_length(short), short_length(long), "times"], rows


def markdown(table: Table) -> str:
    """A table as a Markdown page shows it."""
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _believed(result: RunResult) -> list[CellResult]:
    cells = [cell for cell in result.cells if cell.concurrency is not None and not cell.refused]
    return sorted(cells, key=lambda cell: (cell.length, cell.concurrency or 0))


def _lowest(result: RunResult) -> int:
    return min((cell.concurrency for cell in _believed(result) if cell.concurrency), default=0)


def at_lowest(result: RunResult) -> str:
    """How many requests were in flight where `by_length` looks."""
    return "one request at a time" if _lowest(result) == 1 else f"{_lowest(result)} at once"


def _shown(rate: float | None) -> str:
    return _UNKNOWN if rate is None else short_number(rate)


def _kv_of_request(result: RunResult, length: int) -> str:
    kv = result.kv
    held = kv.get("request_bytes", {}).get(str(length))
    if held is None and "bytes_per_token" in kv:
        # Results before November 2026 state no more; the models they measured have no window that closes.
        held = kv["bytes_per_token"] * (length + result.settings["output_tokens"])
    return _UNKNOWN if held is None else short_bytes(held)


def _fits(result: RunResult, length: int) -> str:
    row = result.kv.get("lengths", {}).get(str(length))
    return f"{row['fits']:,}" if row else _UNKNOWN


def _right(result: RunResult, length: int) -> str:
    graded = [cell.accuracy for cell in _believed(result) if cell.length == length and cell.accuracy]
    return f"{sum(one.right for one in graded)}/{sum(one.n for one in graded)}" if graded else _UNKNOWN
