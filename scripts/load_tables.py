"""Write the tables of docs/results/load-*.json into docs/loadtests.md.

    python -m scripts.load_tables

The page marks a table's place with two comments: `<!-- lengths FILE -->` or `<!-- cost FILE SHORT LONG -->` (the lengths in
tokens), and `<!-- end -->`. They are the tables of `ard loadtest --cost`. A place whose file is not there yet stays as it is,
and a test fails when the page and its results differ.
"""

import re
from pathlib import Path

from loadtests.cost import against, by_length, chosen_lengths, markdown
from loadtests.output import read_result

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "loadtests.md"
_PLACE = re.compile(r"(<!-- (lengths|cost) (\S+?)((?: \d+)*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str, results: Path = ROOT / "docs" / "results") -> str:
    """The page with every table as its results file has it now."""
    return _PLACE.sub(lambda place: f"{place[1]}{_table(place, results)}{place[6]}", text)


def _table(place: re.Match[str], results: Path) -> str:
    if not (results / place[3]).exists():
        return place[5]
    result = read_result(results / place[3])
    if place[2] == "lengths":
        return markdown(by_length(result))
    return markdown(against(result, *chosen_lengths(result, *map(int, place[4].split()))))


if __name__ == "__main__":
    main()
