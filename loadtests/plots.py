"""The report's curves as SVG whose colours are CSS variables, so that one picture serves a dark and a light page."""

import io
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from loadtests.grids import shown_length
from loadtests.records import CellResult, RequestRecord, RunResult
from loadtests.units import short_bytes, short_length, short_ms

# Colours that matplotlib writes and that are then replaced; any that occur nowhere else would do.
_INK, _FAINT, _GRID = "#0a0b0c", "#1a1b1c", "#2a2b2c"
_SERIES = tuple(f"#a{index}b{index}c{index}" for index in range(8))
_VARIABLES = {_INK: "--ink", _FAINT: "--faint", _GRID: "--grid"} | {c: f"--s{i}" for i, c in enumerate(_SERIES)}
_MARKERS = "osD^vPX*"
# The full cache last: what is under its line fits.
_KV_SHARES = {0.25: ":", 0.5: "--", 1.0: "-"}
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "ard", "font.size": 10, "axes.edgecolor": _FAINT, "axes.labelcolor": _INK,
    "text.color": _INK, "xtick.color": _FAINT, "ytick.color": _FAINT, "xtick.labelcolor": _INK, "ytick.labelcolor": _INK,
    "grid.color": _GRID, "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "lines.linewidth": 1.8, "lines.markersize": 5.5, "axes.axisbelow": True,
}  # fmt: skip


def ttft_by_length(result: RunResult) -> str:
    """TTFT of each request against its prompt's length at the lowest load, with the fitted law and its band."""
    cells = _closed(result)
    fit = result.fits.get("ttft")
    if len({cell.length for cell in cells}) < 2:
        return ""

    def draw(axes: Axes) -> None:
        for index, load in enumerate(_loads(cells)[: len(_SERIES)]):
            row = [cell for cell in cells if cell.concurrency == load and cell.ttft_ms]
            points = _pairs((cell.length, cell.ttft_ms.p50) for cell in row if cell.ttft_ms)
            axes.plot(*points, color=_SERIES[index], marker=_MARKERS[index], label=f"{load}", linewidth=1.2 if index else 0)
        lowest = {cell.cell for cell in cells if cell.concurrency == _loads(cells)[0]}
        each = [r for r in result.requests if r.cell in lowest and r.role == "measured" and r.ttft_ms]
        axes.plot(*_pairs((r.prompt_tokens, r.ttft_ms or 0) for r in each), ".", color=_SERIES[0], alpha=0.45, markersize=4)
        if fit:
            x, mean, low, high = zip(*fit["curve"], strict=True)
            axes.fill_between(x, [max(value, 0.1) for value in low], high, color=_SERIES[0], alpha=0.18, linewidth=0)
            axes.plot(x, mean, color=_SERIES[0], linewidth=1.8)
        _log_axes(axes, [cell.length for cell in cells], short_ms)
        if fit:
            _mark_turn(axes, fit["quadratic_from_tokens"], fit["curve"])
        axes.set(xlabel="prompt tokens", ylabel="time to first token")
        axes.legend(title="concurrency", ncols=2, loc="upper left")

    return _svg(draw, "Time to first token against prompt length")


def ttft_of_trace(result: RunResult) -> str:
    """TTFT of each request of a replayed trace against its prompt's length."""
    traced = {cell.cell for cell in result.cells if not cell.length and not cell.refused}
    each = [r for r in result.requests if r.cell in traced and r.role == "measured" and r.ttft_ms]
    if not each:
        return ""

    def draw(axes: Axes) -> None:
        axes.plot(*_pairs((r.prompt_tokens, r.ttft_ms or 0) for r in each), _MARKERS[0], color=_SERIES[0], alpha=0.6)
        shortest, longest = (edge(record.prompt_tokens for record in each) for edge in (min, max))
        ticks = [1 << power for power in range(shortest.bit_length() - 1, longest.bit_length() + 1)]
        _log_axes(axes, ticks, short_ms)
        axes.set(xlabel="prompt tokens", ylabel="time to first token")

    return _svg(draw, "Time to first token against prompt length, as traced")


def _mark_turn(axes: Axes, turn: float | None, curve: Sequence[Sequence[float]]) -> None:
    """A dotted line where attention's share overtakes the rest, if that is within the picture."""
    if turn and curve[0][0] < turn < curve[-1][0]:
        axes.axvline(turn, color=_FAINT, linestyle=":", linewidth=1.2)
        axes.text(turn, 0.03, f"quadratic from {turn:,.0f} ", transform=axes.get_xaxis_transform(), ha="right",
                  color=_FAINT, fontsize=9)  # fmt: skip


def curves_by_concurrency(result: RunResult, figure: str, label: str, unit: Callable[[float], str], log: bool) -> str:
    """One line for each length: a cell's figure against concurrency. `figure` names it, as in `ttft_ms.p50`."""
    cells = _closed(result)
    if len(_loads(cells)) < 2:
        return ""

    def draw(axes: Axes) -> None:
        for index, length in enumerate(sorted({cell.length for cell in cells})[-len(_SERIES) :]):
            row = [(cell.concurrency or 1, value) for cell in cells if cell.length == length and (value := _get(cell, figure))]
            axes.plot(*_pairs(row), color=_SERIES[index], marker=_MARKERS[index], label=shown_length(length))
        _log_axes(axes, _loads(cells), unit, log)
        axes.set(xlabel="concurrency", ylabel=label)
        if not log:
            axes.set_ylim(bottom=0)
        _legend_above(axes)

    return _svg(draw, f"{label} against concurrency", legend_above=True)


def kv_predicted_and_observed(result: RunResult) -> str:
    """Share of the KV cache each cell used: predicted from its requests' lengths, and what the engine reported."""
    pairs = [
        (cell.memory.predicted_kv, cell.memory.observed_kv, bool(cell.memory.preemptions))
        for cell in result.cells
        if cell.memory.predicted_kv and cell.memory.observed_kv
    ]
    if not pairs:
        return ""

    def draw(axes: Axes) -> None:
        top = max(max(predicted, observed) for predicted, observed, _ in pairs)
        axes.plot([0, min(1, top), top], [0, min(1, top), min(1, top)], ":", color=_FAINT, linewidth=1.2, label="exact")
        for preempted, index, label in ((False, 0, "cells"), (True, 3, "cells that preempted")):
            chosen = [(predicted, observed) for predicted, observed, p in pairs if p == preempted]
            if chosen:
                axes.plot(*_pairs(chosen), linestyle="", color=_SERIES[index], marker=_MARKERS[index], label=label)
        share = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
        axes.xaxis.set_major_formatter(share)
        axes.yaxis.set_major_formatter(share)
        axes.set(xlabel="KV cache needed, predicted", ylabel="KV cache used, observed")
        axes.legend(loc="upper left")

    return _svg(draw, "Predicted and observed KV cache use")


def memory_surface(result: RunResult) -> str:
    """What length and concurrency together take of the KV cache, as lines of equal use, with the cells that were run."""
    pool = result.kv.get("pool_tokens")
    cells = _closed(result)
    if not pool or not cells:
        return ""

    def draw(axes: Axes) -> None:
        tokens = result.settings["output_tokens"]
        low, high = min(cell.length for cell in cells) / 1.4, max(cell.length for cell in cells) * 1.4
        lengths = [low * (high / low) ** (step / 60) for step in range(61)]
        for share, line in _KV_SHARES.items():
            held = [share * pool / (length + tokens) for length in lengths]
            axes.plot(lengths, held, line, color=_SERIES[0], linewidth=1.4, label=_kv_label(result, share))
        axes.fill_between(lengths, held, [0.7] * len(lengths), color=_SERIES[0], alpha=0.12, linewidth=0)
        for preempted, index, label in ((False, 2, "ran without preemption"), (True, 3, "preempted")):
            chosen = [(c.length, c.concurrency or 1) for c in cells if bool(c.memory.preemptions) == preempted]
            if chosen:
                axes.plot(*_pairs(chosen), linestyle="", color=_SERIES[index], marker=_MARKERS[index], label=label)
        _log_axes(axes, [cell.length for cell in cells], lambda value: f"{value:g}")
        axes.set(xlabel="prompt tokens", ylabel="requests at once", xlim=(low, high), ylim=(0.7, None))
        axes.legend(loc="upper right", fontsize=9)

    return _svg(draw, "What the KV cache holds")


def _kv_label(result: RunResult, share: float) -> str:
    per_token = result.kv.get("bytes_per_token")
    size = f", {short_bytes(share * result.kv['pool_tokens'] * per_token)}" if per_token else ""
    return f"{share:.0%} of the KV cache{size}"


def latency_over_time(result: RunResult) -> str:
    """TTFT of each measured request at the moment it was sent: drift, stalls and outliers show here."""
    # Grouped by the length that was asked for: where a server gives no token ids, the true one varies by a few tokens.
    lengths = {cell.cell: cell.length for cell in result.cells}
    sent: dict[int, list[RequestRecord]] = {}
    for record in result.requests:
        if record.role == "measured" and record.ttft_ms:
            sent.setdefault(lengths[record.cell], []).append(record)
    groups = sorted(sent.items())[-len(_SERIES) :]
    if not groups:
        return ""

    def draw(axes: Axes) -> None:
        for index, (length, records) in enumerate(groups):
            label = shown_length(length)
            axes.plot(*_pairs((r.sent_s, r.ttft_ms or 0) for r in records), linestyle="", marker=_MARKERS[index],
                      color=_SERIES[index], label=label, markersize=4.5, alpha=0.85)  # fmt: skip
        axes.set_yscale("log")
        _format(axes.yaxis, short_ms)
        axes.set(xlabel="seconds into the run", ylabel="time to first token")
        _legend_above(axes)

    return _svg(draw, "Time to first token over the run", legend_above=True)


def _closed(result: RunResult) -> list[CellResult]:
    return [cell for cell in result.cells if cell.concurrency is not None and not cell.refused]


def _loads(cells: Sequence[CellResult]) -> list[int]:
    return sorted({cell.concurrency for cell in cells if cell.concurrency is not None})


def _pairs(points: Any) -> tuple[list[float], list[float]]:
    listed = list(points)
    return [x for x, _ in listed], [y for _, y in listed]


def _get(cell: CellResult, figure: str) -> float | None:
    value: Any = cell
    for part in figure.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, int | float) else None


def _log_axes(axes: Axes, ticks: Sequence[float], y_unit: Callable[[float], str], log_y: bool = True) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(ticks))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_length(round(value))))
    if log_y:
        axes.set_yscale("log")
    _format(axes.yaxis, y_unit)


def _format(axis: Any, unit: Callable[[float], str]) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
        axis.set_minor_formatter(NullFormatter())


def _legend_above(axes: Axes) -> None:
    """One row over the picture: its eight series at most have short names."""
    axes.legend(title="prompt tokens", ncols=len(_SERIES), loc="lower left", bbox_to_anchor=(-0.05, 0.98), fontsize=9,
                title_fontsize=9, alignment="left", columnspacing=0.9, handlelength=1.2, handletextpad=0.3)  # fmt: skip


def _svg(draw: Callable[[Axes], None], title: str, legend_above: bool = False) -> str:
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.9))
        figure.patch.set_alpha(0)
        # Fixed margins: matplotlib's layout engines take as long as all the drawing.
        axes = figure.add_axes((0.125, 0.135, 0.845, 0.74 if legend_above else 0.845))
        axes.patch.set_alpha(0)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace("DejaVu Sans", "system-ui")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    # The page scales the picture by its viewBox.
    head, rest = svg.split(">", 1)
    head = " ".join(part for part in head.split() if not part.startswith(("width=", "height=")))
    return f'{head} role="img" aria-label="{title}">{rest}'
