"""The time of short tasks is measured by trees side by side, each by its own code."""

import json
from collections.abc import Callable
from pathlib import Path

from scripts import time_short


def test_trees_score_the_same_items_side_by_side(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"query": f"{i} and {i + 1} are", "choices": [str(2 * i), f"{i} less", "so"], "gold": i % 3} for i in range(9)]
    task, out = tmp_path / "sums.jsonl", tmp_path / "times.json"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(make_checkpoint("llama3", seed=3))
    time_short.main([model, str(task), "--out", str(out), "--limit", "6", "--against", f"twin={time_short.ROOT}"])
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert (row["task"], row["items"], row["judged_unlike"]) == ("sums", 6, {"twin": 0})
    assert row["metrics"]["twin"] == row["metrics"]["this"]
    assert found["cpu_s"].keys() == found["commits"].keys() == {"twin", "this"}
    assert 0 < found["cpu_s"]["this"] <= found["seconds"]["this"] + 1
