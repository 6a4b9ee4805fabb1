"""The plots of a report as SVG that follows the reader's light or dark theme.

matplotlib draws with stand-in colours, which become CSS variables afterwards. The palette is Okabe and Ito's, safe for
colour-blind readers; line styles and markers tell models apart without any colour.

`python -m restore.plots evaluation.json before-after.svg` draws the picture of a page.
"""

import argparse
import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from restore.config import Objective
from restore.evaluation.results import Evaluation, EvaluationReport

# Stand-ins that matplotlib draws with, and the CSS variables they become.
INK, QUIET, GRID, PANEL, HEAT, ON_HEAT = "#a10001", "#a10002", "#a10003", "#a10004", "#a10005", "#a10006"
_SERIES = ("#b10001", "#b10002", "#b10003", "#b10004", "#b10005", "#b10006")
_VARIABLES = {INK: "ink", QUIET: "quiet", GRID: "grid", PANEL: "panel", HEAT: "heat", ON_HEAT: "on-heat"} | {
    color: f"series-{index}" for index, color in enumerate(_SERIES)
}
_MARKERS, _LINES = ("s", "^", "o", "D", "v", "P"), ((0, (5, 2)), (0, (1.2, 1.6)), "solid", "solid", "solid", "solid")
# Native, stretched and restored look the same in every plot, whichever of them a report holds.
_ROLES = {"native": 0, "stretched": 1, "restored": 2}
_OFF_SCALE, _MOST_TICKS = 4, 9

THEME = """\
:root { --ink: #1c2128; --quiet: #59636e; --grid: #dfe3e8; --panel: #ffffff; --heat: #0072b2; --on-heat: #ffffff;
  --series-0: #6b7480; --series-1: #d55e00; --series-2: #0072b2; --series-3: #009e73; --series-4: #cc79a7;
  --series-5: #b58900; }
@media (prefers-color-scheme: dark) {
:root { --ink: #e8ecf1; --quiet: #9aa5b1; --grid: #30373f; --panel: #171b20; --heat: #56b4e9; --on-heat: #07131c;
  --series-0: #a3adb8; --series-1: #ff8a3d; --series-2: #56b4e9; --series-3: #2fc79a; --series-4: #e59fc4;
  --series-5: #e6b94d; } }
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
"""

_RC: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "ard-serve", "font.size": 10.5, "text.color": INK, "axes.labelcolor": QUIET,
    "axes.edgecolor": GRID, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID,
    "grid.linewidth": 0.8, "axes.axisbelow": True, "xtick.color": QUIET, "ytick.color": QUIET, "xtick.major.size": 0,
    "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0, "legend.frameon": False, "axes.titlelocation": "left",
    "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlepad": 12, "lines.linewidth": 2.2, "lines.markersize": 6,
}  # fmt: skip


def theme() -> AbstractContextManager[None]:
    """Everything that draws does so inside this context, where stand-in colours and text sizes are set."""
    return mpl.rc_context(_RC)


def series(models: Sequence[str]) -> dict[str, int]:
    """The palette's index of each model."""
    free = iter(range(len(_ROLES), 10**6))
    return {name: _ROLES[name] if name in _ROLES else next(free) for name in models}


def figure(width: float, height: float, columns: int = 1, ratios: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    """An empty figure of `columns` panels, in inches of 72 SVG units."""
    drawing = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.14, w_pad=0.1))
    return drawing, list(drawing.subplots(1, columns, squeeze=False, width_ratios=ratios)[0])


def to_svg(drawing: Figure, label: str) -> str:
    """The figure as an <svg> element with CSS variables for colours; `label` says what it shows to a screen reader."""
    buffer = io.StringIO()
    for patch in (drawing.patch, *(axes.patch for axes in drawing.axes)):
        patch.set_visible(False)
    drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg ([^>]*?)width="[\d.]+pt" ?height="[\d.]+pt"', r"<svg \1", svg, count=1)
    for color, name in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def perplexity_by_length(axes: Axes, models: Sequence[Evaluation]) -> None:
    """One line a model: perplexity over the last tokens of windows of each length."""
    places = series([model.name for model in models])
    drawn = {model.name: {score.length: score.value for score in model.perplexity} for model in models}
    for model in models:
        spread = [score.stderr or 0.0 for score in model.perplexity]
        values = drawn[model.name]
        axes.errorbar(
            list(values), list(values.values()), yerr=spread, label=model.name, elinewidth=1, **style(places[model.name])
        )
    token_axis(axes, sorted({length for values in drawn.values() for length in values}))
    _perplexity_axis(axes, drawn)
    axes.set_xlabel("window, tokens")


def perplexity_by_position(axes: Axes, models: Sequence[Evaluation], native_window: int | None) -> None:
    """One line a model: perplexity at each position of the longest windows; the native window is marked."""
    places = series([model.name for model in models])
    drawn: dict[str, dict[float, float]] = {}
    for model in models:
        if (curve := model.by_position) is not None:
            middles = [(low * high) ** 0.5 for low, high in pairwise(curve.edges)]
            # The first bucket has next to no context; it would set the scale of the whole plot.
            drawn[model.name] = values = dict(list(zip(middles, curve.perplexity, strict=True))[1:])
            line = style(places[model.name]) | {"marker": ""}
            axes.plot(list(values), list(values.values()), label=model.name, **line)
    last = max((position for values in drawn.values() for position in values), default=0.0)
    if native_window and native_window < last:
        axes.axvline(native_window, color=QUIET, linewidth=1)
        side = "left" if native_window**2 < 64 * last else "right"  # where there is room
        _note(axes, "native window ends", (native_window, 1), ("data", "axes fraction"), side)
    token_axis(axes, [])
    _perplexity_axis(axes, drawn)
    axes.set_xlabel("position in the window, tokens")


def task_bars(axes: Axes, models: Sequence[Evaluation]) -> None:
    """A group of bars for each short task, with one standard error."""
    names = sorted({score.name for model in models for score in model.tasks})
    places = series([model.name for model in models])
    height = 0.8 / max(1, len(models))
    for index, model in enumerate(models):
        scores = {score.name: score for score in model.tasks}
        at = [row + (index - (len(models) - 1) / 2) * height for row, name in enumerate(names) if name in scores]
        found = [scores[name] for name in names if name in scores]
        color = _SERIES[places[model.name] % len(_SERIES)]
        errors = [score.stderr or 0.0 for score in found]
        axes.barh(at, [s.value for s in found], height * 0.86, xerr=errors, color=color, ecolor=INK, label=model.name)
        for place, score, error in zip(at, found, errors, strict=True):
            axes.annotate(
                f"{score.value:.3f}", (score.value + error, place), (4, 0), textcoords="offset points", va="center", fontsize=9
            )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.14 * axes.get_xlim()[1])


def needles_by_length(axes: Axes, models: Sequence[Evaluation]) -> None:
    """One line a model: the share of single needles found in prompts of each length."""
    places = series([model.name for model in models])
    lengths: set[int] = set()
    for model in models:
        found = model.scores.needle
        lengths |= found.keys()
        axes.plot(list(found), [100 * share for share in found.values()], label=model.name, **style(places[model.name]))
    token_axis(axes, sorted(lengths))
    axes.set_ylim(-4, 104)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:.0f}%"))
    axes.set_xlabel("prompt, tokens")


def needle_map(axes: Axes, model: Evaluation, task: str = "single") -> None:
    """Length by depth: the share of needles that the model found."""
    cells = {(needle.length, needle.depth): needle.value for needle in model.needles if needle.task == task}
    lengths, depths = sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})
    for (length, depth), value in cells.items():
        x, y = lengths.index(length), depths.index(depth)
        axes.add_patch(Rectangle((x, y), 0.96, 0.92, facecolor=HEAT, alpha=0.06 + 0.94 * value, linewidth=0))
        axes.text(
            x + 0.48,
            y + 0.46,
            f"{100 * value:.0f}",
            ha="center",
            va="center",
            fontsize=9.5,
            color=ON_HEAT if value > 0.55 else INK,
        )
    axes.set_xlim(0, len(lengths))
    axes.set_ylim(len(depths), 0)
    axes.set_xticks([place + 0.48 for place in range(len(lengths))], [_tokens(length) for length in lengths])
    axes.set_yticks([place + 0.46 for place in range(len(depths))], [f"{depth:.0%}" for depth in depths])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_title(model.name)


def training_curves(axes: Axes, steps: Sequence[dict[str, Any]]) -> None:
    """The objectives of every step, and their values on held-out windows as points."""
    names = [name for name in get_args(Objective) if any(name in row for row in steps)]
    for place, name in enumerate(names):
        color = _SERIES[(place + 2) % len(_SERIES)]
        rows = [row for row in steps if name in row]
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], color=color, label=name, linewidth=1.6)
        held = [row for row in steps if name in row.get("validation", {})]
        axes.plot(
            [row["step"] for row in held], [row["validation"][name] for row in held], color=color, marker="o", linestyle="none"
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step (points: held-out windows)")


def layer_kl(axes: Axes, before: Sequence[float], after: Sequence[float]) -> None:
    """Divergence of each layer's relations from the native model's, before and after training."""
    layers = range(1, len(before) + 1)
    axes.vlines(list(layers), after, before, color=GRID, linewidth=3, zorder=1)
    axes.plot(layers, before, label="stretched", **(style(1) | {"linestyle": "none"}))
    axes.plot(layers, after, label="restored", **(style(2) | {"linestyle": "none"}))
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("KL divergence, nats")


def before_after(models: Sequence[Evaluation]) -> str:
    """A picture that stands alone: perplexity by length beside needles, or short tasks where none were asked for."""
    with theme():
        drawing, axes = figure(10.4, 3.9, 2, (1.25, 1))
        perplexity_by_length(axes[0], models)
        axes[0].set_title("Perplexity on held-out books (lower is better)")
        if any(model.needles for model in models):
            needles_by_length(axes[1], models)
            axes[1].set_title("Needles found (higher is better)")
        else:
            task_bars(axes[1], models)
            axes[1].set_title("Short tasks (higher is better)")
        legend(drawing, axes[0])
        svg = to_svg(drawing, _told(models))
    return standing_alone(svg)


def _told(models: Sequence[Evaluation]) -> str:
    """What the picture ends with, in words."""
    length = max(score.length for model in models for score in model.perplexity)
    read = [f"{model.name} {model.scores.perplexity[length]:,.1f}" for model in models if length in model.scores.perplexity]
    found = [f"{model.name} {model.scores.needle[length]:.0%}" for model in models if length in model.scores.needle]
    needles = f"; needles found: {', '.join(found)}" if found else ""
    return f"Before and after. Perplexity at {length:,} tokens: {', '.join(read)}{needles}"


def standing_alone(svg: str) -> str:
    """The drawing with its colours inside and a panel behind, for a file of its own."""
    background = '<rect width="100%" height="100%" rx="10" fill="var(--panel)"/>'
    return re.sub(r"(<svg [^>]*>)", rf"\1<style>{THEME}</style>{background}", svg, count=1)


def legend(drawing: Figure, axes: Axes) -> None:
    """One legend above all panels."""
    handles, names = axes.get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside upper left", ncols=len(names), handlelength=2.6, borderpad=0)


def style(place: int) -> dict[str, Any]:
    return {
        "color": _SERIES[place % len(_SERIES)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _LINES[place % len(_LINES)],
        # Where two lie on one another, it is the restored model that is asked about.
        "zorder": 3 if place == _ROLES["restored"] else 2,
    }


def token_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(int(value))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if 0 < len(lengths) <= _MOST_TICKS:
        axes.set_xticks(lengths)


def _perplexity_axis(axes: Axes, drawn: dict[str, dict[Any, float]]) -> None:
    """Logarithmic where needed; a model that breaks down leaves the plot instead of flattening the others."""
    drawn = {name: {at: value for at, value in values.items() if math.isfinite(value)} for name, values in drawn.items()}
    worst = sorted((max(values.values()), name) for name, values in drawn.items() if values)
    if len(worst) > 1 and worst[-1][0] > _OFF_SCALE * worst[-2][0]:
        value, name = worst[-1]
        axes.set_ylim(top=1.5 * worst[-2][0])
        _note(axes, f"{name} ↑ {value:,.0f}", (1, 1), "axes fraction")
    least = min((value for values in drawn.values() for value in values.values()), default=1.0)
    axes.set_ylim(bottom=0.9 * least)
    if axes.get_ylim()[1] > _OFF_SCALE * least:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}"))
    axes.set_ylabel("perplexity")


def _note(axes: Axes, text: str, at: tuple[float, float], coordinates: Any, side: str = "right") -> None:
    place: dict[str, Any] = {"xycoords": coordinates, "textcoords": "offset points", "ha": side, "va": "top"}
    axes.annotate(text, at, (-5 if side == "right" else 5, -2), fontsize=9.5, color=QUIET, **place)


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else f"{count:,}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the before-after picture of an evaluation.")
    parser.add_argument("evaluation", type=Path, help="evaluation.json of `ard eval` or `ard restore`")
    parser.add_argument("picture", type=Path, help="the .svg file to write")
    given = parser.parse_args(arguments)
    found = EvaluationReport.model_validate_json(given.evaluation.read_bytes())
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    given.picture.write_text(before_after(found.models), "utf-8")


if __name__ == "__main__":
    main()
