"""What a vLLM answers that depends on its version alone, kept on disk: asking it takes seconds of every start."""

import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", list[str], dict[str, list[str]])


def read(name: str, kind: type[T]) -> T | None:
    """What was kept under `name`, None where there is nothing of that kind."""
    try:
        value = json.loads(_path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, kind) else None


def write(name: str, value: Any) -> None:
    """Keep `value`. A read-only home costs time at the next start, nothing else."""
    path = _path(name)
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(value), encoding="utf-8")
        part.replace(path)
    except OSError:
        return


def _path(name: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "ard-serve" / (re.sub(r"[^\w.+-]", "_", name) + ".json")
