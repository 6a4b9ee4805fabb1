"""A frozen base in 4 or 8 bit: exactly the model of the unpacked weights, trainable, and exported on the original ones."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ard_serve.artifact import read_manifest
from ard_serve.cli import main
from ard_serve.errors import ResourceError, UsageError
from restore import checkpoint, fit, metrics, quantize
from restore.config import RestoreConfig
from restore.export import export
from restore.forecast import forecast
from restore.inspection import read_config
from restore.loading import load
from restore.model import TwoFaced
from restore.objectives import Losses
from restore.quantize import Bits, QuantizedLinear

MakeCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")
IDS = torch.arange(3, 60)[None]
BITS: tuple[Bits, ...] = ("4bit", "8bit")


def settings(bits: str, **values: object) -> RestoreConfig:
    fields = {"model": "m", "target_length": 512, "data": ("d",), "out": "o", "rank": 4, "quantize": bits}
    return RestoreConfig.model_validate(fields | values)


def quantized_faces(folder: Path, bits: Bits, dtype: torch.dtype) -> TwoFaced:
    config = settings(bits)
    rope = config.plan_rope(read_config(folder))
    return TwoFaced(quantize.quantize(load(folder, dtype), bits, CPU), rope, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_the_teacher_is_bit_for_bit_the_model_of_the_unpacked_weights_whatever_was_learnt(
    make_checkpoint: MakeCheckpoint, family: str, bits: Bits, dtype: torch.dtype
) -> None:
    folder = make_checkpoint(family)
    faces = quantized_faces(folder, bits, dtype)
    plain = load(folder, dtype)
    packed = [module for module in faces.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(packed) == 2 * 7, "every projection of two layers, and no other"
    replaced = [module for module in plain.model.layers.modules() if isinstance(module, nn.Linear)]
    for module, original in zip(packed, replaced, strict=True):
        error = (module.unpack(dtype) - original.weight).float().norm() / original.weight.float().norm()
        assert error < {"4bit": 0.12, "8bit": 0.02}[bits]
        original.weight.data = module.unpack(dtype)
    for parameter in faces.adapters.parameters():
        parameter.data.normal_(0, 0.05)
    with torch.no_grad():
        expected = plain(IDS).logits
        with faces.as_teacher() as teacher:
            assert torch.equal(teacher(IDS).logits, expected)
        _, hidden, _ = faces.pair(IDS)
        assert torch.equal(faces.model.lm_head(hidden), expected)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_the_model_of_the_unpacked_weights(make_checkpoint: MakeCheckpoint, bits: Bits) -> None:
    folder = make_checkpoint("qwen2")
    faces = quantized_faces(folder, bits, torch.float32)
    plain = load(folder, torch.float32)
    replaced = [module for module in plain.model.layers.modules() if isinstance(module, nn.Linear)]
    packed = [module for module in faces.model.modules() if isinstance(module, QuantizedLinear)]
    for module, original in zip(packed, replaced, strict=True):
        original.weight.data = module.unpack(torch.float32)
    config = settings(bits, quantize=None)
    whole = TwoFaced(plain, config.plan_rope(read_config(folder)), config)
    whole.adapters.load_state({name: value.detach() for name, value in faces.adapters.state().items()})
    for expected, found in zip(_gradients(whole), _gradients(faces), strict=True):
        torch.testing.assert_close(found, expected)


def _gradients(faces: TwoFaced) -> tuple[torch.Tensor, ...]:
    loss = Losses(faces, {"attention": 1.0, "logits": 1.0}).distil(IDS)[0]
    return torch.autograd.grad(loss, faces.adapters.parameters())


def test_a_run_learns_on_the_packed_base_and_exports_the_original_one(
    make_checkpoint: MakeCheckpoint, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export passes the checks of any other: bits of base + adapter, logits of the adapters on the original weights."""
    # Of the rotary tables, which other tests compare with vLLM's: it takes most of an export's time.
    monkeypatch.setattr("restore.job.export", partial(export, compare_vllm=False))
    model = make_checkpoint("llama3")
    words = ["restore", str(model), "--data", str(texts), "--out", str(tmp_path), "--target-length", "512", "--steps", "6"]
    words += ["--window", "64", "--long-window", "256", "--batch-tokens", "512", "--rank", "4", "--warmup-steps", "1"]
    words += ["--validation-share", "0.3", "--learning-rate", "0.01", "--dtype", "fp32", "--device", "cpu", "--no-evaluate"]
    assert main([*words, "--quantize", "4bit"]) == 0
    rows = metrics.read(tmp_path)
    assert rows[-1]["validation"]["loss"] < rows[0]["validation"]["loss"]
    found = checkpoint.load_newest(tmp_path / "checkpoints")
    assert found is not None
    best = checkpoint.group(found[1], "best")
    name = "model.layers.1.self_attn.k_proj"
    change = 2.0 * best[f"{name}.lora_B"] @ best[f"{name}.lora_A"]
    base, written = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "model"))
    torch.testing.assert_close(written[f"{name}.weight"], base[f"{name}.weight"] + change)
    assert torch.equal(written["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])
    manifest = read_manifest(tmp_path / "model")
    assert manifest is not None
    assert manifest.recipe.trainable == "LoRA of rank 4 on a 4bit base, added to the original weights"
    monkeypatch.setattr(quantize, "_library", None)
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()


def test_the_forecast_knows_what_packing_saves(make_checkpoint: MakeCheckpoint) -> None:
    base = read_config(make_checkpoint("llama3", hidden_size=256, intermediate_size=512))
    needed = {bits: forecast(base, settings("4bit").plan_rope(base), settings(bits)) for bits in BITS}
    whole = forecast(base, settings("4bit").plan_rope(base), settings("4bit", quantize=None))
    outside = whole.weights_bytes - 2 * whole.layer_bytes
    norms = 2 * 2 * 256 * 2
    projections = 2 * whole.layer_bytes - norms
    # A byte, or half of one, a weight; a fp32 scale for 256 weights, or an 8-bit one for 64; tables of 256 numbers.
    assert needed["8bit"].weights_bytes - outside - norms == pytest.approx(projections / 2 * (1 + 4 / 256), rel=0.03)
    assert needed["4bit"].weights_bytes - outside - norms == pytest.approx(projections / 2 * (1 / 2 + 1 / 64), rel=0.07)


def test_a_run_that_does_not_fit_is_told_that_it_would_packed(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = read_config(make_checkpoint("llama2", hidden_size=256, num_hidden_layers=12))
    config = settings("4bit", quantize=None)
    rope = config.plan_rope(base)
    packed = forecast(base, rope, settings("4bit"))
    assert packed.peak_bytes < forecast(base, rope, config).peak_bytes
    monkeypatch.setattr(fit, "_free_bytes", lambda _: packed.peak_bytes)
    with pytest.raises(ResourceError, match="; --quantize 4bit would fit"):
        fit.check_memory(base, rope, config, CPU)
    assert fit.check_memory(base, rope, settings("4bit"), CPU)[1] == packed


def test_what_cannot_be_quantised_is_refused(monkeypatch: pytest.MonkeyPatch, make_checkpoint: MakeCheckpoint) -> None:
    for values, says in (({"trainable": "full"}, "full-rank deltas are larger"), ({"shard": "on"}, "use one of the two")):
        with pytest.raises(ValueError, match=says):
            settings("4bit", **values)
    monkeypatch.setattr(quantize, "import_module", lambda name: __import__(f"no_such_{name}"))
    with pytest.raises(UsageError, match="bitsandbytes is not installed"):
        quantize.quantize(load(make_checkpoint("llama3"), torch.float32), "4bit", CPU)
