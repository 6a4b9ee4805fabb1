"""The results file of `python -m restore.bench` and of `restore.bench_peers`.

Runs are appended, each with its commit, date, command and machine.
"""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# What two rows must share for the rate of one process to be what the rate of several is held against.
_SAME = ("shape", "recipe", "window", "long_window", "step_tokens", "trainable", "rank", "targets", "dtype", "quantize")


class Results:
    """Appends the rows of one run to a file, whole after every row."""

    def __init__(self, path: Path, commit: str | None, device: torch.device) -> None:
        """Runs that `path` holds stay as they are."""
        self._path = path
        self._runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        self._run: dict[str, Any] = {
            "commit": commit or _commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join([f"python -m restore.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
            "machine": _machine(device),
            "rows": [],
        }

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; one of several processes is told its `scaling`, if one process ran the same on the same GPU."""
        alone = self._alone(row)
        if alone and "seconds" in row:
            row["scaling"] = alone["seconds"] / row["seconds"] / row["processes"]
        self._run["rows"].append(_rounded(row))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".tmp")
        beside.write_text(json.dumps({"runs": [*self._runs, self._run]}, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._path)

    def _alone(self, row: dict[str, Any]) -> dict[str, Any] | None:
        if row.get("processes", 1) == 1:
            return None
        same_gpu = [run for run in self._runs if run["machine"]["device"] == self._run["machine"]["device"]]
        rows = [other for run in same_gpu for other in run["rows"] if "seconds" in other and other["processes"] == 1]
        return next((other for other in reversed(rows) if all(other.get(key) == row.get(key) for key in _SAME)), None)


def _rounded(value: Any) -> Any:
    """Numbers with four digits that count, nested ones too: no timing is better than that."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {package: version(package) for package in ("torch", "transformers")}
    return {"device": name, "cuda": torch.version.cuda, "python": platform.python_version(), **versions}


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)  # noqa: S607
    return found.stdout.strip() or "unknown"
