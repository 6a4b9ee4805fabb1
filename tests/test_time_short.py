"""The time of short tasks is measured by trees side by side, each by its own code."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from scripts import time_short


def test_trees_score_the_same_items_side_by_side(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"query": f"{i} and {i + 1} are", "choices": [str(2 * i), f"{i} less", "so"], "gold": i % 3} for i in range(9)]
    task, out = tmp_path / "sums.jsonl", tmp_path / "times.json"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(make_checkpoint("llama3", seed=3))
    harness = ["--harness"] if importlib.util.find_spec("lm_eval") else []
    twin = f"twin={time_short.ROOT}"
    time_short.main([model, str(task), "--out", str(out), "--limit", "6", "--dtype", "fp32", "--against", twin, *harness])
    (found,) = json.loads(out.read_text())["runs"]
    (row,) = found["rows"]
    assert (row["task"], row["items"]) == ("sums", 6)
    assert row["judged_unlike"] == {name: 0 for name in ("twin", "harness") if name in row["metrics"]}
    assert row["metrics"]["twin"] == row["metrics"]["this"]
    assert found["commits"].keys() == {"twin", "this"}
    assert len(row["metrics"]) == 2 + len(harness)
    assert 0 < found["cpu_s"]["this"] <= found["seconds"]["this"] + 1
