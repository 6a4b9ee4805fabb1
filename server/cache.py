"""What a vLLM answers that depends on its version alone, kept on disk: asking it takes seconds of every start.

It is kept in the user's cache folder; what an image was built with lies in $ARD_SERVE_CACHE, which is only read.
"""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", list[str], dict[str, list[str]])


def read(name: str, kind: type[T]) -> T | None:
    """What was kept under `name`, None where there is nothing of that kind."""
    built_in = os.environ.get("ARD_SERVE_CACHE")
    for folder in (Path(built_in), _own_folder()) if built_in else (_own_folder(),):
        with contextlib.suppress(OSError, ValueError):
            value = json.loads((folder / _file(name)).read_text(encoding="utf-8"))
            if isinstance(value, kind):
                return value
    return None


def write(name: str, value: Any) -> None:
    """Keep `value`. A read-only home costs time at the next start, nothing else."""
    path = _own_folder() / _file(name)
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(value), encoding="utf-8")
        part.replace(path)
    except OSError:
        return


def _own_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ard-serve"


def _file(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name) + ".json"
