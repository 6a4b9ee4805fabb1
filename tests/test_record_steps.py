"""What a run learnt and how large its gradients were, as its metrics have it."""

import json
from pathlib import Path
from typing import Any

from restore.config import RestoreConfig
from scripts import record_steps


def test_held_out_losses_and_gradients_of_both_kinds_of_steps_are_put_beside_what_is_there(tmp_path: Path) -> None:
    run = tmp_path / "mine-yarn-3"
    run.mkdir()
    fields = {"model": "m", "target_length": 64, "data": ["d"], "out": run, "seed": 3, "objectives": {"logits": 2.0, "lm": 1.0}}
    RestoreConfig.resolve(None, fields).save(run / "config.yaml")
    rows: list[dict[str, Any]] = [{"step": 0, "validation": {"loss": 9.0}}]
    for step in range(1, 13):
        long = {"lm": 3.0} if step % 2 else {}
        rows.append(
            {"step": step, "tokens": 10 * step, "seconds": 0.5, "logits": 1.0, "grad_norm": 100.0 if step <= 8 else 0.25 * step}
            | long
        )
    rows[-1]["validation"] = {"loss": 4.0, "logits": 0.123456, "layer_kl": [1.0]}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "steps.json"
    for note in ("first", "second"):
        assert record_steps.main([str(out), str(run), "--commit", "abc", "--machine", "here", "--note", note]) == 0
    first, second = json.loads(out.read_text())["records"]
    assert (first["note"], second["note"], first["commit"]) == ("first", "second", "abc")
    (row,) = second["rows"]
    assert (row["run"], row["weights"], row["seed"]) == ("mine-yarn-3", {"logits": 2.0, "lm": 1.0}, 3)
    assert (row["steps"], row["tokens"], row["held_out"]) == (12, 120, {"loss": 4.0, "logits": 0.1235})
    assert row["tokens_per_s"] == 20
    assert row["grad_norm"] == {
        "with_long_window": {"steps": 2, "median": 2.5, "most": 2.75},
        "without": {"steps": 2, "median": 2.75, "most": 3.0},
        "clipped_to": 1.0,
        "clipped_long_steps": 2,
    }
