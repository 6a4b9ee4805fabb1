"""Draw the README's picture from docs/results/quality-*.json: perplexity and needles by length, seeds together.

    python -m scripts.quality_plot

A line is the mean over the seeds of a recipe (of perplexity the geometric one), a bar of perplexity one standard error of it.
"""

import math
from collections.abc import Sequence
from typing import Any

from restore import plots
from restore.evaluation.results import Evaluation, NeedleScore, PerplexityScore
from scripts.quality_table import ROOT, gather

PICTURE = ROOT / "docs" / "images" / "before-after.svg"
_FILE, _RUNS = "quality-SmolLM2-135M-Instruct.json", (35, 33, 36, 19, 20, 21, 22, 49, 52, 23, 51, 54)
_NAMES = {"none": "stretched", "default": "restored"}


def main() -> None:
    PICTURE.write_text(picture(), encoding="utf-8")


def picture() -> str:
    """The picture as an SVG file's text."""
    columns = gather(ROOT / "docs" / "results" / _FILE, _RUNS)
    return plots.before_after([_model(_NAMES.get(name, name), rows) for name, rows in columns.items()])


def _model(name: str, seeds: Sequence[dict[str, Any]]) -> Evaluation:
    """One model whose windows and prompts are the seeds' own figures."""
    return Evaluation(
        name=name + (f" ({len(seeds)} seeds)" if len(seeds) > 1 and name != "restored" else ""),
        perplexity=tuple(
            PerplexityScore(length=int(length), window_nll=tuple(math.log(row["ppl"][length]) for row in seeds))
            for length in seeds[0]["ppl"]
        ),
        needles=tuple(
            NeedleScore(task="single", length=int(length), depth=0.5, samples=tuple(row["needle"][length] for row in seeds))
            for length in seeds[0]["needle"]
        ),
    )


if __name__ == "__main__":
    main()
