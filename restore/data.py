"""Documents in, windows of token ids out: read, split by document, tokenized once, packed, shuffled by seed.

The order of windows is a pure function of (seed, epoch), so a resumed run continues where it stopped without any stored
iterator state.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ard_serve.console import progress
from ard_serve.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT_SUFFIXES = {".txt", ".md"}
_SUFFIXES = _TEXT_SUFFIXES | {".jsonl", ".parquet"}
_TEXT_FIELD = "text"
_TOKENIZE_CHARS, _PIECES_AT_ONCE = 50_000, 16


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    source: str
    text: str


@dataclass(frozen=True)
class TokenStream:
    """Documents packed head to tail.

    Attributes:
        ids: [N] token ids.
        documents: how many documents it holds.
        sha256: identifies the ids.
    """

    ids: np.ndarray
    documents: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.tobytes()).hexdigest()


def read_documents(sources: Sequence[str]) -> list[Document]:
    """Read every source: a file, a folder of files, or a dataset name that `datasets` resolves.

    Raises:
        DataError: names the file, and the line where there is one.
    """
    documents: list[Document] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
            if not files:
                raise DataError(f"{path}: no {', '.join(sorted(_SUFFIXES))} file in this folder")
            for file in files:
                documents.extend(_read_file(file))
        elif path.exists():
            documents.extend(_read_file(path))
        else:
            documents.extend(_read_dataset(source))
    return documents


def write_documents(documents: Sequence[Document], path: Path) -> None:
    """Write documents as a JSONL file that `read_documents` reads back."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({_TEXT_FIELD: document.text, "source": document.source}) + "\n" for document in documents)


def _read_file(path: Path) -> Iterator[Document]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    elif path.suffix in _TEXT_SUFFIXES:
        text = _decode(path)
        if not text.strip():
            raise DataError(f"{path}: the file is empty")
        yield Document(str(path), text)
    else:
        raise DataError(f"{path}: unknown kind of file; known: {', '.join(sorted(_SUFFIXES))}")


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        # Books and exports from Windows begin with a byte order mark, which is no text.
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        rest, at = error.object, error.start
        line = rest.count(b"\n", 0, at) + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte 0x{rest[at]:02x}); convert the file first") from None


def json_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a JSONL file that are not blank, with their numbers.

    Only a newline ends one: a JSON string may hold what Python's `splitlines` takes for a line's end, such as U+2028.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is empty.
    """
    lines = [(number, line) for number, line in enumerate(_decode(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: the file is empty")
    return lines


def parse_line(path: Path, number: int, line: str) -> Any:
    """What a line of JSON holds; raises ValueError where it is none, and DataError for text that cannot be encoded."""
    value = json.loads(line)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{path}:{number}: holds half a character ({half} alone); write it whole or leave it out") from None
    return value


def _read_jsonl(path: Path) -> Iterator[Document]:
    for number, line in json_lines(path):
        try:
            text = parse_line(path, number, line)[_TEXT_FIELD]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise DataError(f'{path}:{number}: expected a JSON object with a string field "{_TEXT_FIELD}"')
        yield Document(f"{path}:{number}", text)


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow.parquet as pq

    try:
        column = pq.read_table(path, columns=[_TEXT_FIELD]).column(_TEXT_FIELD)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f'{path}: cannot read column "{_TEXT_FIELD}" ({str(error).splitlines()[0]})') from None
    for number, text in enumerate(column.to_pylist(), 1):
        if not isinstance(text, str):
            raise DataError(f'{path}: row {number}: column "{_TEXT_FIELD}" holds no string')
        yield Document(f"{path}:{number}", text)


def _read_dataset(name: str) -> Iterator[Document]:
    if name.startswith((".", "/", "~")) or name.endswith(tuple(_SUFFIXES)):
        raise DataError(f"{name}: no such file or folder")
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # noqa: BLE001 - any failure to find or fetch it means the same to the user
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{name}: neither a file nor a folder here, and not a dataset that could be loaded ({reason})"
        ) from None
    if _TEXT_FIELD not in rows.column_names:
        raise DataError(f'{name}: the dataset has no column "{_TEXT_FIELD}" but {", ".join(rows.column_names)}')
    for number, text in enumerate(rows[_TEXT_FIELD], 1):
        if not isinstance(text, str):
            raise DataError(f'{name}: row {number}: column "{_TEXT_FIELD}" holds no string')
        yield Document(f"{name}:{number}", text)


def split_documents(documents: Sequence[Document], validation_share: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Split whole documents into (train, validation); at least one document on each side.

    A corpus of one document cannot be split and is refused: validation on trained text proves nothing.
    """
    if len(documents) < 2:
        count = f"{len(documents)} document{'s' * (len(documents) != 1)}"
        raise DataError(f"{count} in the data: at least 2 are needed, one is held out for validation")
    order = np.random.default_rng(seed).permutation(len(documents))
    held = min(len(documents) - 1, max(1, round(validation_share * len(documents))))
    validation = set(order[:held].tolist())
    train = [document for index, document in enumerate(documents) if index not in validation]
    return train, [documents[index] for index in sorted(validation)]


def tokenize(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> TokenStream:
    """Tokenize and pack documents: BOS before each where the tokenizer puts one, EOS behind it.

    Raises:
        DataError: a token id the model has no embedding for.
    """
    starts = bos_ids(tokenizer)
    ends = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    parts: list[np.ndarray] = []
    with progress("tokenize", sum(len(document.text) for document in documents)) as bar:
        for document in documents:
            ids = list(starts)
            # Together, because the tokenizer takes a thread for each.
            left = _pieces(document.text)
            while pieces := list(islice(left, _PIECES_AT_ONCE)):
                for found in tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]:
                    ids += found
                bar.advance(sum(map(len, pieces)))
            check_embedded(document.source, ids, vocab_size)
            parts.append(np.array(ids + ends, dtype=np.int32))
    return TokenStream(np.concatenate(parts), len(documents))


def check_embedded(source: str, ids: Sequence[int] | np.ndarray, vocab_size: int) -> None:
    """Raise DataError where a text holds a token id that the model has no embedding for."""
    if len(ids) and (most := max(ids)) >= vocab_size:
        limit = f"the model has {vocab_size} embeddings; use the model's own tokenizer"
        raise DataError(f"{source}: token id {most}, but {limit}")


def bos_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer itself puts before a text; SmolLM2 has a BOS token and does not."""
    with_special = tokenizer("a")["input_ids"]
    return [tokenizer.bos_token_id] if with_special and with_special[0] == tokenizer.bos_token_id else []


def _pieces(text: str) -> Iterator[str]:
    """Cut at line ends, where no byte-level tokenizer merges across, so that progress shows and memory stays flat."""
    at = 0
    while at < len(text):
        end = at + _TOKENIZE_CHARS
        newline = text.rfind("\n", at, end) if end < len(text) else -1
        cut = newline + 1 if newline > at else end
        yield text[at:cut]
        at = cut


class Windows:
    """Windows of `length` tokens over a stream, without end: each epoch a new order and a new offset, both by seed."""

    def __init__(self, stream: TokenStream, length: int, seed: int) -> None:
        """Raises DataError when the stream is shorter than one window."""
        if len(stream.ids) < length:
            raise DataError(
                f"{len(stream.ids)} tokens of text, fewer than one window of {length}: give more data or a shorter window"
            )
        self.length = length
        self._ids, self._seed = stream.ids, seed
        # The last window is given up where the stream is longer, so that every epoch can start at another offset.
        self.per_epoch = max(1, len(stream.ids) // length - 1)
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Window number `index` of the endless sequence: [1, length] int64."""
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            # Drawing an order takes longer than a small model's step when there are millions of windows.
            self._epoch, self._starts = epoch, self._starts_of(epoch)
        start = int(self._starts[place])
        return torch.from_numpy(self._ids[start : start + self.length].astype(np.int64))[None]

    def _starts_of(self, epoch: int) -> np.ndarray:
        """Where each window of an epoch starts, in the epoch's order."""
        generator = np.random.default_rng((self._seed, self.length, epoch))
        slack = len(self._ids) - self.per_epoch * self.length
        offset = int(generator.integers(0, slack + 1))
        starts: np.ndarray = offset + generator.permutation(self.per_epoch) * self.length
        return starts


def evenly_spaced(stream: TokenStream, length: int, count: int) -> list[torch.Tensor]:
    """At most `count` windows spread over the stream, always the same: what validation reads. Each [1, length]."""
    fits = len(stream.ids) // length
    if fits == 0:
        raise DataError(f"{len(stream.ids)} tokens held out for validation, fewer than one window of {length}")
    starts = np.linspace(0, len(stream.ids) - length, min(count, fits)).astype(int)
    return [torch.from_numpy(stream.ids[start : start + length].astype(np.int64))[None] for start in starts]
