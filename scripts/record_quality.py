"""Turn the evaluation of a restoration into rows of docs/results/quality-<model>.json, beside those that are there.

    python scripts/record_quality.py EVALUATION.json RUN "the command that made it" [REMARK]
    python scripts/record_quality.py --merge QUALITY.json

RUN is the OUT of `ard restore`. Each row is one model (recipe "native", "none" for stretched and untouched, else the recipe)
with its scores by length. --merge adds the runs of a results file that came from another machine.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ard_serve.artifact import RecipeRecord, read_manifest
from restore.config import RestoreConfig
from restore.evaluation.compare import BEYOND_GUESSING
from restore.evaluation.gate import judge
from restore.evaluation.results import Evaluation, EvaluationReport
from restore.runfolder import CONFIG, MODEL

RESULTS = Path(__file__).parent.parent / "docs" / "results"
_RECIPES = {"native": "native", "stretched": "none"}


def main() -> None:
    if sys.argv[1] == "--merge":
        source = Path(sys.argv[2])
        for entry in read(source):
            append(RESULTS / source.name, entry | {"commit": entry["commit"] or commit()})
        return
    evaluation, run, command, *remark = sys.argv[1:]
    report = EvaluationReport.model_validate_json(Path(evaluation).read_bytes())
    config, entry = describe(report, Path(run), command, " ".join(remark))
    append(RESULTS / file_name(config.model), entry)


def file_name(model: str) -> str:
    return f"quality-{Path(model).name}.json"


def read(path: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    return runs


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add one run to a results file, unless it is there: the same settings measured at the same time."""
    runs = read(path)
    if any((run["date"], run["settings"]) == (entry["date"], entry["settings"]) for run in runs):
        return
    path.write_text(json.dumps({"runs": [*runs, entry]}, indent=1) + "\n", encoding="utf-8")
    print(path)


def describe(report: EvaluationReport, run: Path, command: str, remark: str = "") -> tuple[RestoreConfig, dict[str, Any]]:
    """The settings of a finished restoration and its entry in a results file."""
    config = RestoreConfig.resolve(run / CONFIG, {})
    manifest = read_manifest(run / MODEL)
    assert manifest is not None, "a finished restoration has an export with a manifest"
    verdict = judge(report, config.gate, manifest.base.native_window)
    return config, {
        "commit": commit(),
        "machine": report.machine,
        "command": command,
        "date": report.created_at,
        "settings": config.model_dump(mode="json", exclude_defaults=True),
        "evaluation": report.config,
        "remark": remark,
        "missed": list(verdict.failures),
        "served_limit": verdict.served_limit,
        "tasks": {task.name: {"items": len(task.correct), "chance": task.chance} for task in report.models[0].tasks},
        "rows": rows(report, config, _named(manifest.recipe, remark, config), manifest.rope.factor),
    }


def _named(done: RecipeRecord, remark: str, config: RestoreConfig) -> RecipeRecord:
    """A run of a study goes by the study's own name for it: what it calls RECIPE-ROPE-SEED changes more than the losses."""
    ending = f"-{config.rope_type}-{config.seed}"
    return done.model_copy(update={"name": remark.removesuffix(ending)}) if remark.endswith(ending) else done


def rows(report: EvaluationReport, config: RestoreConfig, done: RecipeRecord, factor: float) -> list[dict[str, Any]]:
    return [_row(model, report, config, done, factor) for model in report.models]


def _row(
    model: Evaluation, report: EvaluationReport, config: RestoreConfig, done: RecipeRecord, factor: float
) -> dict[str, Any]:
    scores, restored, native = model.scores, model.name == "restored", model.name == "native"
    mean, native_mean = model.short_mean, report.models[0].short_mean
    names = {task.name for task in model.tasks}
    uses = dict.fromkeys(needle.task for needle in model.needles if needle.task != "single")
    ratios = {row.what: 1.0 if native else row.ratio for row in report.comparisons if native or row.model == model.name}
    return {
        "model": Path(config.model).name,
        "recipe": _RECIPES.get(model.name, done.name),
        "rope": None if native else config.rope_type,
        "factor": 1.0 if native else factor,
        "seed": done.seed if restored else None,
        "steps": done.steps if restored else 0,
        "tokens": done.tokens if restored else 0,
        "ppl": scores.perplexity,
        "needle": scores.needle,
        "uses": {task: {n.length: model.needle(n.length, task) for n in model.needles if n.task == task} for task in uses},
        "sliding": {score.title: score.value for score in model.sliding},
        "short": scores.tasks,
        "short_mean": mean,
        "retention": mean / native_mean if mean is not None and native_mean else None,
        "beyond_guessing": ratios.get(BEYOND_GUESSING),
        "short_p": {c.what: c.p_value for c in report.comparisons if c.model == model.name and c.what in names},
        "short_perplexity": {t.name: t.metrics["perplexity"] for t in model.tasks if "perplexity" in t.metrics},
    }


def commit() -> str:
    """Of the working tree; a machine that has only its files leaves it open."""
    found = subprocess.run(["git", "rev-parse", "--short", "--verify", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


if __name__ == "__main__":
    main()
