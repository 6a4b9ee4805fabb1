"""Draw docs/images/kernel.svg from a results file of the kernels: time and memory against length, ours and the peers'.

python -m scripts.speed_plots docs/results/kernel-h100.json docs/images/kernel.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from restore import plots

# The prefix of a peer's figures in a row, its name, and its place in the palette.
PEERS = (("reference", "LinearARD", 1), ("dense", "dense PyTorch", 0), ("compiled", "torch.compile", 4),
         ("flex", "FlexAttention", 3))  # fmt: skip
OURS = 2


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


def _series(axes: Axes, rows: list[dict[str, Any]], figure: str) -> None:
    every = [("", "ours", OURS), *((f"{prefix}_", name, place) for prefix, name, place in PEERS)]
    for prefix, name, place in every:
        points = {row["T"]: row[prefix + figure] for row in rows if prefix + figure in row}
        if points:
            axes.plot(list(points), list(points.values()), label=name, **plots.style(place))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    plots.token_axis(axes, [row["T"] for row in rows])
    axes.set_xlabel("tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw time and memory of the kernels against length.")
    parser.add_argument("results", type=Path, help="a results file of python -m restore.kernels.bench")
    parser.add_argument("picture", type=Path, help="the .svg file to write")
    given = parser.parse_args()
    given.picture.write_text(picture(json.loads(given.results.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
