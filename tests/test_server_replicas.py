"""Two replicas behind HAProxy as deploy/haproxy.cfg sets it up: killing one under load loses nothing that had not begun."""

import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_server import PROMPT, Gateway, StartGateway, free_port, gateways, wait_for

CONFIG = Path(__file__).parent.parent / "deploy" / "haproxy.cfg"
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="needs haproxy")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartGateway]:
    with gateways(tmp_path) as start:
        yield start


@contextmanager
def balancer(replicas: list[Gateway], folder: Path) -> Iterator[str]:
    """The deployed configuration with these replicas; yields its address once both are seen to be ready."""
    port = free_port()
    text = CONFIG.read_text().replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    for number, replica in enumerate(replicas, 1):
        text = text.replace(f"127.0.0.1:800{number}", f"127.0.0.1:{replica.port}")
    config = folder / "haproxy.cfg"
    config.write_text(text)
    process = subprocess.Popen([str(HAPROXY), "-db", "-f", str(config)])
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: process.poll() is not None or is_ready(url), 10)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


class Load:
    """Clients that ask one request after another, half of them streams, each answered within three seconds."""

    def __init__(self, url: str, clients: int) -> None:
        self.lost: list[str] = []
        self.cut, self.done = 0, 0
        self._url, self._over = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(number % 2 == 0,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self, stream: bool) -> None:
        script = {"first_s": 0.3, "tokens": 40, "gap_s": 0.05}
        body = {"prompt": PROMPT, "max_tokens": 8, "stream": stream, "user": json.dumps(script)}
        with httpx.Client(base_url=self._url, timeout=30) as client:
            while not self._over.is_set():
                self._ask(client, body)

    def _ask(self, client: httpx.Client, body: dict[str, Any]) -> None:
        begun, text = False, b""
        try:
            with client.stream("POST", "/v1/completions", json=body) as response:
                begun = response.status_code == 200
                for chunk in response.iter_raw():
                    text += chunk
            is_whole = not body["stream"] or text.endswith(b"data: [DONE]\n\n")
        except httpx.TransportError as error:
            is_whole, text = False, repr(error).encode()
        if begun and is_whole:
            self.done += 1
        elif begun:
            self.cut += 1
        else:
            self.lost.append(text.decode())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_replica_that_ends_under_load_loses_no_request_that_had_not_begun(
    start: StartGateway, tmp_path: Path, number: signal.Signals
) -> None:
    replicas = [start({"blocks": 4000}).until_ready() for _ in range(2)]
    with balancer(replicas, tmp_path) as url:
        load = Load(url, clients=16)
        time.sleep(4)
        before = load.done
        replicas[0].process.send_signal(number)
        time.sleep(5)
        load.stop()
    assert before > 0
    assert replicas[0].engine_events("start")
    assert load.done > before
    assert load.lost == []
    assert load.cut <= (8 if number is signal.SIGKILL else 0), "only streams that had begun, and on one replica of two"


def test_the_deployed_configuration_is_valid() -> None:
    done = subprocess.run([str(HAPROXY), "-c", "-f", str(CONFIG)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
