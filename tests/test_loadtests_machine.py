"""What is said of the machine, and the memory of a server whose processes and GPUs are known."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from loadtests import machine
from loadtests.address import Address

# A server whose child holds 64 MiB; it prints its port once both are there.
_SERVER = """
import socket, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; held = b'x' * (64 << 20); print(flush=True); time.sleep(60)"],
                         stdout=subprocess.PIPE)
child.stdout.readline()
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
child.kill()
"""


def test_memory_is_that_of_the_whole_process_tree() -> None:
    command = [sys.executable, "-c", _SERVER]
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        server = Address("http", "127.0.0.1", int(process.stdout.readline()), "")
        memory = machine.ServerMemory(server)
        memory.sample()
        rss_bytes, _ = memory.take()
        both = machine.ServerMemory(own := Address("http", "127.0.0.1", listener.getsockname()[1], ""), server)
        both.sample()
        both_bytes, _ = both.take()
        twice = machine.ServerMemory(own, own)
        twice.sample()
        process.communicate("")
    assert rss_bytes is not None
    assert rss_bytes > 64 << 20
    assert both_bytes is not None
    assert both_bytes > rss_bytes, "a gateway and the engine that it is attached to"
    assert twice.take()[0] == pytest.approx(both_bytes, rel=0.1), "no process counts twice"
    assert memory.take()[0] is None, "each cell starts over"


@contextmanager
def serving(**variables: str) -> Iterator[int]:
    """The port of a server that was started with these variables."""
    command = [sys.executable, "-c", _SERVER]
    environment = os.environ | variables
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.communicate("")


def test_gpu_memory_is_that_of_the_servers_gpus_or_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = SimpleNamespace(
        NVMLError=RuntimeError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2, nvmlDeviceGetHandleByIndex=int,
        nvmlDeviceGetName=lambda index: f"GPU {index}", nvmlDeviceGetUUID=lambda index: f"GPU-{index}",
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(used=index + 5),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    memory = machine.ServerMemory(Address("http", "127.0.0.1", 9, ""))
    memory.sample()
    assert memory.take() == (None, 11)
    assert machine.describe_machine()["gpus"] == ["GPU 0", "GPU 1"]
    for told, used in (("1", 6), ("GPU-0", 5), ("0, 1", 11), ("", 11)):
        with serving(CUDA_VISIBLE_DEVICES=told) as port:
            memory = machine.ServerMemory(Address("http", "127.0.0.1", port, ""))
            memory.sample()
        assert memory.take()[1] == used, "what others do on the other GPU is not the server's"


def test_commit_is_marked_where_the_code_differs_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "loadtests" / "machine.py"
    code.parent.mkdir()
    code.write_text("", encoding="utf-8")
    monkeypatch.setattr(machine, "__file__", str(code))
    monkeypatch.delenv("COMMIT", raising=False)
    assert machine.commit() == "", "not a checkout"
    monkeypatch.setenv("COMMIT", "0123456789ab")
    assert machine.commit() == "0123456789ab"
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    head = machine.commit()
    assert len(head) == 12
    (tmp_path / "elsewhere").write_text("", encoding="utf-8")
    assert machine.commit() == head
    code.write_text("changed", encoding="utf-8")
    assert machine.commit() == f"{head}-dirty"
