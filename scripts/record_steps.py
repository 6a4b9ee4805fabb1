"""Put on record what runs learnt by the documents they held out, how large their gradients were, and how fast they were.

    python -m scripts.record_steps OUT.json RUN... [--commit SHA] [--machine NAME] [--note TEXT]

RUN is the OUT of `ard restore`, whose metrics.jsonl has a line for every step. A run that was trained and not evaluated still
tells this much. Runs are added to those that OUT.json has.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from restore import metrics
from restore.config import LONG, RestoreConfig
from restore.runfolder import CONFIG

# Steps of warm-up and the first that follow; gradients are larger there than in the rest of a run.
_SETTLING = 8


def describe(run: Path) -> dict[str, Any]:
    """Weights, tokens and their rate, held-out losses at the end, and gradient norms before clipping, by the kind of step."""
    config, rows = RestoreConfig.resolve(run / CONFIG, {}), metrics.read(run)
    steps = [row for row in rows if row["step"] > 0]
    settled = [row for row in steps if row["step"] > _SETTLING]
    long, others = ([row["grad_norm"] for row in settled if bool(LONG & row.keys()) is reads] for reads in (True, False))
    held_out = {name: value for name, value in rows[-1]["validation"].items() if name != "layer_kl"}
    return {
        "run": run.name, "weights": config.weights, "seed": config.seed,
        "steps": steps[-1]["step"], "tokens": steps[-1]["tokens"],
        "tokens_per_s": round(steps[-1]["tokens"] / sum(row["seconds"] for row in steps)),
        "held_out": {name: round(value, 4) for name, value in held_out.items()},
        "grad_norm": {
            "with_long_window": _spread(long), "without": _spread(others), "clipped_to": config.max_grad_norm,
            "clipped_long_steps": sum(norm > config.max_grad_norm for norm in long),
        },
    }  # fmt: skip


def _spread(norms: list[float]) -> dict[str, float] | None:
    if not norms:
        return None
    return {"steps": len(norms), "median": round(median(norms), 3), "most": round(max(norms), 3)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="results file")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run that came to its last step")
    parser.add_argument("--commit", default="", help="what the runs were made with")
    parser.add_argument("--machine", default="", help="where they were made")
    parser.add_argument("--note", default="", help="what to know about them")
    given = parser.parse_args(arguments)
    before = json.loads(given.out.read_text(encoding="utf-8"))["records"] if given.out.exists() else []
    record = {
        "commit": given.commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": given.machine,
        "command": " ".join(["python -m scripts.record_steps", *(arguments or sys.argv[1:])]),
        "note": given.note,
        "rows": [describe(run) for run in given.runs],
    }
    given.out.write_text(json.dumps({"records": [*before, record]}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
