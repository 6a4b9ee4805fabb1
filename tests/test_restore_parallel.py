"""Two processes train as one does: the same losses and weights, one set of files, one end for both."""

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_server import free_port
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.tensor import DTensor

from ard_serve.cli import main
from ard_serve.errors import ResourceError
from restore import fit, job, metrics
from restore.config import RestoreConfig
from restore.forecast import forecast
from restore.inspection import inspect, read_config
from restore.loading import load
from restore.model import TwoFaced
from restore.objectives import Losses
from restore.parallel import World
from restore.sharding import Shards, load_sharded

# fp32 on the CPU: only the order of the sums differs.
TOLERANCE = 2e-5


def restore(model: Path, texts: Path, out: Path, steps: int = 4, device: str = "cpu") -> list[str]:
    words = ["restore", str(model), "--data", str(texts), "--out", str(out), "--target-length", "512", "--steps", str(steps)]
    words += ["--window", "64", "--long-window", "256", "--batch-tokens", "768", "--rank", "4", "--warmup-steps", "1"]
    words += ["--validation-share", "0.3", "--validation-windows", "3", "--validation-every", "2", "--learning-rate", "0.01"]
    return [*words, "--dtype", "fp32", "--device", device, "--no-evaluate"]


def on_two(words: list[str]) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ard_serve.cli",
        *words,
    ]


@pytest.fixture(scope="module")
def alone(make_checkpoint: Callable[..., Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model and its run by one process on a device, once for all tests: `model` and `run` in the folder."""
    model = make_checkpoint("qwen3", max_shard_size="60KB", num_hidden_layers=3)

    @cache
    def train(device: str) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        (folder / "model").symlink_to(model)
        assert main(restore(model, texts, folder / "run", device=device)) == 0
        return folder

    return train


TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


# On the CPU, two machines below are two processes that are not sharded.
@pytest.mark.parametrize(
    ("shard", "device"),
    [
        pytest.param("off", "cpu", marks=pytest.mark.slow),
        ("on", "cpu"),
        pytest.param("off", "cuda", marks=TWO_GPUS),
        pytest.param("on", "cuda", marks=TWO_GPUS),
    ],
)
def test_two_processes_give_the_losses_and_weights_of_one(
    alone: Callable[[str], Path], texts: Path, tmp_path: Path, shard: str, device: str
) -> None:
    """Replicated or sharded; validation has four windows of two lengths, so that one process has more passes to run."""
    words = [*restore(alone(device) / "model", texts, tmp_path, device=device), "--shard", shard]
    run = subprocess.run(on_two(words), capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("restored model:") == 1
    assert_same(alone(device) / "run", tmp_path)


def test_two_machines_train_as_one(alone: Callable[[str], Path], texts: Path, tmp_path: Path) -> None:
    """As docs/training.md has it: the same command on each, one process each, met at a host and port."""
    meeting = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint localhost:{free_port()}".split()
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "ard_serve.cli"]
    command += restore(alone("cpu") / "model", texts, tmp_path)
    machines = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert sum(out.count("restored model:") for out, _ in said) == 1, "one publishes"
    assert_same(alone("cpu") / "run", tmp_path)


def assert_same(one: Path, two: Path) -> None:
    """Both runs have the same metrics and weights."""
    rows = metrics.read(two)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for alone, shared in zip(metrics.read(one), rows, strict=True):
        for name in ("loss", "attention", "logits", "lm", "grad_norm"):
            assert shared.get(name, 0) == pytest.approx(alone.get(name, 0), rel=TOLERANCE), name
        assert shared.get("layer_kl", []) == pytest.approx(alone.get("layer_kl", []), rel=TOLERANCE)
        assert shared.get("validation", {}).get("loss", 0) == pytest.approx(
            alone.get("validation", {}).get("loss", 0), rel=TOLERANCE
        )
    for path in sorted((one / "model").glob("*.safetensors")):
        found = load_file(two / "model" / path.name)
        for name, weight in load_file(path).items():
            assert float((weight - found[name]).abs().max()) < 1e-4, name


def test_a_signal_stops_both_with_one_checkpoint(make_checkpoint: Callable[..., Path], texts: Path, tmp_path: Path) -> None:
    command = on_two(restore(make_checkpoint("llama3"), texts, tmp_path, steps=100_000))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 120
        while not any("loss" in row for row in metrics.read(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    assert said.count("stopped by SIGTERM at step") == 1
    steps = metrics.read(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / f"step-{steps:06d}" / "state.json").exists()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_windows_are_shared_out_once_and_evenly(size: int) -> None:
    tokens = [32_768, *[8192] * 7]
    shares = [World(rank, size).share(tokens) for rank in range(size)]
    assert sorted(window for share in shares for window in share) == list(range(8))
    loads = [sum(tokens[window] for window in share) for share in shares]
    assert max(loads) <= max(32_768, math.ceil(sum(tokens) / size) + 8192)


@pytest.fixture
def process_group() -> Iterator[World]:
    """A process group of this process alone: FSDP2 shards over it as over many."""
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())  # type: ignore[attr-defined]
    yield World(0, 1)
    distributed.destroy_process_group()


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_sharded_step_has_the_bits_of_a_whole_one_and_keeps_no_layer_whole(
    make_checkpoint: Callable[..., Path], process_group: World, trainable: str
) -> None:
    base = inspect(make_checkpoint("llama-tied", num_hidden_layers=3))
    config = RestoreConfig.model_validate({"model": "m", "target_length": 512, "data": ("d",), "out": "o", "rank": 4,
                                           "trainable": trainable})  # fmt: skip
    rope = config.plan_rope(base.config)
    whole = TwoFaced(load(base.folder, torch.float32), rope, config)
    model = load_sharded(base, rope.native_config(base.config), torch.float32, torch.device("cpu"), process_group)
    shards = Shards(model.model.layers)
    sharded = TwoFaced(model, rope, config, shards)

    def kinds() -> set[type]:
        return {type(weight.data) for name, weight in model.model.layers.named_parameters() if not weight.requires_grad}

    def learn(faces: TwoFaced) -> list[torch.Tensor]:
        for number, parameter in enumerate(faces.adapters.parameters()):
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
        losses = Losses(faces, {"attention": 1.0, "logits": 1.0, "lm": 1.0})
        ids_BT = torch.arange(48)[None]
        loss = losses.distil(ids_BT)[0] if faces.shards is None else _guarded(losses.distil, ids_BT, kinds)
        total = loss + losses.language_model(ids_BT)[0]
        return [total.detach(), *torch.autograd.grad(total, faces.adapters.parameters())]

    for expected, found in zip(learn(whole), learn(sharded), strict=True):
        assert torch.equal(expected, found)
    assert kinds() == {DTensor}
    with shards.whole(1, again=False):
        assert not isinstance(model.model.layers[1].self_attn.k_proj.get_parameter("base_layer.weight").data, DTensor)
    shards.idle(trains=True)
    assert kinds() == {DTensor}


def _guarded(distil: Callable[..., Any], ids_BT: torch.Tensor, kinds: Callable[[], set[type]]) -> torch.Tensor:
    loss: torch.Tensor = distil(ids_BT)[0]
    assert kinds() == {DTensor}, "between forward and backward"
    return loss


class Believed(World):
    """Two processes, as far as the memory check can see."""

    def any(self, here: bool, device: torch.device) -> bool:
        return here


@pytest.mark.parametrize(("size", "shard"), [(1.1, "off"), (0.9, "on")])
def test_a_model_is_sharded_where_it_does_not_fit_one_device(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, size: float, shard: str
) -> None:
    base = read_config(make_checkpoint("llama2", hidden_size=256, num_hidden_layers=12))
    fields = {"model": "m", "target_length": 512, "data": ("d",), "out": "o", "rank": 4, "batch_tokens": 1024}
    config = RestoreConfig.model_validate(fields)
    rope = config.plan_rope(base)
    whole = forecast(base, rope, config)
    monkeypatch.setattr(fit, "_free_bytes", lambda _: int(size * whole.peak_bytes))
    settled, needed = fit.check_memory(base, rope, config, torch.device("cpu"), Believed(0, 2))
    assert settled.shard == shard
    layers = 12 * (whole.weights_bytes - 2 * 259 * 256 * 2) / 12  # all but embedding and head
    saved = layers / 2 - 3 * layers / 12 if shard == "on" else 0
    assert whole.weights_bytes - needed.weights_bytes == pytest.approx(saved, rel=0.01)
    if shard == "on":
        with pytest.raises(ResourceError, match="this run needs about"):
            fit.check_memory(base, rope, config, torch.device("cpu"))


def test_one_process_cannot_shard(make_checkpoint: Callable[..., Path], texts: Path, tmp_path: Path) -> None:
    words = restore(make_checkpoint("llama3"), texts, tmp_path)
    assert main([*words, "--shard", "on"]) == 2


def test_a_sharded_model_is_not_evaluated_where_it_was_trained(
    make_checkpoint: Callable[..., Path],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def shards(_base: object, _rope: object, config: RestoreConfig, *_: object) -> tuple[RestoreConfig, str]:
        return config.model_copy(update={"shard": "on"}), "little"

    monkeypatch.setattr(job, "check_memory", shards)
    words = [word for word in restore(make_checkpoint("llama3"), texts, tmp_path) if word != "--no-evaluate"]
    assert main(words) == 2
    assert "add --no-evaluate" in capsys.readouterr().err
