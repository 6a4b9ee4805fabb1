"""Items of short tasks from local JSONL files.

A file is one task; its items are of one kind, told by their fields:
  cloze            {"context", "continuation"}                 right when greedy decoding writes " " + continuation
  choice           {"query", "choices", "gold"}                the most likely " " + choice after the query; with "mc2_correct"
                                                               and "mc2_incorrect" also what share of these the right ones take
  partial context  {"context_options", "continuation", "gold"} the context under which " " + continuation is most likely
  problem          {"question", "answer", "final"}             the number the model comes to when it writes an answer itself
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ard_serve.errors import DataError
from restore.data import json_lines, parse_line
from restore.evaluation.reader import Likelihood

# As lm-evaluation-harness finds the answer to a problem of GSM8K: where the examples put it, or the last number of all.
_STATED, _LAST = re.compile(r"#### (-?[0-9.,]+)"), re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


@dataclass(frozen=True)
class Item:
    """One question as (context, continuation) pairs, of which number `gold` is right; `final` is a problem's number.

    The last `weighed` pairs are no choices: TruthfulQA asks of them which share of likelihood the first `true` take (MC2).
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int
    kind: Literal["cloze", "choice", "problem"]
    subject: str = ""
    final: str = ""
    true: int = 0
    weighed: int = 0

    @property
    def solved(self) -> str:
        """Question and right answer, as an example for others."""
        return "".join(self.pairs[self.gold])

    @property
    def chance(self) -> float:
        """The share that guessing gets right: one of the choices, and nothing of what has to be written."""
        return 1 / (len(self.pairs) - self.weighed) if self.kind == "choice" else 0.0

    def after(self, examples: str) -> "Item":
        """The same question behind `examples`."""
        return replace(self, pairs=tuple((examples + context, continuation) for context, continuation in self.pairs))

    def judge(self, likelihoods: Sequence[Likelihood]) -> dict[str, float]:
        """The item's metrics: acc and nll for a cloze, else acc and acc_norm (by characters of the choice), mc2 if asked."""
        if self.kind == "cloze":
            return {"acc": float(likelihoods[0].is_greedy), "nll": -likelihoods[0].log_prob}
        choices = len(self.pairs) - self.weighed
        by_sum = [likelihood.log_prob for likelihood in likelihoods]
        by_character = [value / (len(text) - 1) for value, (_, text) in zip(by_sum[:choices], self.pairs, strict=False)]
        found = {
            "acc": float(np.argmax(by_sum[:choices]) == self.gold),
            "acc_norm": float(np.argmax(by_character) == self.gold),
        }
        if self.weighed:
            shares = np.exp(np.array(by_sum[choices:]) - max(by_sum[choices:]))
            found["mc2"] = float(shares[: self.true].sum() / shares.sum())
        return found

    def judge_text(self, written: str) -> dict[str, float]:
        """A problem's metrics: is its number stated behind ####, and is it the last number at all."""
        numbers = (_STATED.search(written), (_LAST.findall(written) or [""])[-1])
        stated, last = (_plain(numbers[0][1]) if numbers[0] else "", _plain(numbers[1]))
        return {"exact_match": float(stated == _plain(self.final)), "flexible_match": float(last == _plain(self.final))}


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Read a task file; of more than `limit` items take that many, evenly spread.

    Raises:
        DataError: names the file and line of an item that is of no known kind, or of another than the others.
    """
    lines = json_lines(path)
    chosen = np.linspace(0, len(lines) - 1, min(limit or len(lines), len(lines))).astype(int)
    items = [_parse(path, *lines[index]) for index in chosen]
    if len(kinds := sorted({item.kind for item in items})) > 1:
        raise DataError(f"{path}: holds items of the kinds {' and '.join(kinds)}; make each kind a file of its own")
    return items


def _parse(path: Path, number: int, line: str) -> Item:
    try:
        item = _item(parse_line(path, number, line))
        usable = 0 <= item.gold < len(item.pairs) - item.weighed and all(a.strip() and b.strip() for a, b in item.pairs)
    except (ValueError, KeyError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise DataError(
            f"{path}:{number}: expected context and continuation; query, choices and gold; "
            "context_options, continuation and gold; or question, answer and final"
        )
    return item


def _item(fields: dict[str, Any]) -> Item:
    subject = str(fields.get("subject", ""))
    if any(isinstance(fields.get(name), str) for name in ("choices", "context_options", "mc2_correct", "mc2_incorrect")):
        raise TypeError("a list, not the letters of a text")
    if "choices" in fields:
        true, false = fields.get("mc2_correct", []), fields.get("mc2_incorrect", [])
        pairs = tuple((fields["query"], f" {text}") for text in (*fields["choices"], *true, *false))
        return Item(pairs, int(fields["gold"]), "choice", subject, true=len(true), weighed=len(true) + len(false))
    if "context_options" in fields:
        pairs = tuple((context, f" {fields['continuation']}") for context in fields["context_options"])
        return Item(pairs, int(fields["gold"]), "choice", subject)
    if "final" in fields:
        asked = (f"Question: {fields['question']}\nAnswer:", f" {fields['answer']}")
        return Item((asked,), 0, "problem", subject, str(fields["final"]))
    return Item(((fields["context"], f" {fields['continuation']}"),), 0, "cloze", subject)


def _plain(number: str) -> str:
    return re.sub(r"[,$]|\.$", "", number)
