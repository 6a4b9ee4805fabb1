"""Any task of lm-evaluation-harness, by name or from a YAML file, scored by the same batched engine as our own tasks.

Needs the package `lm-eval`, which the extra `harness` installs.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ard_serve.errors import DataError, UsageError
from restore.evaluation.reader import Reader, Request
from restore.evaluation.results import TaskScore
from restore.evaluation.tasks import NORMALIZED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_METRICS = ("acc", "exact_match", "acc_norm", "f1")
_NEW_TOKENS = 256


def run_harness(
    reader: Reader, tokenizer: "PreTrainedTokenizerBase", names: Sequence[str], limit: int | None
) -> list[TaskScore]:
    """Score a model on the harness's tasks; a group such as mmlu counts as one task.

    Args:
        names: task or group names, or YAML files that define one.
        limit: at most this many items of each task.

    Raises:
        UsageError: lm-eval is not installed, or it knows no such task.
        DataError: a task's data cannot be had.
    """
    manager, wanted = known(names)
    from lm_eval import simple_evaluate

    try:
        found = simple_evaluate(
            _language_model(reader, tokenizer), tasks=wanted, task_manager=manager, limit=limit, bootstrap_iters=0
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"harness = {', '.join(wanted)}: {' '.join(str(error).split())}") from None
    return [_task_score(name, list(_samples(found, name))) for name in wanted]


def known(names: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's task manager, and the names by which it knows the tasks.

    Raises:
        UsageError: lm-eval is not installed, or it knows no such task.
    """
    try:
        from lm_eval import tasks
    except ImportError:
        raise UsageError(f"harness = {', '.join(names)}: lm-eval is not installed; pip install 'ard-serve[harness]'") from None
    files = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    manager = tasks.TaskManager(include_path=sorted({str(file.parent) for file in files}) or None)
    wanted = [Path(name).stem if Path(name) in files else name for name in names]
    if unknown := sorted(set(wanted) - set(manager.all_tasks)):
        raise UsageError(f"harness: lm-eval knows no task '{unknown[0]}'; `lm-eval ls tasks` lists them")
    return manager, wanted


def _samples(found: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Every item of a task, or of all tasks of a group, by its first filter."""
    if name not in found["samples"]:
        for member in found["group_subtasks"].get(name, []):
            yield from _samples(found, member)
        return
    samples = found["samples"][name]
    yield from sorted((s for s in samples if s["filter"] == samples[0]["filter"]), key=lambda s: int(s["doc_id"]))


def _task_score(name: str, samples: Sequence[dict[str, Any]]) -> TaskScore:
    measured = [metric for metric in _METRICS if samples and metric in samples[0]]
    if not measured:
        raise UsageError(f"harness: task '{name}' reports none of {', '.join(_METRICS)}; choose another task")
    metric = "acc_norm" if name in NORMALIZED and "acc_norm" in measured else measured[0]
    metrics = {each: sum(float(sample[each]) for sample in samples) / len(samples) for each in measured}
    return TaskScore(name=name, metric=metric, metrics=metrics, correct=tuple(float(sample[metric]) for sample in samples))


def _language_model(reader: Reader, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """The harness's view of a reader; a class inside a function, since its base may not be installed."""
    from lm_eval.api.model import TemplateLM

    class Batched(TemplateLM):  # type: ignore[misc]
        eot_token_id = tokenizer.eos_token_id
        prefix_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids: list[int] = tokenizer(string, add_special_tokens=add_special_tokens is not False)["input_ids"]
            return ids

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            encoded = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
            return [(found.log_prob, found.is_greedy) for found in reader.score(encoded, "harness")]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            raise UsageError("harness: perplexity tasks are not supported, `ard eval` measures perplexity itself")

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts: dict[int, str] = {}
            order = sorted(range(len(requests)), key=lambda index: str(_settings(requests[index])))
            for (stops, new_tokens), same in groupby(order, key=lambda index: _settings(requests[index])):
                indices = list(same)
                contexts = [requests[index].args[0] for index in indices]
                written = reader.generate(contexts, stops, new_tokens, tokenizer, "harness: generate")
                texts.update(zip(indices, written, strict=True))
            return [texts[index] for index in range(len(requests))]

    return Batched()


def _settings(request: Any) -> tuple[tuple[str, ...], int]:
    """Stop strings and token limit of a request to generate."""
    settings = request.args[1]
    stops = settings.get("until", [])
    return tuple([stops] if isinstance(stops, str) else filter(None, stops)), int(settings.get("max_gen_toks", _NEW_TOKENS))
