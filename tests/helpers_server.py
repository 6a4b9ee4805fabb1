"""Runs the gateway as a process of its own, with the fake engine or a real one, and talks to it."""

import json
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from ard_serve import artifact
from ard_serve.artifact import BaseModelRecord, Manifest, Quality, RecipeRecord, RopeRecord, Scores
from server.preflight import expected_shapes

FAKE_ENGINE = (sys.executable, str(Path(__file__).with_name("helpers_fake_vllm.py")))
_RUN = """
import json, sys
from ard_serve.console import setup_logging
from ard_serve.errors import ArdError
from server.app import run
from server.config import ServeConfig
setup_logging()
try:
    sys.exit(run(ServeConfig.resolve(None, json.loads(sys.argv[1]))))
except ArdError as error:
    print("ard:", error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
# Reading the machine's certificates takes 20 ms of CPU a client, which a poll of /readyz would take from the engine.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
PROMPT = [1, 2, 3]
ENGINE_KEY = "engine-secret"
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "dtype": "float32",
}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(tensor.tobytes() for tensor in tensors.values()))


def write_model(folder: Path, **overrides: Any) -> Path:
    """A tiny random Llama as config.json and one safetensors file, without torch."""
    folder.mkdir(parents=True, exist_ok=True)
    config = MODEL_CONFIG | overrides
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in expected_shapes(config).items()}
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def write_export(folder: Path, served_limit: int | None = 256, **overrides: object) -> Path:
    """A model with a manifest that describes it truly."""
    write_model(folder, **overrides)
    manifest = Manifest(
        created_at="2026-01-01T00:00:00Z",
        ard_serve_version="0",
        base=BaseModelRecord(name="base", architecture="LlamaForCausalLM", weights_sha256="0" * 64, native_window=128),
        rope=RopeRecord(rope_type="yarn", factor=4.0, target_length=512, parameters={}),
        recipe=RecipeRecord(name="default", objectives={"lm": 1.0}, trainable="lora", steps=1, tokens=1, seed=0),
        quality=Quality(
            native=Scores(perplexity={128: 33.3}),
            restored=Scores(perplexity={256: 29.9}, needle={256: 0.75}),
            served_limit=served_limit,
        ),
        files=artifact.describe_files(folder),
        tensors=artifact.describe_tensors(folder),
    )
    artifact.write_manifest(folder, manifest)
    return folder


class Gateway:
    """A running gateway process, its address, its output, and what its engine saw."""

    def __init__(self, folder: Path, fields: dict[str, Any], script: dict[str, Any], environment: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.engine_log, self._out, self._err = folder / "engine.jsonl", folder / "out.txt", folder / "err.txt"
        self.engine_log.touch()
        fake = {"FAKE_LOG": str(self.engine_log), "FAKE_SCRIPT": json.dumps(script), "HF_HUB_OFFLINE": "1"}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            command = [sys.executable, "-c", _RUN, json.dumps(fields)]
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | fake | environment)
        self._url = ""

    @property
    def url(self) -> str:
        if not self._url:
            wait_for(lambda: "listening on" in self.stdout or self.process.poll() is not None)
            found = re.search(r"listening on (http://\S+),", self.stdout)
            assert found, f"the gateway did not start: {self.stderr[-2000:]}"
            self._url = found.group(1)
        return self._url

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def stdout(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._err.read_text(errors="replace")

    def client(self, key: str | None = None, timeout_s: float = 30) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False, verify=NO_TLS)

    def status(self, path: str) -> int:
        with self.client() as client:
            return client.get(path).status_code

    def until_ready(self, timeout_s: float = 60) -> "Gateway":
        wait_for(lambda: self.status("/readyz") == 200, timeout_s)
        return self

    def engine_events(self, name: str) -> list[dict[str, Any]]:
        events = [json.loads(line) for line in self.engine_log.read_text().splitlines()]
        return [event for event in events if event["event"] == name]

    def metric(self, name: str) -> float:
        """The metric's value, summed over the labels that `name{label="value"}` does not state."""
        with self.client() as client:
            text = client.get("/metrics").text
        name, *wanted = re.findall(r'[\w:]+="[^"]*"|[\w:]+', name)
        found = re.findall(rf"^{re.escape(name)}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
        values = [float(value) for labels, value in found if all(pair in labels for pair in wanted)]
        assert values, f"{name} is not in /metrics"
        return sum(values)

    def wait(self, timeout_s: float = 60) -> int:
        return self.process.wait(timeout_s)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()


StartGateway = Callable[..., Gateway]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def running_engine(command: tuple[str, ...], port: int, log: Path, script: str = "{}") -> Iterator[subprocess.Popen[bytes]]:
    """An engine that no gateway has started, with the key ENGINE_KEY."""
    environment = os.environ | {"VLLM_API_KEY": ENGINE_KEY, "FAKE_LOG": str(log), "FAKE_SCRIPT": script}
    process = subprocess.Popen([*command, "--port", str(port)], env=environment, start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def gateways(tmp: Path) -> Iterator[StartGateway]:
    """Starts gateways on free ports, with the fake engine unless told otherwise, and leaves none behind."""
    started: list[Gateway] = []
    model = write_model(tmp / "tiny")

    def start(script: dict[str, Any] | None = None, environment: dict[str, str] | None = None, **fields: Any) -> Gateway:
        defaults = {"model": str(model), "port": 0, "engine_command": FAKE_ENGINE, "kv_cache_gib": 0.01}
        quick = {"canary_interval_s": 0.3, "canary_timeout_s": 1, "restart_backoff_s": 0.1, "drain_s": 5}
        started.append(Gateway(tmp / f"run{len(started)}", {**defaults, **quick, **fields}, script or {}, environment or {}))
        return started[-1]

    try:
        yield start
    finally:
        for gateway in started:
            if gateway.process.poll() is None:
                gateway.process.kill()
                gateway.process.wait()


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> float:
    """Poll until `condition` holds; seconds waited. A shorter timeout is for a bound that is itself the promise."""
    started = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - started
        assert waited_s < timeout_s, f"still not so after {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - started


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def complete(gateway: Gateway, key: str | None = None, script: Any = None, **fields: Any) -> httpx.Response:
    body = {"prompt": PROMPT, "max_tokens": 8, "user": json.dumps(script or {}), **fields}
    with gateway.client(key) as client:
        return client.post("/v1/completions", json=body)


def send(gateway: Gateway, script: Any = None, **fields: Any) -> socket.socket:
    """A connection on which a request has been sent and nothing was read."""
    body = json.dumps({"prompt": PROMPT, "user": json.dumps(script or {}), **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=5)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    return connection


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, which must have OpenAI's shape whatever went wrong."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])
