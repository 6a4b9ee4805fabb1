"""The archives come out as the studies read them: books by their split, tasks in halves, without gsm8k and mmlu."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from scripts import study, study_data

MANIFEST = 'file\ttitle\tsplit\nb.txt\t"Un\ttrain\nc.txt\tC\tvalidation\na.txt\tA\ttest\nd.txt\tD\ttrain\n'
BOOKS = {"MANIFEST.tsv": MANIFEST, **{f"{name}.txt": f"Book {name}, é.\r\n" for name in "abcd"}}
# A carriage return and a line separator end no line; the last line of one file has no end.
TASK = "".join(f'{{"query": "é {i}\u2028\r{i}"}}\n' for i in range(5))
TASKS = {"MANIFEST.tsv": "file\n", "piqa.jsonl": TASK, "arc_easy.jsonl": TASK[:-1]}
UNASKED = ("gsm8k.jsonl", "gsm8k_train_fewshot.jsonl", "mmlu_subset.jsonl", "mmlu_dev_fewshot.jsonl")


def packed(path: Path, files: dict[str, str]) -> str:
    with tarfile.open(path, "w:xz") as tar:
        folder = tarfile.TarInfo(path.name.partition(".")[0])
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
        for name, text in files.items():
            member = tarfile.TarInfo(f"{folder.name}/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return str(path)


@pytest.fixture
def archives(tmp_path: Path) -> list[str]:
    tasks = TASKS | dict.fromkeys(UNASKED, TASK)
    return [packed(tmp_path / "books.tar.xz", BOOKS), packed(tmp_path / "short.tar.xz", tasks)]


def laid_out(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def test_books_lie_by_split_and_tasks_in_the_halves_that_awk_made(archives: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert study_data.main([*archives, str(out)]) == 0
    halves = ["short/", "short/search/", "short/test/"]
    assert laid_out(out) == sorted(
        ["books/train/b.txt", "books/train/d.txt", "books/validation/c.txt", "books/test/a.txt"]
        + [f"{half}{name}.jsonl" for half in halves for name in ("piqa", "arc_easy")]
    )
    assert (out / "books/test/a.txt").read_bytes() == BOOKS["a.txt"].encode()
    for task in ("piqa", "arc_easy"):
        (tmp_path / "whole").write_bytes(TASKS[f"{task}.jsonl"].encode())
        for half, kept in (("search", "NR % 2"), ("test", "NR % 2 == 0")):
            expected = subprocess.run(["awk", kept, tmp_path / "whole"], check=True, capture_output=True).stdout
            assert (out / "short" / half / f"{task}.jsonl").read_bytes() == expected


@pytest.mark.parametrize("example", sorted((study.ROOT / "examples").glob("study-*.yaml")), ids=lambda path: path.stem)
def test_every_study_reads_what_is_laid_out_and_says_how(example: Path, archives: list[str], tmp_path: Path) -> None:
    study_data.main([*archives, str(tmp_path)])
    found = study.Study.resolve(example, {})
    for path in (*found.restore["data"], *found.evaluation.data, *found.evaluation.tasks):
        assert path == "code" or list((tmp_path / path).glob("*.*")), f"{path}: not laid out"
    assert "python -m scripts.study_data ../shared/data/books.tar.xz ../shared/data/short.tar.xz ." in example.read_text()


@pytest.mark.parametrize(
    ("books", "says"),
    [
        (BOOKS | {"MANIFEST.tsv": MANIFEST + "e.txt\tE\ttest\n"}, "'e.txt'"),
        (BOOKS | {"MANIFEST.tsv": MANIFEST + "a.txt\tA\t..\n"}, "train, validation, test"),
        ({"a.txt": "A"}, "MANIFEST.tsv"),
    ],
)
def test_an_archive_that_is_not_these_books_is_refused(
    archives: list[str], tmp_path: Path, books: dict[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    packed(tmp_path / "books.tar.xz", books)
    assert study_data.main([*archives, str(tmp_path / "out")]) == 4
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_lies_there_already_is_not_mixed_with_it(archives: list[str], tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    assert study_data.main([*archives, str(tmp_path)]) == 2
    assert not (tmp_path / "books").exists()
    assert study_data.main([archives[0], str(tmp_path / "none.tar.xz"), str(tmp_path / "out")]) == 4
    assert study_data.main([archives[0], archives[0], str(tmp_path / "out")]) == 4
