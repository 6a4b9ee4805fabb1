"""Program text to train on, as unlike books as text gets: python -m scripts.code_text OUT FOLDER... [--mb 24]

The .py files under every FOLDER, in order of their paths, joined to documents of about 400 kB, each a long text of one project.
"""

import argparse
from pathlib import Path

_DOCUMENT_BYTES = 400_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the documents")
    parser.add_argument("folders", type=Path, nargs="+", help="where sources lie")
    parser.add_argument("--mb", type=float, default=24, help="megabytes that are enough (default: 24)")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    written, number = 0, 0
    for folder in given.folders:
        parts: list[str] = []
        for file in sorted(folder.rglob("*.py")):
            parts.append(file.read_text(encoding="utf-8", errors="replace"))
            if sum(map(len, parts)) >= _DOCUMENT_BYTES:
                (given.out / f"{folder.name}-{number:03}.txt").write_text("\n".join(parts), encoding="utf-8")
                written, number, parts = written + sum(map(len, parts)), number + 1, []
            if written >= 1e6 * given.mb:
                return


if __name__ == "__main__":
    main()
