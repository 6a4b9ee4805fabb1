"""What each way to stretch does to a model before anything is repaired: perplexity by window length, native beside it.

    python -m scripts.rope_types MODEL OUT.json --target-length 65536 --data books/validation --lengths 2048 8192 16384

Weights are untouched, every type sees the same windows. --searched FILE adds the table that `restore.rope_search` found.
OUT.json is written after every type, since one takes minutes on a CPU.
"""

import argparse
import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import yaml

from restore.evaluate import Candidate, machine
from restore.evaluation.config import EvalConfig
from restore.inspection import read_config
from restore.rope import RopeType, plan_rope
from scripts.record_quality import commit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of an unstretched model")
    parser.add_argument("out", type=Path, help="results file")
    parser.add_argument("--target-length", type=int, required=True, help="tokens that each type makes room for")
    parser.add_argument("--data", nargs="+", required=True, help="held-out text")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="window lengths in tokens")
    parser.add_argument("--windows", type=int, default=2, help="windows of each length")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="fp32 where a CPU has no fast bf16")
    parser.add_argument("--searched", type=Path, help="settings that restore.rope_search wrote")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = EvalConfig(
        data=tuple(given.data), lengths=tuple(given.lengths), windows=given.windows, needle_samples=0, dtype=given.dtype
    )
    record: dict[str, Any] = {
        "commit": commit(),
        "machine": machine(),
        "command": " ".join(["python -m scripts.rope_types", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "target_length": given.target_length,
        "rows": [],
    }
    for name, config in _candidates(given.model, given.target_length, given.searched):
        found = Candidate(name, given.model, config).measure(settings)
        record["documents"] = [Path(source).name for source in found.window_documents]
        perplexity = {score.length: round(score.value, 3) for score in found.perplexity}
        record["rows"].append({"rope": name, "ppl": perplexity, "seconds": round(found.seconds)})
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(record["rows"][-1]), flush=True)


def _candidates(model: Path, target_length: int, searched: Path | None) -> list[tuple[str, dict[str, Any] | None]]:
    """Name and config.json of each; native has the folder's own."""
    base = read_config(model)
    stretched = [name for name in get_args(RopeType) if name not in ("longrope", "none")]
    found: list[tuple[str, dict[str, Any] | None]] = [("native", None)]
    found += [(name, plan_rope(base, target_length, name).target_config(base)) for name in stretched]
    if searched:
        table = yaml.safe_load(searched.read_text(encoding="utf-8"))
        plan = plan_rope(base, target_length, "longrope", None, None, table["rope_factors"], table.get("rope_attention_factor"))
        found.append(("longrope, searched", plan.target_config(base)))
    return found


if __name__ == "__main__":
    main()
