"""Short tasks from local JSONL files, scored by likelihood as lm-evaluation-harness scores them.

A file is one task; its items are of one kind, told by their fields:
  cloze            {"context", "continuation"}                 right when greedy decoding writes " " + continuation
  multiple choice  {"query", "choices", "gold"}                the most likely " " + choice after the query
  partial context  {"context_options", "continuation", "gold"} the context under which " " + continuation is most likely
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ard_serve.errors import DataError
from restore.evaluation.likelihood import Likelihood, Request, score
from restore.evaluation.results import TaskScore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Where the harness's own headline divides a choice's log-likelihood by its length in characters.
NORMALIZED = frozenset({"hellaswag", "arc_challenge", "openbookqa"})
_SKIPPED = "fewshot"


@dataclass(frozen=True)
class Item:
    """One question as (context, continuation) pairs; `gold` is the right one, `cloze` asks whether the only one is greedy."""

    pairs: tuple[tuple[str, str], ...]
    gold: int
    cloze: bool

    def judge(self, likelihoods: Sequence[Likelihood]) -> dict[str, float]:
        """The item's metrics: acc, acc_norm (by characters of the choice), or acc and nll for a cloze."""
        if self.cloze:
            return {"acc": float(likelihoods[0].is_greedy), "nll": -likelihoods[0].log_prob}
        by_sum = [likelihood.log_prob for likelihood in likelihoods]
        by_character = [value / (len(text) - 1) for value, (_, text) in zip(by_sum, self.pairs, strict=True)]
        return {"acc": float(np.argmax(by_sum) == self.gold), "acc_norm": float(np.argmax(by_character) == self.gold)}


def find_tasks(sources: Sequence[str]) -> list[Path]:
    """The task files among `sources`, files or folders; pools of few-shot examples are no tasks.

    Raises:
        DataError: a source is missing or a folder without tasks, or two files share a name.
    """
    files: list[Path] = []
    for source in map(Path, sources):
        found = [source] if source.is_file() else sorted(source.glob("*.jsonl"))
        files += [file for file in found if _SKIPPED not in file.stem]
        if not found:
            raise DataError(f"{source}: neither a task file nor a folder with .jsonl files")
    names = [file.stem for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"two task files are named {twice}.jsonl: rename one, the name is the task's")
    return files


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Read a task file; of more than `limit` items take that many, evenly spread.

    Raises:
        DataError: names the file and line of an item that is of no known kind.
    """
    try:
        lines = [(number, line) for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text ({error})") from None
    if not lines:
        raise DataError(f"{path}: the file holds no items")
    chosen = np.linspace(0, len(lines) - 1, min(limit or len(lines), len(lines))).astype(int)
    return [_parse(path, *lines[index]) for index in chosen]


def _parse(path: Path, number: int, line: str) -> Item:
    try:
        item = _item(json.loads(line))
        usable = 0 <= item.gold < len(item.pairs) and all(a.strip() and b.strip() for a, b in item.pairs)
    except (ValueError, KeyError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise DataError(
            f"{path}:{number}: expected context and continuation, query, choices and gold, "
            "or context_options, continuation and gold"
        )
    return item


def _item(fields: dict[str, Any]) -> Item:
    if "choices" in fields:
        pairs = [(fields["query"], " " + choice) for choice in fields["choices"]]
    elif "context_options" in fields:
        pairs = [(context, " " + fields["continuation"]) for context in fields["context_options"]]
    else:
        return Item(((fields["context"], " " + fields["continuation"]),), 0, cloze=True)
    return Item(tuple(pairs), int(fields["gold"]), cloze=False)


def run_task(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", path: Path, limit: int | None, batch_tokens: int
) -> TaskScore:
    """Score a model on one task file."""
    items = read_items(path, limit)
    requests = [encode_pair(tokenizer, *pair) for item in items for pair in item.pairs]
    likelihoods = score(model, requests, batch_tokens, path.stem)
    judged, at = [], 0
    for item in items:
        judged.append(item.judge(likelihoods[at : at + len(item.pairs)]))
        at += len(item.pairs)
    metrics = {name: sum(item[name] for item in judged) / len(judged) for name in judged[0]}
    if "nll" in metrics:
        metrics["perplexity"] = math.exp(min(metrics.pop("nll"), 700.0))
    metric = "acc_norm" if path.stem in NORMALIZED and "acc_norm" in metrics else "acc"
    return TaskScore(name=path.stem, metric=metric, metrics=metrics, correct=tuple(int(item[metric]) for item in judged))


def encode_pair(tokenizer: "PreTrainedTokenizerBase", context: str, continuation: str) -> Request:
    """Tokenize both together and cut where the context ends, so that no token is one the model would not have met."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer(context + continuation)["input_ids"]
    read = len(tokenizer(context)["input_ids"])
    return Request(tuple(whole[:read]), tuple(whole[read:]))
