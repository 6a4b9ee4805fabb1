"""Fused norms give what transformers' do, forward and backward, and only norms that compute the same are fused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from restore.loading import load
from restore.norms import fuse

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_fused_norm_is_no_further_from_float64_than_the_module(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    eager, fused = (LlamaRMSNorm(96, eps=1e-5).to(device, dtype) for _ in range(2))
    weight = torch.randn(96, device=device).to(dtype)
    for norm in (eager, fused):
        norm.weight = nn.Parameter(weight, requires_grad=False)
    assert fuse(fused) == 1
    x, pull = (torch.randn(3, 50, 96, device=device).to(dtype) for _ in range(2))

    def exact(leaf: torch.Tensor) -> torch.Tensor:
        return weight.double() * leaf * torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + 1e-5)

    def run(norm: Callable[[torch.Tensor], torch.Tensor], kind: torch.dtype) -> list[torch.Tensor]:
        leaf = x.to(kind).requires_grad_()
        out = norm(leaf)
        return [out.detach().double(), torch.autograd.grad(out, leaf, pull.to(kind))[0].double()]

    for ours, theirs, true in zip(run(fused, dtype), run(eager, dtype), run(exact, torch.float64), strict=True):
        assert (ours - true).abs().max() <= 1.5 * (theirs - true).abs().max() + 1e-9


@pytest.mark.parametrize("family", ["llama-tied", "mistral", "qwen2", "qwen3"])
def test_every_norm_of_a_llama_like_model_is_fused_once(make_checkpoint: Callable[..., Path], family: str) -> None:
    model = load(make_checkpoint(family), torch.float32)
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    assert norms >= 5
    assert fuse(model) == norms
    assert fuse(model) == 0


def test_a_norm_that_computes_something_else_stays_as_it_is() -> None:
    assert fuse(GemmaRMSNorm(8)) == 0
