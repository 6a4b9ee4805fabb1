"""Turn the evaluation of a restoration into rows of docs/results/quality-<model>.json, beside those that are there.

    python scripts/record_quality.py EVALUATION.json RUN/config.yaml "the command that made it"

Each row is one model (recipe "native", "none" for stretched and untouched, else the recipe) with its scores by length.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from restore.config import RestoreConfig
from restore.evaluation.results import EvaluationReport

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def main() -> None:
    evaluation, settings, command = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    report = EvaluationReport.model_validate_json(evaluation.read_bytes())
    config = RestoreConfig.resolve(settings, {})
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
            "rows": rows(report, config),
        }
    )
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(path)


def rows(report: EvaluationReport, config: RestoreConfig) -> list[dict[str, Any]]:
    found = []
    for model in report.models:
        scores, restored = model.scores, model.name == "restored"
        recipe = {"native": "native", "stretched": "none"}.get(model.name, config.recipe)
        row: dict[str, Any] = {"model": Path(config.model).name, "recipe": recipe, "seed": config.seed if restored else None}
        row |= {"rope": None if recipe == "native" else config.rope_type, "target_length": config.target_length}
        row |= {"ppl": scores.perplexity, "needle": scores.needle, "short": scores.tasks}
        row |= {"short_perplexity": {t.name: t.metrics["perplexity"] for t in model.tasks if "perplexity" in t.metrics}}
        found.append(row)
    return found


if __name__ == "__main__":
    main()
