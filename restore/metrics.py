"""Every step of a run on record: metrics.jsonl for programs, TensorBoard for people."""

import json
from pathlib import Path
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Appends rows to `folder`/metrics.jsonl and `folder`/tensorboard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Rows of a killed run past `first_step` are dropped: the resumed run writes them again."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= first_step] if first_step else []
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._file.writelines(kept)
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._writer.close()

    def write(self, row: dict[str, Any]) -> None:
        """Append one step; every number in it, nested ones too, becomes a TensorBoard scalar."""
        self._file.write(json.dumps(row) + "\n")
        for name, value in _scalars(row):
            self._writer.add_scalar(name, value, row["step"])


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, oldest first."""
    return [json.loads(line) for line in _lines(folder / "metrics.jsonl")]


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # A kill can leave half a line at the end.
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _scalars(row: dict[str, Any], prefix: str = "train/") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in row.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{name}/")
        elif isinstance(value, list):
            found += [(f"{prefix}{name}/{index:02d}", number) for index, number in enumerate(value)]
        elif name != "step":
            found.append((prefix + name, value))
    return found
