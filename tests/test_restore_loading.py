"""Models open by folder or by hub name, as transformers opens them, and offline nothing reaches for the network."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from ard_serve import artifact
from ard_serve.errors import ModelError, UsageError
from restore.loading import inspect, load, load_tokenizer, resolve

MakeCheckpoint = Callable[..., Path]
IDS = torch.arange(3, 35)[None]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices lose more to the threads' meeting than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A whole checkpoint of one file that a test may damage."""
    return Path(shutil.copytree(make_checkpoint("llama3"), tmp_path / "model"))


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_whole_checkpoints_of_every_family_load_as_transformers_does(
    make_checkpoint: MakeCheckpoint, family: str, max_shard_size: str
) -> None:
    folder = make_checkpoint(family, max_shard_size)
    checkpoint = inspect(folder)
    assert (len(list(folder.glob("*.safetensors"))) == 1) == (max_shard_size == "5GB")
    assert checkpoint.dtype == "F32"
    assert checkpoint.size_bytes < sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    model = load(folder, torch.float32)
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(folder)(IDS).logits)
    assert load_tokenizer(folder)("ab").input_ids[0] == 256


def test_load_takes_another_config_and_dtype(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}
    model = load(checkpoint, torch.bfloat16, config=config)
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["factor"] == 4.0


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_rope_that_is_no_object_is_refused(checkpoint: Path, field: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {field: "linear"}))
    with pytest.raises(ModelError, match=f"{field} = 'linear' must be a JSON object or null"):
        inspect(checkpoint)


def test_a_null_quantization_config_is_none(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    inspect(checkpoint)


@pytest.mark.fault("R1")
def test_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such folder") as caught:
        resolve(str(tmp_path / "nowhere"))
    assert caught.value.exit_code == 2


def test_missing_tokenizer_is_one_line(checkpoint: Path) -> None:
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="no usable tokenizer") as caught:
        load_tokenizer(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("R21")
def test_offline_opens_no_socket(tmp_path: Path) -> None:
    """A process that looks a hub name up while offline makes no socket of any internet family, seen by the kernel's own log."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    code = (
        "import sys\nfrom restore.loading import resolve\n"
        "try: resolve('org/name')\nexcept Exception as error: print(type(error).__name__, error); sys.exit(error.exit_code)"
    )
    trace = tmp_path / "trace"
    ended = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-o", trace, "-e", "trace=socket,connect,sendto", sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "HF_HUB_OFFLINE is set" in ended.stdout
    assert "AF_INET" not in trace.read_text()


def manifest_of(folder: Path) -> artifact.Manifest:
    recipe = artifact.RecipeRecord(name="default", objectives={}, trainable="full", steps=1, tokens=1, seed=0)
    return artifact.Manifest(
        created_at="2026-01-01T00:00:00+00:00",
        ard_serve_version="0",
        base=artifact.BaseModelRecord(name="org/base", architecture="llama", weights_sha256="", native_window=64),
        rope=artifact.RopeRecord(rope_type="yarn", factor=2.0, target_length=128, parameters={}),
        recipe=recipe,
        files=artifact.describe_files(folder),
        tensors=artifact.describe_tensors(folder),
    )


class _Hub(ThreadingHTTPServer):
    """As much of the hub as a download needs: one repository, whose files lie in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.folder = folder
        self.fetched: list[str] = []


class _HubHandler(BaseHTTPRequestHandler):
    server: _Hub
    sha = "0" * 40

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/org/name/revision/"):
            names = [{"rfilename": path.name} for path in sorted(self.server.folder.iterdir())]
            self._answer(json.dumps({"id": "org/name", "sha": self.sha, "siblings": names}).encode(), "info")
        elif self.path.startswith("/api/models/org/name/tree/"):
            files = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name}
                for path in sorted(self.server.folder.iterdir())
            ]
            self._answer(json.dumps(files).encode(), "tree")
        else:
            name = self.path.rsplit("/", 1)[-1]
            if not (self.server.folder / name).is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if self.command == "GET":
                self.server.fetched.append(name)
            self._answer((self.server.folder / name).read_bytes(), name)

    do_HEAD = do_GET

    def _answer(self, body: bytes, etag: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", self.sha)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hub]:
    server = _Hub(checkpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_hub_name_is_downloaded_without_pickles_or_code(hub: _Hub) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(b"x")
    (hub.folder / "modeling_own.py").write_text("raise SystemExit")
    folder = resolve("org/name")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.fetched)
    assert not {"pytorch_model.bin", "modeling_own.py"} & set(hub.fetched)
    inspect(folder)


def test_an_export_on_the_hub_comes_with_all_that_its_manifest_lists(hub: _Hub, tmp_path: Path) -> None:
    for name in ("README.md", "report.md", "report.html", "evaluation.json"):
        (hub.folder / name).write_text("{}")
    artifact.write_manifest(hub.folder, manifest_of(hub.folder))
    (hub.folder / ".gitattributes").write_text("the hub adds it to every repository")
    inspect(resolve("org/name"))
    copy = Path(shutil.copytree(hub.folder, tmp_path / "copy"))
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    (copy / ".cache" / "huggingface" / "README.md.metadata").write_text("as `hf download --local-dir` leaves it")
    inspect(copy)
    (copy / "more.json").write_text("{}")
    with pytest.raises(ModelError, match=r"more\.json: not listed in ard-manifest\.json"):
        inspect(copy)


def test_unknown_hub_name_is_one_line(hub: _Hub) -> None:
    with pytest.raises(UsageError, match=r"org/other.*check the name") as caught:
        resolve("org/other")
    assert "\n" not in str(caught.value)
