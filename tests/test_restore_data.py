"""Documents in, windows out: formats, refusals that name file and line, BOS, and an order that only the seed decides."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ard_serve.errors import DataError
from restore.data import Document, TokenStream, Windows, evenly_spaced, read_documents, split_documents, tokenize


@pytest.fixture(scope="module")
def tokenizer(make_checkpoint: Callable[..., Path]) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(make_checkpoint("llama3"))
    return loaded


def test_reads_folders_of_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "b.md").write_text("second")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth", "id": 4}\n')
    pq.write_table(pa.table({"text": ["fifth", "sixth"]}), tmp_path / "d.parquet")
    (tmp_path / "ignored.pdf").write_bytes(b"%PDF")
    documents = read_documents([str(tmp_path)])
    assert [d.text for d in documents] == ["first", "third", "fourth", "fifth", "sixth", "second"]
    assert documents[2].source.endswith("c.jsonl:3")


@pytest.mark.fault("R10")
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"  \n ", "empty.txt: the file is empty"),
        ("latin.txt", "fine\nna\u00efve".encode("latin-1"), "latin.txt:2: not UTF-8 (byte 0xef)"),
        ("broken.jsonl", b'{"text": "ok"}\n{"text": \n', "broken.jsonl:2: expected a JSON object"),
        ("number.jsonl", b'{"text": 5}\n', "number.jsonl:1: expected a JSON object"),
        ("empty.jsonl", b"\n", "empty.jsonl: the file is empty"),
        ("half.jsonl", b'{"text": "ok"}\n{"text": "a \\ud83d b"}\n', "half.jsonl:2: holds half a character (\\ud83d alone)"),
        ("marked.txt", b"\xef\xbb\xbffine\nna\xefve", "marked.txt:2: not UTF-8 (byte 0xef)"),
        ("list.jsonl", b"[1]\n", "list.jsonl:1: expected a JSON object"),
        ("not.parquet", b"PAR?", "not.parquet: cannot read column"),
    ],
)
def test_unreadable_data_names_file_and_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refusal:
        read_documents([str(tmp_path)])
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.fault("R10")
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "book.txt").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"book\.txt: cannot be read \(Input/output error\)"):
        read_documents([str(tmp_path)])


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "two"}\n'.encode())
    assert [document.text for document in read_documents([str(tmp_path)])] == ["one", "two"]


@pytest.mark.fault("R10")
def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        read_documents([str(tmp_path / "nowhere.txt")])
    with pytest.raises(DataError, match=r"no .*txt file in this folder"):
        read_documents([str(tmp_path)])


@pytest.mark.fault("R10")
def test_too_little_text_is_refused_with_both_lengths() -> None:
    stream = TokenStream(np.zeros(50, np.int32), 1)
    with pytest.raises(DataError, match="50 tokens of text, fewer than one window of 64"):
        Windows(stream, 64, seed=0)
    with pytest.raises(DataError, match="50 tokens held out"):
        evenly_spaced(stream, 64, 2)
    with pytest.raises(DataError, match="1 document in the data"):
        split_documents([Document("a", "text")], 0.1, 0)


@pytest.mark.fault("R10")
def test_a_token_the_model_cannot_embed_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"book: token id \d+, but the model has 100 embeddings"):
        tokenize([Document("book", "zebra")], tokenizer, vocab_size=100)


def test_a_dataset_name_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, a name resolves to nothing and the refusal says so; a local dataset script folder is a folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="org/corpus: neither a file nor a folder here, and not a dataset"):
        read_documents(["org/corpus"])
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    assert [d.text for d in read_documents(["org/corpus"])] == ["one", "two"]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows.rename_column("text", "body"))
    with pytest.raises(DataError, match='no column "text" but body'):
        read_documents(["org/corpus"])
    holes = datasets.Dataset.from_dict({"text": ["one", None]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: holes)
    with pytest.raises(DataError, match='org/corpus: row 2: column "text" holds no string'):
        read_documents(["org/corpus"])

    def refuse(name: str, split: str) -> None:
        raise AssertionError

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"not a dataset that could be loaded \(AssertionError\)"):
        read_documents(["org/corpus"])


def test_bos_before_and_eos_behind_each_document(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = tokenize([Document("a", "hi"), Document("b", "yo")], tokenizer, vocab_size=259)
    assert stream.ids.tolist() == [256, *tokenizer("hi")["input_ids"][1:], 257, 256, *tokenizer("yo")["input_ids"][1:], 257]
    tokenizer_without = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer_without.backend_tokenizer.post_processor = None
    assert 256 not in tokenize([Document("a", "hi")], tokenizer_without, vocab_size=259).ids


def test_cutting_long_documents_changes_no_token(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    whole = tokenize([Document("a", text)], tokenizer, vocab_size=259)
    monkeypatch.setattr("restore.data._TOKENIZE_CHARS", 37)
    assert (tokenize([Document("a", text)], tokenizer, vocab_size=259).ids == whole.ids).all()


def test_split_keeps_documents_whole_and_apart() -> None:
    documents = [Document(str(i), "x") for i in range(20)]
    train, held = split_documents(documents, 0.2, seed=3)
    assert len(held) == 4
    assert {d.source for d in train}.isdisjoint(d.source for d in held)
    assert split_documents(documents, 0.2, seed=3) == (train, held)
    assert split_documents(documents, 0.2, seed=4) != (train, held)


def test_window_order_is_a_function_of_the_seed_alone() -> None:
    stream = TokenStream(np.arange(1000, dtype=np.int32), 1)
    first, again, other = (Windows(stream, 64, seed) for seed in (1, 1, 2))
    backwards = [first[i] for i in reversed(range(40))][::-1]
    assert all(torch.equal(a, again[i]) for i, a in enumerate(backwards))
    assert not all(torch.equal(first[i], other[i]) for i in range(first.per_epoch))
    starts = [int(first[i][0, 0]) for i in range(first.per_epoch)]
    assert len(set(starts)) == first.per_epoch, "an epoch visits every window once"
    next_epoch = [int(first[first.per_epoch + i][0, 0]) for i in range(first.per_epoch)]
    assert sorted(next_epoch) != sorted(starts), "and the next one starts at another offset"
    assert all(torch.equal(w[0], torch.arange(int(w[0, 0]), int(w[0, 0]) + 64)) for w in backwards)


def test_validation_windows_are_spread_and_fixed() -> None:
    stream = TokenStream(np.arange(1000, dtype=np.int32), 1)
    assert [int(w[0, 0]) for w in evenly_spaced(stream, 100, 3)] == [0, 450, 900]
    assert len(evenly_spaced(stream, 400, 9)) == 2


def test_jsonl_text_survives_unicode(tmp_path: Path) -> None:
    (tmp_path / "u.jsonl").write_text(json.dumps({"text": "naïve \u2028 日本"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_documents([str(tmp_path)])[0].text == "naïve \u2028 日本"
