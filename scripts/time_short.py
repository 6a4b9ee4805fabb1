"""Time the short tasks by the scorer of this tree and of others, in turns, and hold their answers against each other.

    python -m scripts.time_short MODEL TASKS --out OUT.json [--limit 30] [--against before=CHECKOUT ...] [--harness]

MODEL is a folder, TASKS task files or folders of them. Every tree has a process of its own with the model loaded, and scores a
task right after the others, since the load of a machine drifts; where others work beside, CPU seconds tell more than the clock.
OUT.json gets for each task the seconds and scores of each tree, and how many items it judges unlike this one. --harness adds
lm-evaluation-harness's own model class, asked for the same likelihoods and texts. The whole suite, on a GPU where there is one:
--limit 100000 --problems 100000.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from restore import evaluate, loading
from restore.evaluate import machine
from restore.evaluation import tasks
from restore.evaluation.config import EvalConfig
from restore.evaluation.items import read_items
from restore.evaluation.reader import Likelihood, Request
from restore.evaluation.results import TaskScore

ROOT = Path(__file__).parent.parent
# The harness's rows of one batch; it holds logits of every token of them.
_HARNESS_ROWS = 8
Score = Callable[[str, int], Sequence[TaskScore]]
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
# An evaluation wants some text; a window of this takes no time.
_TEXT = "It was a dark and stormy night. " * 20


class Tree:
    """A checkout that scores tasks in a process of its own, by its evaluation or by the harness."""

    def __init__(self, folder: Path, model: Path, dtype: str, by: str = "evaluation") -> None:
        command = [sys.executable, __file__, "--work", str(model), dtype, by]
        paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": paths}
        pipe = subprocess.PIPE
        self._process: Any = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def score(self, task: Path, limit: int) -> dict[str, Any]:
        print(json.dumps([str(task), limit]), file=self._process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main(arguments: list[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    folders = {name: Path(folder).resolve() for name, folder in (word.split("=", 1) for word in given.against)} | {"this": ROOT}
    trees = {name: Tree(folder, given.model.resolve(), given.dtype) for name, folder in folders.items()}
    if given.harness:
        trees["harness"] = Tree(ROOT, given.model.resolve(), given.dtype, by="harness")
    rows: list[dict[str, Any]] = []
    for task in tasks.find_tasks(given.tasks):
        limit = given.problems if read_items(task, 1)[0].kind == "problem" else given.limit
        found = {name: tree.score(task.resolve(), limit) for name, tree in trees.items()}
        rows.append({"task": task.stem, "items": len(found["this"]["correct"])} | _side_by_side(found))
        print(json.dumps(rows[-1]), flush=True)
    for tree in trees.values():
        tree.close()
    record = {
        "command": " ".join(["python -m scripts.time_short", *sys.argv[1:]]),
        "commits": {name: _commit(folder) for name, folder in folders.items()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "dtype": given.dtype,
        **{taken: {name: round(sum(row[taken][name] for row in rows), 2) for name in trees} for taken in ("seconds", "cpu_s")},
        "rows": rows,
    }
    runs = json.loads(given.out.read_text(encoding="utf-8"))["runs"] if given.out.exists() else []
    given.out.write_text(json.dumps({"runs": [*runs, record]}, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("tasks", nargs="+", help="task files, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="results file; the run is added to it")
    parser.add_argument("--limit", type=int, default=30, help="items of each task (default: 30)")
    parser.add_argument("--problems", type=int, default=6, help="items of a task whose answers are written (default: 6)")
    parser.add_argument("--against", nargs="*", default=[], metavar="NAME=CHECKOUT", help="other trees, such as a git worktree")
    parser.add_argument("--harness", action="store_true", help="also by lm-evaluation-harness's own model class")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="arithmetic (default: bf16)")
    return parser


def _side_by_side(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    ours = found["this"]["correct"]
    return {
        "seconds": {name: one["seconds"] for name, one in found.items()},
        "cpu_s": {name: one["cpu_s"] for name, one in found.items()},
        "metrics": {name: one["metrics"] for name, one in found.items()},
        "judged_unlike": {
            name: sum(a != b for a, b in zip(one["correct"], ours, strict=True))
            for name, one in found.items()
            if name != "this"
        },
    }


def _commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _work(folder: Path, dtype: str, by: str) -> None:
    """Answer each line of stdin, a task and its limit, with a line of what it took and gave."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = loading.load(folder, getattr(torch, _DTYPES[dtype]), device), loading.load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as scratch:
        score = _by_harness(model, tokenizer) if by == "harness" else _by_evaluation(model, tokenizer, Path(scratch))
        for line in sys.stdin:
            started, cpu_s = time.perf_counter(), time.process_time()
            scores = score(*json.loads(line))
            taken = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu_s}
            metrics = {f"{one.name} {name}": round(value, 4) for one in scores for name, value in one.metrics.items()}
            answer = {name: round(value, 2) for name, value in taken.items()} | {"metrics": metrics}
            print(json.dumps(answer | {"correct": scores[0].correct}), flush=True)


def _by_evaluation(model: Any, tokenizer: Any, scratch: Path) -> Score:
    """As `ard eval` does, in whatever version the tree has."""
    text = scratch / "text.jsonl"
    text.write_text(json.dumps({"text": _TEXT}) + "\n", encoding="utf-8")

    def score(task: str, limit: int) -> Sequence[TaskScore]:
        config = EvalConfig(data=(str(text),), lengths=(32,), windows=1, needle_samples=0, tasks=(task,), limit=limit)
        return evaluate.evaluate(model, tokenizer, config).tasks

    return score


def _by_harness(model: Any, tokenizer: Any) -> Score:
    from lm_eval.models.huggingface import HFLM

    reader: Any = _Harness(HFLM(pretrained=model, tokenizer=tokenizer, device=str(model.device), batch_size=_HARNESS_ROWS))
    return lambda task, limit: tasks.run_task(reader, tokenizer, Path(task), limit, EvalConfig().shots)


@dataclass
class _Harness:
    """A reader of short tasks that asks the harness's model class."""

    model: Any

    def score(self, requests: Sequence[Request], _: str) -> list[Likelihood]:
        asked = [(("", ""), list(request.context), list(request.continuation)) for request in requests]
        return [Likelihood(*found) for found in self.model._loglikelihood_tokens(asked, disable_tqdm=True)]

    def generate(self, prompts: Sequence[str], stops: Sequence[str], new_tokens: int, *_: Any) -> list[str]:
        from lm_eval.api.instance import Instance

        settings = {"until": list(stops), "max_gen_toks": new_tokens}
        asked = [Instance("generate_until", {}, (prompt, settings), number) for number, prompt in enumerate(prompts)]
        written: list[str] = self.model.generate_until(asked, disable_tqdm=True)
        return written


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        _work(Path(sys.argv[2]), *sys.argv[3:])
    else:
        main()
