"""Turn the evaluation of a restoration into rows of docs/results/quality-<model>.json, beside those that are there.

    python scripts/record_quality.py EVALUATION.json RUN "the command that made it" [REMARK]

RUN is the OUT of `ard restore`. Each row is one model (recipe "native", "none" for stretched and untouched, else the recipe)
with its scores by length.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ard_serve.artifact import RecipeRecord, read_manifest
from restore.config import RestoreConfig
from restore.evaluation.results import EvaluationReport
from restore.runfolder import CONFIG, MODEL

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def main() -> None:
    evaluation, run, command, *remark = sys.argv[1:]
    report = EvaluationReport.model_validate_json(Path(evaluation).read_bytes())
    config = RestoreConfig.resolve(Path(run) / CONFIG, {})
    manifest = read_manifest(Path(run) / MODEL)
    assert manifest is not None, "a finished restoration has an export with a manifest"
    path = RESULTS / f"quality-{Path(config.model).name}.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    runs.append(
        {
            "commit": commit.stdout.strip(),
            "machine": report.machine,
            "command": command,
            "date": report.created_at,
            "settings": config.model_dump(mode="json", exclude_defaults=True),
            "evaluation": report.config,
            "remark": " ".join(remark),
            "rows": rows(report, config, manifest.recipe, manifest.rope.factor),
        }
    )
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(path)


def rows(report: EvaluationReport, config: RestoreConfig, done: RecipeRecord, factor: float) -> list[dict[str, Any]]:
    short = {"native": "native", "stretched": "none", "restored": done.name}
    found = []
    for model in report.models:
        scores, restored, native = model.scores, model.name == "restored", model.name == "native"
        found.append(
            {
                "model": Path(config.model).name,
                "recipe": short[model.name],
                "rope": None if native else config.rope_type,
                "factor": 1.0 if native else factor,
                "seed": done.seed if restored else None,
                "steps": done.steps if restored else 0,
                "tokens": done.tokens if restored else 0,
                "ppl": scores.perplexity,
                "needle": scores.needle,
                "short": scores.tasks,
                "short_perplexity": {t.name: t.metrics["perplexity"] for t in model.tasks if "perplexity" in t.metrics},
            }
        )
    return found


if __name__ == "__main__":
    main()
