"""The project's archives laid out as the studies read them: python -m scripts.study_data BOOKS.tar.xz SHORT.tar.xz OUT

OUT/books/{train,validation,test} get the books by the column `split` of their MANIFEST.tsv. OUT/short gets the task files,
OUT/short/search their odd lines, which are for choices, and OUT/short/test the even ones; no study asks gsm8k and mmlu.
"""

import argparse
import csv
import sys
import tarfile
from pathlib import Path

from ard_serve.errors import ArdError, DataError, UsageError

_SPLITS = ("train", "validation", "test")
_UNASKED = ("gsm8k", "mmlu")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, help="archive of books and their MANIFEST.tsv")
    parser.add_argument("short", type=Path, help="archive of task files, *.jsonl")
    parser.add_argument("out", type=Path, help="folder that has neither books nor short yet")
    given = parser.parse_args(arguments)
    try:
        for folder in (given.out / "books", given.out / "short"):
            if folder.exists():  # what an earlier layout left there, gsm8k say, would be read as well
                raise UsageError(f"{folder}: exists already; remove it, or give another OUT")
        for name, content in {**_books(given.books), **_tasks(given.short)}.items():
            (given.out / name).parent.mkdir(parents=True, exist_ok=True)
            (given.out / name).write_bytes(content)
    except ArdError as error:
        print(f"study_data: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _books(archive: Path) -> dict[str, bytes]:
    files = _unpacked(archive)
    try:
        rows = csv.DictReader(files["MANIFEST.tsv"].decode().splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        return {f"books/{_SPLITS[_SPLITS.index(row['split'])]}/{row['file']}": files[row["file"]] for row in rows}
    except (KeyError, ValueError) as error:
        raise DataError(f"{archive}: not books with a MANIFEST.tsv of file and split, {', '.join(_SPLITS)} ({error})") from None


def _tasks(archive: Path) -> dict[str, bytes]:
    laid: dict[str, bytes] = {}
    for name, content in _unpacked(archive).items():
        if name.endswith(".jsonl") and not name.startswith(_UNASKED):
            lines = [line + b"\n" for line in content.removesuffix(b"\n").split(b"\n")]
            halves = {"": lines, "search/": lines[::2], "test/": lines[1::2]}
            laid |= {f"short/{half}{name}": b"".join(chosen) for half, chosen in halves.items()}
    if not laid:
        raise DataError(f"{archive}: holds no task files (*.jsonl)")
    return laid


def _unpacked(archive: Path) -> dict[str, bytes]:
    """Every file of an archive by its name alone, whatever folder it lies in."""
    try:
        with tarfile.open(archive) as tar:
            return {Path(member.name).name: found.read() for member in tar if (found := tar.extractfile(member))}
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{archive}: not a readable archive ({error})") from None


if __name__ == "__main__":
    sys.exit(main())
