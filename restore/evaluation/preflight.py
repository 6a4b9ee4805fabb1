"""Whether an evaluation can be made at all: its text, prompts and tasks, read before hours go into what it will measure."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ard_serve.errors import UsageError
from restore import data, loading
from restore.evaluation import harness, perplexity, retrieval, sliding, tasks
from restore.evaluation.config import EvalConfig
from restore.evaluation.haystack import Haystack
from restore.evaluation.items import read_items
from restore.inspection import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What cuts text into tokens; tokenizer_config.json says other things too, which an export changes.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def check(
    tokenizer: "PreTrainedTokenizerBase",
    config: EvalConfig,
    documents: Sequence[data.Document] | None = None,
    vocab_size: int | None = None,
) -> None:
    """Raise what a whole evaluation would raise for its settings: no text or too little, prompts without room, unknown tasks.

    Args:
        tokenizer: of the model that will be measured.
        config: what to measure, its lengths stated.
        documents: what `config.data` will hold, where it is not written yet.
        vocab_size: embeddings of the model, where it is not known yet that they are enough for the text.
    """
    check_tasks(config)
    if documents is None:
        sources, ids = encode(tokenizer, config.data)
    else:
        sources, ids = [each.source for each in documents], _ids(tokenizer, documents)
    for source, tokens in zip(sources, ids, strict=True):
        if vocab_size is not None:
            data.check_embedded(source, tokens, vocab_size)
    bos = data.bos_ids(tokenizer)
    perplexity.cut_windows(ids, bos, config.lengths, config.windows)
    if config.sliding:
        sliding.split(ids, bos, config.sliding)
    if config.needle_samples:
        retrieval.check(Haystack(tokenizer, ids, bos), config)


def check_folders(folders: Sequence[Path], config: EvalConfig) -> None:
    """`check` with the tokenizer of every model; those that share theirs, as most that are compared, are checked once."""
    seen: set[tuple[object, ...]] = set()
    for folder in dict.fromkeys(folders):
        tokenizer = loading.load_tokenizer(folder)
        files = (folder / name for name in _TOKENIZER_FILES)
        vocab_size = read_config(folder).get("vocab_size")
        key = (*(file.read_bytes() if file.exists() else b"" for file in files), *data.bos_ids(tokenizer), vocab_size)
        if key not in seen:
            check(tokenizer, config, vocab_size=vocab_size)
        seen.add(key)


def check_tasks(config: EvalConfig) -> None:
    """The part that needs no tokenizer: every task file reads, the harness knows every task."""
    for path in tasks.find_tasks(config.tasks):
        read_items(path, config.limit)
    if config.harness:
        harness.known(config.harness)


def encode(tokenizer: "PreTrainedTokenizerBase", sources: Sequence[str]) -> tuple[list[str], list[np.ndarray]]:
    """Where every document came from, and its token ids without the tokenizer's own additions.

    Raises:
        UsageError: no source is named.
        DataError: a source cannot be read.
    """
    if not sources:
        raise UsageError("data: name held-out text to measure on; text the model was trained on proves nothing")
    texts = data.read_documents(sources)
    return [each.source for each in texts], _ids(tokenizer, texts)


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[data.Document]) -> list[np.ndarray]:
    return [np.array(tokenizer(each.text, add_special_tokens=False, verbose=False)["input_ids"]) for each in texts]
