"""Short tasks, scored as lm-evaluation-harness scores them: by likelihood, or by the number that a model comes to."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ard_serve.errors import DataError
from restore.evaluation import primers
from restore.evaluation.items import Item, read_items
from restore.evaluation.reader import Reader, Request
from restore.evaluation.results import TaskScore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where the harness's own headline divides a choice's log-likelihood by its length in characters.
NORMALIZED = frozenset({"hellaswag", "arc_challenge", "openbookqa"})
_POOL = "fewshot"
_STOPS, _NEW_TOKENS = ("Question:", "</s>", "<|im_end|>"), 256


def find_tasks(sources: Sequence[str]) -> list[Path]:
    """The task files among `sources`, files or folders; pools of few-shot examples are no tasks.

    Raises:
        DataError: a source is missing or a folder without tasks, or two files share a name.
    """
    files: list[Path] = []
    for source in map(Path, sources):
        found = [source] if source.is_file() else sorted(source.glob("*.jsonl"))
        files += [file for file in found if _POOL not in file.stem]
        if not found:
            raise DataError(f"{source}: neither a task file nor a folder with .jsonl files")
    names = [file.stem for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"two task files are named {twice}.jsonl: rename one, the name is the task's")
    return files


def run_task(
    reader: Reader, tokenizer: "PreTrainedTokenizerBase", path: Path, limit: int | None = None, shots: int = 0
) -> list[TaskScore]:
    """Score a model on one task file, each question behind `shots` solved ones where a pool of examples lies beside it.

    TruthfulQA has two scores: the right choice, and apart from the mean the share of likelihood that true answers take.
    """
    before, primer = _examples(path, shots), primers.of(path.stem)
    items = [item.after(before.get(item.subject, primer)) for item in read_items(path, limit)]
    judged = (
        _solve(reader, tokenizer, path.stem, items)
        if items[0].kind == "problem"
        else _weigh(reader, tokenizer, path.stem, items)
    )
    shares = tuple(item.pop("mc2") for item in judged if "mc2" in item)
    metrics = {name: sum(item[name] for item in judged) / len(judged) for name in judged[0]}
    if "nll" in metrics:
        metrics["perplexity"] = math.exp(min(metrics.pop("nll"), 700.0))
    metric = "acc_norm" if path.stem in NORMALIZED and "acc_norm" in metrics else next(iter(metrics))
    correct, chance = tuple(int(item[metric]) for item in judged), sum(item.chance for item in items) / len(items)
    scores = [TaskScore(name=path.stem, metric=metric, metrics=metrics, correct=correct, chance=chance)]
    if len(shares) == len(judged):
        name = f"{path.stem.removesuffix('_mc')}_mc2"
        scores.append(TaskScore(name=name, metric="mc2", metrics={"mc2": sum(shares) / len(shares)}, correct=shares))
    return scores


def _solve(reader: Reader, tokenizer: "PreTrainedTokenizerBase", name: str, items: Sequence[Item]) -> list[dict[str, float]]:
    prompts = [item.pairs[0][0] for item in items]
    written = reader.generate(prompts, _STOPS, _NEW_TOKENS, tokenizer, name)
    return [item.judge_text(text) for item, text in zip(items, written, strict=True)]


def _weigh(reader: Reader, tokenizer: "PreTrainedTokenizerBase", name: str, items: Sequence[Item]) -> list[dict[str, float]]:
    likelihoods = reader.score(encode_pairs(tokenizer, [pair for item in items for pair in item.pairs]), name)
    judged, at = [], 0
    for item in items:
        judged.append(item.judge(likelihoods[at : at + len(item.pairs)]))
        at += len(item.pairs)
    return judged


def encode_pairs(tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """Tokenize context and continuation together and cut where the context ends: no token is one the model would not meet.

    All at once, and a context that several continuations follow once only.
    """
    pairs = [_spaces_moved(*pair) for pair in pairs]
    contexts = list(dict.fromkeys(context for context, _ in pairs))
    read = dict(zip(contexts, map(len, tokenizer(contexts)["input_ids"]), strict=True))
    whole = tokenizer([context + continuation for context, continuation in pairs])["input_ids"]
    return [
        Request(tuple(ids[: read[context]]), tuple(ids[read[context] :]))
        for ids, (context, _) in zip(whole, pairs, strict=True)
    ]


def _spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    spaces = len(context) - len(context.rstrip())
    return (context[:-spaces], context[-spaces:] + continuation) if spaces else (context, continuation)


def _examples(task: Path, count: int) -> dict[str, str]:
    """What stands before the questions of each subject: the first `count` examples of the pool, in MMLU's words.

    The pool is the file in the task's folder with `fewshot` in its name that begins with the same word:
    mmlu_dev_fewshot.jsonl for mmlu_subset.jsonl.
    """
    pools = sorted(task.parent.glob(f"{task.stem.partition('_')[0]}_*{_POOL}*.jsonl")) if count else []
    solved: dict[str, list[str]] = {}
    for item in read_items(pools[0]) if pools else ():
        solved.setdefault(item.subject, []).append(item.solved)
    return {subject: "".join(f"{part}\n\n" for part in (*_intro(subject), *parts[:count])) for subject, parts in solved.items()}


def _intro(subject: str) -> tuple[str, ...]:
    about = subject.replace("_", " ")
    return (f"The following are multiple choice questions (with answers) about {about}.",) if subject else ()
