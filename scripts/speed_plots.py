"""Draw docs/images/kernel.svg and engine.svg: time and memory of the kernels and of training steps against length.

python -m scripts.speed_plots docs/results/kernel-h100.json docs/images/kernel.svg
python -m scripts.speed_plots docs/results/engine-h200.json docs/images/engine.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from restore import plots

# The prefix of a peer's figures in a row, its name, and its place in the palette.
PEERS = (("reference", "LinearARD", 1), ("dense", "dense PyTorch", 0), ("compiled", "torch.compile", 4),
         ("flex", "FlexAttention", 3))  # fmt: skip
OURS = 2
# Recipes whose steps have windows of one length alone, and what such a step does.
ALONE = {"distill": "distils", "cpt": "reads"}


def picture(results: dict[str, Any], op: str = "self_relation", channels: int = 128) -> str:
    """An SVG of two panels on logarithmic axes, where a straight line of slope 1 is memory linear in length."""
    rows = [row for row in results["rows"] if (row["op"], row["head_dim"]) == (op, channels)]
    heads = rows[0]["heads"]
    with plots.theme():
        drawing, axes = plots.figure(10.4, 4.3, 2)
        _series(axes[0], rows, "fwd_bwd_ms")
        axes[0].set_title("Forward and backward, ms (lower is better)")
        _series(axes[1], rows, "extra_mib")
        fit = results["memory_fit"][f"{op} {channels}"]
        lengths = [row["T"] for row in rows]
        line = [(fit["kib_per_token"] * tokens + fit["kib_at_0"]) / 1024 for tokens in lengths]
        line_is = f"{fit['kib_per_token']:.2g} KiB a token, at most {fit['largest_distance_percent']:.1f}% off"
        told = f"ours and a straight line, {line_is}"
        axes[1].plot(lengths, line, color=plots.QUIET, linewidth=1, linestyle="--", zorder=3)
        axes[1].set_title("Memory beyond the inputs, MiB (lower is better)")
        axes[1].annotate(told, (0.98, 0.04), xycoords="axes fraction", ha="right", fontsize=9.5, color=plots.QUIET)
        plots.legend(drawing, axes[0])
        # When it was measured makes a picture of older results tell itself.
        label = f"Time and memory of a relation KL against length, {heads} heads of {channels} channels, {results['date']}"
        return plots.standing_alone(plots.to_svg(drawing, label))


def engine_picture(results: dict[str, Any]) -> str:
    """An SVG of two panels: tokens/s and peak memory of steps of one kind of window, memory beside its forecast."""
    rows = [row for run in results["runs"] for row in run["rows"] if row["recipe"] in ALONE and "seconds" in row]
    rows = [row for row in rows if row.get("recompute", "auto") == "auto"]
    every: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (-row["hidden_size"], row["recipe"], row["window"] + row["long_window"])):
        every.setdefault((row["shape"], row["recipe"]), []).append(row)
    shapes = list(dict.fromkeys(shape for shape, _ in every))
    with plots.theme():
        drawing, axes = plots.figure(10.4, 4.3, 2)
        for (shape, recipe), points in every.items():
            lengths = [row["window"] + row["long_window"] for row in points]
            # The palette's solid lines: one colour a shape.
            look: dict[str, Any] = plots.style(OURS + shapes.index(shape)) | (
                {"linestyle": (0, (1.2, 1.6))} if recipe == "distill" else {}
            )
            name = f"{shape.upper()} {ALONE[recipe]}"
            axes[0].plot(lengths, [row["tokens_per_s"] for row in points], label=name, **look)
            axes[1].plot(lengths, [row["peak_gib"] for row in points], **look)
            forecast: dict[str, Any] = {"color": plots.INK, "marker": "_", "linestyle": "none", "zorder": 4}
            axes[1].plot(lengths, [row["forecast_gib"] for row in points], **forecast)
        for panel, title in zip(axes, ("Tokens/s (higher is better)", "Peak memory, GiB (bars: its forecast)"), strict=True):
            _logarithmic(panel, sorted({row["window"] + row["long_window"] for row in rows}))
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.set_xlabel("window, tokens")
            panel.set_title(title)
        plots.legend(drawing, axes[0])
        label = f"Tokens a second and peak memory of training steps against the window, {results['runs'][-1]['date']}"
        return plots.standing_alone(plots.to_svg(drawing, label))


def _logarithmic(axes: Axes, lengths: list[int]) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    plots.token_axis(axes, lengths)


def _series(axes: Axes, rows: list[dict[str, Any]], figure: str) -> None:
    every = [("", "ours", OURS), *((f"{prefix}_", name, place) for prefix, name, place in PEERS)]
    for prefix, name, place in every:
        points = {row["T"]: row[prefix + figure] for row in rows if prefix + figure in row}
        if points:
            axes.plot(list(points), list(points.values()), label=name, **plots.style(place))
    _logarithmic(axes, [row["T"] for row in rows])
    axes.set_xlabel("tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw time and memory against length.")
    parser.add_argument("results", type=Path, help="a results file of python -m restore.kernels.bench or restore.bench")
    parser.add_argument("picture", type=Path, help="the .svg file to write")
    given = parser.parse_args()
    results = json.loads(given.results.read_text(encoding="utf-8"))
    drawn = engine_picture(results) if "runs" in results else picture(results)
    given.picture.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
