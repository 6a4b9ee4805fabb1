"""What runs fused around a layer's products: as transformers has it on the CPU, and on a GPU no worse against float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from restore import mlp, rotation
from restore.config import RestoreConfig
from restore.inspection import read_config
from restore.loading import load
from restore.model import Kept, TwoFaced
from restore.objectives import Losses

MakeCheckpoint = Callable[..., Path]
# Without a GPU, the kernels run in Triton's interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.arange(3, 99)[None] % 256


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def no_worse(ours: Tensor, eager: Tensor, truth: Tensor) -> None:
    assert ours.dtype == eager.dtype
    error, eager_error = (ours.double() - truth).norm(), (eager.double() - truth).norm()
    # Triton's interpreter cuts bf16 off where a GPU rounds to the nearest.
    cut = truth.norm() * 2**-8 if ours.dtype == torch.bfloat16 and not ours.is_cuda else 0
    assert error <= 1.1 * eager_error + 1e-6 * truth.norm() + cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 1024), (1025,)])
def test_swiglu_is_no_further_from_float64_than_its_parts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from restore.kernels import triton_swiglu

    gate, up, pull = (2 * torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3))

    def parts(kind: torch.dtype) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in (gate, up)]
        out = silu(leaves[0]) * leaves[1]
        return [out.detach(), *torch.autograd.grad(out, leaves, pull.to(kind))]

    ours = [triton_swiglu.forward(gate, up), *triton_swiglu.backward(pull, gate, up)]
    for found, eager, truth in zip(ours, parts(dtype), parts(torch.float64), strict=True):
        no_worse(found, eager, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "channels", "tables"),
    [(1, 1, 1, 16, 1), (2, 3, 17, 64, 1), (2, 4, 9, 128, 2), (1, 9, 33, 80, 1), (1, 5, 8, 96, 1)],
)
def test_rotation_is_no_further_from_float64_than_its_parts(
    batch: int, heads: int, tokens: int, channels: int, tables: int, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from restore.kernels import triton_rotary

    # As a projection leaves it, and as attention's backward may: of any strides. Tables need not have equal halves.
    x = torch.randn(batch, tokens, heads, channels, device=DEVICE).to(dtype).transpose(1, 2)
    pull = torch.randn(batch, heads, tokens, channels, device=DEVICE).to(dtype)
    cos, sin = (torch.randn(tables, tokens, channels, device=DEVICE).to(dtype) for _ in range(2))

    def parts(kind: torch.dtype) -> list[Tensor]:
        leaf = x.to(kind).requires_grad_()
        out, _ = apply_rotary_pos_emb(leaf, leaf, cos.to(kind), sin.to(kind))
        return [out.detach(), torch.autograd.grad(out, leaf, pull.to(kind))[0]]

    ours = [triton_rotary.rotate(x, cos, sin), triton_rotary.rotate(pull, cos, sin, back=True)]
    for found, eager, truth in zip(ours, parts(dtype), parts(torch.float64), strict=True):
        no_worse(found, eager, truth)
        assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_model_on_the_cpu_has_the_bits_of_transformers(
    make_checkpoint: MakeCheckpoint, family: str, dtype: torch.dtype
) -> None:
    folder = make_checkpoint(family)
    plain, fused = (load(folder, dtype) for _ in range(2))
    layers = len(fused.model.layers)
    assert (mlp.fuse(fused), rotation.fuse(fused)) == (layers, layers)
    assert (mlp.fuse(fused), rotation.fuse(fused)) == (0, 0)

    def run(model: Any) -> list[Tensor]:
        hidden = model.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = model(inputs_embeds=hidden).logits
        return [logits, torch.autograd.grad(logits.float().pow(2).mean(), hidden)[0]]

    for ours, theirs in zip(run(fused), run(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_an_mlp_of_another_activation_stays_as_it_is(make_checkpoint: MakeCheckpoint) -> None:
    assert mlp.fuse(load(make_checkpoint("llama3", hidden_act="gelu"), torch.float32)) == 0


def gradients(folder: Path, device: str, kept: Kept, objectives: tuple[str, ...], dtype: torch.dtype) -> list[Tensor]:
    values = {"model": str(folder), "target_length": 512, "data": ("x",), "out": Path("x"), "rank": 4}
    config = RestoreConfig.model_validate(values)
    model = load(folder, dtype).to(device)  # type: ignore[arg-type]
    faces = TwoFaced(model, config.plan_rope(read_config(folder)), config)
    torch.manual_seed(1)
    for parameter in faces.adapters.parameters():
        parameter.data.copy_(0.02 * torch.randn(parameter.shape))
    faces.kept = kept
    losses = Losses(faces, dict.fromkeys(objectives, 1.0))
    torch.autograd.backward((losses.language_model if "lm" in objectives else losses.distil)(IDS.to(device))[0])
    return [parameter.grad.cpu() for parameter in faces.adapters.parameters() if parameter.grad is not None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objectives", [("attention", "logits"), ("lm",)])
def test_a_gpus_gradients_are_the_cpus_whatever_is_kept(
    make_checkpoint: MakeCheckpoint, family: str, objectives: tuple[str, ...], dtype: torch.dtype
) -> None:
    folder = make_checkpoint(family)
    truth = gradients(folder, "cpu", Kept(2, 2), objectives, torch.float32)
    all_kept = gradients(folder, "cuda", Kept(2, 2), objectives, dtype)
    # The difference of two rows of attention, of which a gradient is made, keeps few digits in bf16.
    allowed = 1e-2 if dtype == torch.float32 else 0.5
    for kept in (Kept(), Kept(0, 0, 2, 2), Kept(1, 1, 1, 1)):
        found = gradients(folder, "cuda", kept, objectives, dtype)
        assert len(found) == len(truth) == 16
        for ours, whole, true in zip(found, all_kept, truth, strict=True):
            assert (ours - true).norm() <= allowed * true.norm()
            assert (ours - whole).norm() <= 2e-2 * true.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("channels", [64, 128])
def test_a_gpus_attention_that_is_kept_gives_the_same_bits(channels: int) -> None:
    """The kernels that long windows run, and their log-sum-exp, which without a gradient they leave out."""
    from restore.recompute import KeptRows

    q, k, v = (torch.randn(1, 1024, 4, channels, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    pull = torch.randn_like(q)

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    plain = attend()
    rows = KeptRows()
    with torch.no_grad(), rows.around():
        first = attend()
    assert rows.tensors, "attention of a GPU came down to an operation that is not known"
    with rows.replays(rows.tensors).around():
        again = attend()
    assert torch.equal(first, plain)
    assert again.data_ptr() == first.data_ptr(), "nothing ran again"
    for ours, theirs in zip(torch.autograd.grad(again, leaves, pull), torch.autograd.grad(plain, leaves, pull), strict=True):
        # Attention's backward adds up in any order.
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()
