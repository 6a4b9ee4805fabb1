"""Write the tables of docs/results/quality-*.json into the pages that show them.

    python -m scripts.quality_table

A page marks a table's place with two comments, `<!-- quality FILE RUN... -->` and `<!-- end -->`; RUN counts the runs of FILE
from 0. Several runs stand side by side, native and stretched models once; those of one recipe share a column, with the mean and
the least and most of its seeds. With `bars` for `quality` the table says what was to be reached, and what `default` reached.
A test fails when a page and its results differ.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from scripts.quality_bars import bars

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "evaluation.md"]
_PLACE = re.compile(r"(<!-- (quality|bars) (\S+) ([\d ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NAMES = {
    "native": "native",
    "none": "stretched, untouched",
    "twin": "native after as much text (twin)",
}
_NATIVE_WINDOW = "8192"  # of the model whose bars are told
# A share of likelihood over the items of a task that is there already; it rises where a model loses its preferences.
UNCOUNTED = frozenset({"truthfulqa_mc2"})


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """The page with every table as its results file has it now."""
    return _PLACE.sub(lambda place: f"{place[1]}{_lines_of(place)}{place[5]}", text)


def _lines_of(place: re.Match[str]) -> str:
    columns = gather(ROOT / "docs" / "results" / place[3], map(int, place[4].split()))
    lines = bars(columns, "default", UNCOUNTED, _NATIVE_WINDOW) if place[2] == "bars" else _table(columns)
    return "\n".join(lines) + "\n"


def gather(path: Path, numbers: Iterable[int]) -> dict[str, list[dict[str, Any]]]:
    """The rows of some runs of a results file by recipe, those of its seeds together."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    columns: dict[str, list[dict[str, Any]]] = {}
    for row in (row for number in numbers for row in runs[number]["rows"]):
        untouched = row["recipe"] in ("native", "none")  # no restoration changes it from run to run
        told = row["rope"] == "linear" or (row["recipe"] == "none" and row["rope"] != "yarn")
        recipe = "twin" if row["rope"] == "none" else f"{row['recipe']}, {row['rope']} RoPE" if told else row["recipe"]
        column = columns.setdefault(recipe, [])
        if not untouched or not column:
            column.append(row)
    return columns


def _table(columns: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = ["| | " + " | ".join(_title(recipe, len(rows)) for recipe, rows in columns.items()) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    many = [*columns.values()]
    lines += _lines(many, "ppl", lambda length: f"perplexity, {int(length):,} tokens", "{:,.1f}")
    lines += _lines(many, "needle", lambda length: f"needles found, {int(length):,} tokens", "{:.0%}")
    for use in many[0][0].get("uses", {}):
        lines += _lines(many, "uses", lambda length: f"{use}, {int(length):,} tokens", "{:.0%}", use)  # noqa: B023 - as below
    if "sliding" in many[0][0]:
        lines += _lines(many, "sliding", str, "{:,.1f}")
    lines += _lines(many, "short", lambda task: f"{task}, {'share' if task in UNCOUNTED else 'accuracy'}", "{:.3f}")
    lines += _lines(many, "short_perplexity", lambda task: f"{task}, perplexity of the last word", "{:.1f}")
    for title, kind in (("mean of the accuracies over native", "retention"), ("the same, beyond guessing", "beyond_guessing")):
        cells = (_cell(rows, lambda row: row[kind], "{:.1%}") for rows in many)  # noqa: B023 - used before it changes
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _title(recipe: str, seeds: int) -> str:
    if recipe.startswith("none, "):
        return recipe.replace("none", "stretched", 1)
    return _NAMES.get(recipe, f"restored ({recipe}{f', {seeds} seeds' if seeds > 1 else ''})")


def _lines(
    columns: list[list[dict[str, Any]]], kind: str, title: Callable[[str], str], style: str, part: str | None = None
) -> list[str]:
    """A line for each figure of a kind, or of a part of it."""

    def figures(row: dict[str, Any]) -> dict[str, float]:
        found: dict[str, float] = row[kind] if part is None else row[kind][part]
        return found

    def line(key: str) -> str:
        return " | ".join([title(key), *(_cell(rows, lambda row: figures(row)[key], style) for rows in columns)])

    return [f"| {line(key)} |" for key in figures(columns[0][0])]


def _cell(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float], style: str) -> str:
    """The mean over seeds, and the least and most of them where they differ."""
    values = [value(row) for row in rows]
    if None in values:
        return "–"
    mean, least, most = (style.format(number) for number in (fmean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


if __name__ == "__main__":
    main()
