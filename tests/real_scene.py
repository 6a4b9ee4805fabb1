"""The server with a real engine on which `real_faults.py` plays, and what its rows share."""

import json
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil
from helpers_server import Gateway, StartGateway

from ard_serve import weights
from server.auth import hash_key
from server.capacity import kv_bytes_per_token

ALICE, BOB = "alice-secret-key", "bob-secret-key"
START_S = 400
ANSWER_S = 1200  # two windows one after another are 200 s of work for two cores without AVX-512


@dataclass
class Scene:
    """One server that most rows share, and what is needed to start others. Lengths in tokens."""

    start: StartGateway
    folder: Path
    model: Path
    engine_command: tuple[str, ...]
    engine_args: tuple[str, ...]
    window: int = 2048

    def serve(self, model: Path | None = None, **fields: Any) -> Gateway:
        """Start a server with room for little more than two windows of KV cache; prefixes are cached, keys are needed."""
        kv_gib = 2.3 * self.window * kv_bytes_per_token(json.loads((self.model / "config.json").read_text()), None) / 2**30
        keys = self.folder / "keys.toml"
        keys.write_text(f'[keys.alice]\nsha256 = "{hash_key(ALICE)}"\nadmin = true\n[keys.bob]\nsha256 = "{hash_key(BOB)}"\n')
        own: dict[str, Any] = {"model": str(model or self.model), "served_model_name": "model", "api_keys": str(keys)}
        own |= {"engine_command": self.engine_command, "engine_args": self.engine_args, "max_model_len": self.window}
        # The queue holds one request, so that a full server is soon reached; a canary may wait for a long prompt's step.
        own |= {"kv_cache_gib": kv_gib, "canary_interval_s": 1, "canary_timeout_s": 5, "queue_size": 1, "metrics_port": 0}
        own |= {"header_timeout_s": 1, "body_timeout_s": 2, "start_timeout_s": START_S}
        # No row is to measure how fast the machine is; one about a deadline sets its own.
        own |= {"request_timeout_s": ANSWER_S, "queue_timeout_s": ANSWER_S, "drain_s": ANSWER_S}
        return self.start(**(own | fields))

    @cached_property
    def shared(self) -> Gateway:
        """The server that the rows share, ready."""
        return self.serve().until_ready(START_S)

    def ask(self, key: str | None = ALICE, to: Gateway | None = None, **fields: Any) -> httpx.Response:
        with (to or self.shared).client(key, timeout_s=ANSWER_S + 30) as client:
            return client.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, **fields})

    def engine_metric(self, name: str, of: Gateway | None = None) -> float:
        with (of or self.shared).client(ALICE) as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    def stream(self, gateway: Gateway, max_tokens: int, then: Callable[[], None]) -> tuple[str, float]:
        """Open a stream, do something after its first event, and read to the end: its text, and seconds from that on."""
        body = {"prompt": [5, 6], "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        with gateway.client(ALICE, timeout_s=120) as client, client.stream("POST", "/v1/completions", json=body) as response:
            chunks = response.iter_bytes()
            text = next(chunks)
            then()
            since = time.monotonic()
            text += b"".join(chunks)
        return text.decode(), time.monotonic() - since


@dataclass(frozen=True)
class Row:
    name: str
    done: str
    check: Callable[[Scene], str]


ROWS: list[Row] = []


def row(name: str, done: str) -> Callable[[Callable[[Scene], str]], Callable[[Scene], str]]:
    def add(check: Callable[[Scene], str]) -> Callable[[Scene], str]:
        ROWS.append(Row(name, done, check))
        return check

    return add


def refused(response: httpx.Response, status: int, code: str = "", param: str | None = None) -> str:
    """Hold an answer to OpenAI's error shape; says what it was."""
    error = response.json()["error"]
    assert response.status_code == status, f"status {response.status_code}, not {status}: {error}"
    assert set(error) == {"message", "type", "param", "code"}, error
    assert not code or error["code"] == code, error
    assert param is None or error["param"] == param, error
    return f"{status} {error['code']}: {error['message']}"[:200]


def damaged(scene: Scene, name: str) -> Path:
    folder = scene.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(scene.model, folder)
    return folder


def tensor_set_to(folder: Path, value: float, suffix: str) -> None:
    """Overwrite one bfloat16 or float32 tensor in place."""
    tensor = next(t for name, t in weights.read_headers(folder).items() if name.endswith(suffix))
    number = struct.pack("<f", value)
    item = number[2:] if tensor.dtype == "BF16" else number
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start)
        file.write(item * ((tensor.end - tensor.start) // len(item)))


def suspend(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.suspend()


def engine_processes(gateway: Gateway) -> list[psutil.Process]:
    """The engine's processes, without the leash that holds them."""
    (leash,) = psutil.Process(gateway.process.pid).children()
    return leash.children(recursive=True)


def core_of(gateway: Gateway) -> psutil.Process:
    return next(process for process in engine_processes(gateway) if "EngineCore" in " ".join(process.cmdline()))
