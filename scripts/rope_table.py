"""Write the table of docs/results/rope-types-*.json into docs/rope.md: python -m scripts.rope_table

The page marks its place with two comments, `<!-- rope FILE -->` and `<!-- end -->`. A test fails when page and results differ.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "rope.md"
_PLACE = re.compile(r"(<!-- rope (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """The page with its table as the results file has it now."""
    return _PLACE.sub(lambda place: f"{place[1]}{''.join(_lines(place[2]))}{place[3]}", text)


def _lines(file: str) -> Iterator[str]:
    rows = json.loads((ROOT / "docs" / "results" / file).read_text(encoding="utf-8"))["rows"]
    lengths = list(rows[0]["ppl"])
    yield f"| perplexity of windows of | {' | '.join(f'{int(length):,}' for length in lengths)} |\n"
    yield f"|{'---|' * (len(lengths) + 1)}\n"
    for row in rows:
        yield f"| {row['rope']} | {' | '.join(_told(row['ppl'][length]) for length in lengths)} |\n"


def _told(perplexity: float) -> str:
    return f"{perplexity:,.0f}" if perplexity >= 100 else f"{perplexity:.1f}"


if __name__ == "__main__":
    main()
