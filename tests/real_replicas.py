"""Two replicas with real engines behind HAProxy, one ended under load, once for the record:

    python tests/real_replicas.py docs/results/server-replicas-cpu.json

Each has a small random Llama; the first is killed (-9), or told to stop (SIGTERM), while eight clients ask. Exit code 1 when a
request was lost that had not begun to be answered, or after SIGTERM any.
"""

import os
import signal
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from helpers_bench import circumstances, write
from helpers_replicas import Load, balancer
from helpers_server import StartGateway, gateways
from helpers_tiny_llama import write_tiny_llama

from server.config import ServeConfig

_CLIENTS = 8
_REQUEST = {"prompt": [5, 6, 7], "max_tokens": 60, "ignore_eos": True}
# Else vLLM binds both engines to the same core.
_BESIDE_ANOTHER = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def end_one(start: StartGateway, model: Path, folder: Path, number: signal.Signals) -> dict[str, Any]:
    """What became of the requests."""
    fields: dict[str, Any] = {"model": str(model), "kv_cache_gib": 0.2, "max_model_len": 512, "drain_s": 30}
    fields |= {"engine_command": ServeConfig.model_fields["engine_command"].default, "engine_args": ("--enforce-eager",)}
    fields |= {"canary_timeout_s": 10, "max_restarts": 0}
    replicas = [start(environment=_BESIDE_ANOTHER, **fields) for _ in range(2)]
    for replica in replicas:
        replica.until_ready(300)
    with balancer(replicas, folder) as url:
        load = Load(url, _CLIENTS, _REQUEST)
        time.sleep(10)
        before = load.done
        replicas[0].process.send_signal(number)
        time.sleep(15)
        load.stop()
    seen = {"answered_before": before, "answered_after": load.done - before, "streams_cut": load.cut, "lost": load.lost}
    code = replicas[0].wait(60)
    replicas[1].stop()
    return seen | {"exit_code": code}


def main() -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    out = Path(sys.argv[1])
    results: dict[str, Any] = circumstances(("uvicorn", "uvloop", "fastapi")) | {"engine": f"vllm-cpu {version('vllm-cpu')}"}
    with tempfile.TemporaryDirectory() as name, gateways(Path(name)) as start:
        model = write_tiny_llama(Path(name) / "tiny-llama")
        for number in (signal.SIGKILL, signal.SIGTERM):
            results[number.name] = end_one(start, model, Path(name), number)
            write(out, results)
    killed, told = results["SIGKILL"], results["SIGTERM"]
    return int(bool(killed["lost"] or told["lost"] or told["streams_cut"] or not killed["answered_after"]))


if __name__ == "__main__":
    sys.exit(main())
