"""Whether an evaluation can be made at all: its text, prompts and tasks, read before hours go into what it will measure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from restore import data
from restore.evaluation import harness, perplexity, retrieval, tasks
from restore.evaluation.config import EvalConfig
from restore.evaluation.haystack import Haystack
from restore.evaluation.items import read_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check(tokenizer: "PreTrainedTokenizerBase", config: EvalConfig) -> None:
    """Raise what a whole evaluation would raise for its settings: no text or too little, prompts without room, unknown tasks.

    Args:
        tokenizer: of the model that will be measured.
        config: what to measure, its lengths stated.
    """
    check_tasks(config)
    _, documents = encode(tokenizer, config.data)
    bos = data.bos_ids(tokenizer)
    perplexity.cut_windows(documents, bos, config.lengths, config.windows)
    if config.needle_samples:
        retrieval.check(Haystack(tokenizer, documents, bos), config)


def check_tasks(config: EvalConfig) -> None:
    """The part that needs no tokenizer: every task file reads, the harness knows every task."""
    for path in tasks.find_tasks(config.tasks):
        read_items(path, config.limit)
    if config.harness:
        harness.known(config.harness)


def encode(tokenizer: "PreTrainedTokenizerBase", sources: Sequence[str]) -> tuple[list[str], list[np.ndarray]]:
    """Where every document came from, and its token ids without the tokenizer's own additions."""
    texts = data.read_documents(sources)
    ids = [np.array(tokenizer(each.text, add_special_tokens=False, verbose=False)["input_ids"]) for each in texts]
    return [each.source for each in texts], ids
