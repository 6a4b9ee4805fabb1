"""Replicas behind HAProxy as deploy/haproxy.cfg sets it up, and clients that tell what of theirs was lost and what cut off."""

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from helpers_server import NO_TLS, Gateway, free_port, wait_for

CONFIG = Path(__file__).parent.parent / "deploy" / "haproxy.cfg"
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")


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
        return httpx.get(f"{url}/readyz", trust_env=False, verify=NO_TLS).status_code == 200
    except httpx.TransportError:
        return False


class Load:
    """Clients that ask the same again and again, half of them as a stream."""

    def __init__(self, url: str, clients: int, fields: dict[str, Any]) -> None:
        self.lost: list[str] = []
        self.cut, self.done = 0, 0
        self._url, self._fields, self._over = url, fields, threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(number % 2 == 0,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self, stream: bool) -> None:
        with httpx.Client(base_url=self._url, timeout=120, trust_env=False, verify=NO_TLS) as client:
            while not self._over.is_set():
                self._ask(client, {**self._fields, "stream": stream})

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
