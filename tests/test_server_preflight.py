"""A model folder that is damaged, holds code or does not fit is refused before an engine starts, naming what is wrong."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from helpers_server import MODEL_CONFIG, StartGateway, gateways, is_alive, write_export, write_model, write_safetensors

from ard_serve import artifact
from ard_serve.errors import ArdError, ModelError, ResourceError, UsageError
from server import capacity
from server.config import ServeConfig
from server.preflight import check_contents, check_model, expected_shapes, model_card


def check(folder: Path) -> None:
    check_contents(check_model(ServeConfig(model=folder)))


def truncate(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    shard = folder / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-40] ^= 1
    shard.write_bytes(data)


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    shapes = expected_shapes(MODEL_CONFIG)
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


def poison(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan


def drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.layers.1.self_attn.q_proj.weight"]


def reshape(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((8, 32), np.float32)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def add_auto_map(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (truncate, "model.safetensors"),
    "missing tensor": (lambda folder: rewrite(folder, drop), "model.layers.1.self_attn.q_proj.weight"),
    "mis-shaped tensor": (lambda folder: rewrite(folder, reshape), "model.layers.0.self_attn.k_proj.weight"),
    "NaN weight": (lambda folder: rewrite(folder, poison), "model.layers.1.mlp.up_proj.weight"),
    "pickle only": (pickle_only, "safetensors"),
    "remote code named": (add_auto_map, "auto_map"),
    "remote code present": (lambda folder: (folder / "modeling.py").write_text("raise SystemExit"), "modeling.py"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    with gateways(tmp_path_factory.mktemp("preflight")) as start:
        yield start


@pytest.mark.fault("S1")
@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_a_damaged_model_is_refused_and_the_damage_named(tmp_path: Path, name: str) -> None:
    damage, named = DAMAGE[name]
    folder = write_model(tmp_path / "model")
    check(folder)
    damage(folder)
    with pytest.raises(ModelError, match=named):
        check(folder)


def test_weights_that_only_their_owner_may_read_are_named() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        os.chmod(name, 0o755)
        folder = write_model(Path(name) / "model")
        (folder / "model.safetensors").chmod(0o600)  # as transformers saves them
        os.seteuid(65534)
        try:
            with pytest.raises(ModelError, match=r"model\.safetensors: Permission denied for user 65534; `chmod a\+r` it"):
                check(folder)
        finally:
            os.seteuid(0)


@pytest.mark.fault("S1")
def test_a_flipped_bit_is_found_where_there_is_a_manifest(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    check(folder)
    flip_a_bit(folder)
    with pytest.raises(ModelError, match=r"model\.safetensors.*sha256"):
        check(folder)


@pytest.mark.timing
@pytest.mark.fault("S1")
def test_the_server_ends_with_3_within_ten_seconds_and_no_engine_starts(start: StartGateway, tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    flip_a_bit(folder)
    started = time.monotonic()
    gateway = start(model=str(folder))
    assert gateway.wait() == 3
    assert time.monotonic() - started < 10
    assert "sha256 mismatch" in gateway.stderr
    assert len(gateway.stderr.splitlines()) == 1
    assert gateway.engine_events("engine") == []


@pytest.mark.fault("S1")
def test_a_model_too_large_to_check_first_is_checked_beside_its_loading_and_is_never_ready(
    start: StartGateway, tmp_path: Path
) -> None:
    folder = write_export(tmp_path / "export")
    with (folder / "large.bin").open("wb") as file:
        file.truncate(2 << 30)
    manifest = artifact.read_manifest(folder)
    assert manifest
    wrong = artifact.FileRecord(path="large.bin", size_bytes=2 << 30, sha256="0" * 64)
    artifact.write_manifest(folder, manifest.model_copy(update={"files": (*manifest.files, wrong)}))
    gateway = start(model=str(folder))
    states = set()
    with gateway.client() as client:
        while gateway.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                states.add(client.get("/readyz").status_code)
    assert gateway.wait() == 3
    assert states == {503}
    assert "large.bin: sha256 mismatch" in gateway.stderr.splitlines()[-1]
    engines = gateway.engine_events("engine")
    assert engines
    assert not any(is_alive(int(event["pid"])) for event in engines)


def test_a_path_that_is_no_model_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json"):
        check_model(ServeConfig(model=tmp_path))


def test_the_window_is_the_measured_one(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export", served_limit=256)
    assert check_model(ServeConfig(model=folder)).window == 256
    assert check_model(ServeConfig(model=folder, max_model_len=100)).window == 100
    with pytest.raises(UsageError, match=r"400.*256.*--beyond-measured"):
        check_model(ServeConfig(model=folder, max_model_len=400))
    beyond = check_model(ServeConfig(model=folder, max_model_len=400, beyond_measured="mark"))
    assert beyond.window == 400
    card = model_card(ServeConfig(model=folder), beyond, 0)
    assert card["provenance"]["beyond_measured"] is True
    assert card["provenance"]["measured_limit"] == 256


def test_the_model_card_says_where_the_weights_come_from(start: StartGateway, tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    gateway = start(model=str(folder), served_model_name="restored")
    with gateway.client() as client:
        (card,) = client.get("/v1/models").json()["data"]
        assert client.get("/v1/models/restored").json() == card
        assert client.get("/v1/models/other").status_code == 404
    assert card["id"] == "restored"
    assert card["max_model_len"] == 256
    assert card["provenance"]["recipe"]["name"] == "default"
    assert card["provenance"]["files"]["model.safetensors"] == artifact.sha256_of(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("overrides", "bytes_per_token"), [({}, 2 * 2 * 2 * 8 * 4), ({"dtype": "bfloat16"}, 128), ({"head_dim": 16}, 512)]
)
def test_kv_bytes_per_token(overrides: dict[str, object], bytes_per_token: int) -> None:
    assert capacity.kv_bytes_per_token(MODEL_CONFIG | overrides, None) == bytes_per_token


def test_fp8_cache_takes_a_byte_a_channel() -> None:
    assert capacity.kv_bytes_per_token(MODEL_CONFIG, "fp8_e4m3") == 2 * 2 * 2 * 8


def test_a_window_that_does_not_fit_is_refused_with_the_flags_that_help(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", max_position_embeddings=1 << 20)
    checkpoint = check_model(ServeConfig(model=folder))
    assert capacity.plan(checkpoint, (), 1 << 30, ()).kv_tokens == (1 << 30) // 256
    with pytest.raises(ResourceError, match=r"--max-model-len 262144 or --kv-cache-gib 0\.25") as caught:
        capacity.plan(checkpoint, (), 1 << 26, ())
    assert caught.value.exit_code == 5


def test_a_gpu_that_is_too_small_names_vllms_flags(tmp_path: Path) -> None:
    checkpoint = check_model(ServeConfig(model=write_model(tmp_path / "model", max_position_embeddings=1 << 24)))
    with pytest.raises(ResourceError, match="--tensor-parallel-size"):
        capacity.plan(checkpoint, (4 << 30,), None, ())
    assert (
        capacity.plan(checkpoint, (4 << 30,) * 2, None, ("--tensor-parallel-size", "2", "--kv-cache-dtype=fp8")).kv_tokens
        > 1 << 24
    )


def kv_tokens(folder: Path, args: str, gpus: int = 2, told_bytes: int | None = None) -> int:
    checkpoint = check_model(ServeConfig(model=folder))
    return capacity.plan(checkpoint, (4 << 30,) * gpus, told_bytes, tuple(args.split())).kv_tokens


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "-tp", "--pipeline_parallel_size", "-pp", "--tensor_parallel-size"])
@pytest.mark.parametrize("joint", [" ", "="])
def test_each_spelling_of_vllms_flags_counts(tmp_path: Path, flag: str, joint: str) -> None:
    folder = write_model(tmp_path / "model")
    one = kv_tokens(folder, "")
    assert kv_tokens(folder, f"{flag}{joint}2") > 1.9 * one
    assert kv_tokens(folder, f"{flag} 1 {flag}{joint}2") > 1.9 * one  # vLLM takes the last one
    assert kv_tokens(folder, f"--kv_cache_dtype{joint}fp8") == pytest.approx(4 * one, rel=1e-6)
    assert kv_tokens(folder, f"--dtype{joint}half") == pytest.approx(2 * one, rel=0.01)
    assert kv_tokens(folder, f"--dtype{joint}auto") == one
    assert kv_tokens(folder, f"{flag}{joint}2", told_bytes=1 << 20) == 2 * kv_tokens(folder, "", told_bytes=1 << 20)


def test_ranks_beyond_the_heads_of_keys_and_values_hold_copies(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")  # two such heads
    two, four = (kv_tokens(folder, f"-tp {ranks}", gpus=4, told_bytes=1 << 20) for ranks in (2, 4))
    assert four == two
    assert kv_tokens(folder, "-pp 4", gpus=4, told_bytes=1 << 20) == 2 * two


def test_weights_take_what_the_operators_dtype_makes_of_them(tmp_path: Path) -> None:
    checkpoint = check_model(ServeConfig(model=write_model(tmp_path / "model")))
    stored, halved = (capacity.plan(checkpoint, (), 1 << 30, args).weight_bytes for args in ((), ("--dtype", "bfloat16")))
    assert stored == 2 * halved


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("--tensor-parallel-size two", "--tensor-parallel-size two"),
        ("-tp 0", "--tensor-parallel-size 0"),
        ("-tp", "-tp after --: no value"),
        ("-pp --enforce-eager", "-pp after --: no value"),
        ("--gpu_memory_utilization 92", "--gpu-memory-utilization 92"),
        ("--gpu-memory-utilization=most", "--gpu-memory-utilization most"),
        ("-tp 4", "--tensor-parallel-size 4 after --: that is 4 GPUs and this machine has 2"),
        ("-tp 2 -pp 2", "--tensor-parallel-size 2 x --pipeline-parallel-size 2 after --: that is 4 GPUs"),
    ],
)
def test_a_flag_that_cannot_be_is_named(tmp_path: Path, args: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        kv_tokens(write_model(tmp_path / "model"), args)


@pytest.mark.parametrize("args", ["-tp 4 --distributed-executor-backend ray", "-tp 2 -pp 2 -n 2", "-tp 4 --nnodes=2"])
def test_other_machines_may_give_gpus(tmp_path: Path, args: str) -> None:
    assert kv_tokens(write_model(tmp_path / "model"), args) > 0


def test_a_kv_space_that_vllm_does_not_take_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert kv_tokens(folder, "", gpus=0) == (4 << 30) // 256
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4.5")
    with pytest.raises(UsageError, match=r"VLLM_CPU_KVCACHE_SPACE=4\.5: .*--kv-cache-gib"):
        kv_tokens(folder, "", gpus=0)


def test_a_driver_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(capacity, "_NVIDIA_SMI_TIMEOUT_S", 0.2)
    with pytest.raises(ResourceError, match=r"nvidia-smi did not answer within 0\.2 s"):
        capacity.gpu_memory_bytes()


def test_only_gpus_that_cuda_may_see_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *--id=1*) echo 80000 ;; *) echo 24000; echo 80000 ;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert capacity.gpu_memory_bytes() == (24000 << 20, 80000 << 20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert capacity.gpu_memory_bytes() == (80000 << 20,)


@pytest.mark.parametrize("fields", [{"hidden_size": None}, {"max_position_embeddings": 0}, {"max_position_embeddings": "512"}])
def test_an_impossible_config_is_a_model_error(tmp_path: Path, fields: dict[str, object]) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG | fields))
    with pytest.raises(ArdError, match=r"config\.json"):
        check_model(ServeConfig(model=folder))
