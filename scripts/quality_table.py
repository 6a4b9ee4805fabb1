"""Write the tables of docs/results/quality-*.json into the pages that show them.

    python scripts/quality_table.py

A page marks a table's place with two comments, `<!-- quality FILE RUN -->` and `<!-- end -->`; RUN counts the runs of FILE
from 0. A test fails when a page and its results differ.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "evaluation.md"]
_PLACE = re.compile(r"(<!-- quality (\S+) (\d+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NAMES = {"native": "native", "none": "stretched, untouched"}


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """The page with every table as its results file has it now."""
    return _PLACE.sub(lambda place: f"{place[1]}{_table(place[2], int(place[3]))}{place[4]}", text)


def _table(file: str, run: int) -> str:
    rows = json.loads((ROOT / "docs" / "results" / file).read_text(encoding="utf-8"))["runs"][run]["rows"]
    lines = ["| | " + " | ".join(_NAMES.get(row["recipe"], f"restored ({row['recipe']})") for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    lines += _lines(rows, "ppl", lambda length: f"perplexity, {int(length):,} tokens", "{:,.1f}")
    lines += _lines(rows, "needle", lambda length: f"needles found, {int(length):,} tokens", "{:.0%}")
    lines += _lines(rows, "short", lambda task: f"{task}, accuracy", "{:.3f}")
    lines += _lines(rows, "short_perplexity", lambda task: f"{task}, perplexity of the last word", "{:.1f}")
    return "\n".join(lines) + "\n"


def _lines(rows: list[dict[str, Any]], kind: str, title: Callable[[str], str], style: str) -> list[str]:
    return ["| " + " | ".join([title(key), *(style.format(row[kind][key]) for row in rows)]) + " |" for key in rows[0][kind]]


if __name__ == "__main__":
    main()
