"""The FLOP formula: what PyTorch itself counts in a real step, and what the data sheets of GPUs say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from restore import devices
from restore.batches import Batch
from restore.config import RestoreConfig
from restore.flops import Counter, Flops
from restore.inspection import read_config
from restore.loading import load
from restore.model import TwoFaced
from restore.objectives import Losses
from restore.plan import plan_steps

MakeCheckpoint = Callable[..., Path]
TOKENS = 48
LLAMA2_7B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
             "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip


class CountedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """FLOPs of the matrix products that run inside, by PyTorch's own formulas; attention and the relation kernels apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operation(*args, **(kwargs or {}))
        packet = operation._overloadpacket
        packet = torch.ops.aten.addmm if packet == torch.ops.aten.addmm_ else packet
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.flops += flop_registry[packet](
                *args, **{k: v for k, v in (kwargs or {}).items() if k == "out"}, out_val=output
            )
        return output


def settings(**values: Any) -> RestoreConfig:
    defaults = {"model": "m", "target_length": 512, "data": ("d",), "out": "o", "rank": 4, "dtype": "fp32"}
    return RestoreConfig.model_validate(defaults | values)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("objectives", [("attention", "logits"), ("logits",), ("short_lm",), ("logits", "short_lm"), ("lm",)])
def test_products_of_a_real_step_are_those_of_the_formula(
    make_checkpoint: MakeCheckpoint, family: str, objectives: tuple[str, ...], trainable: str
) -> None:
    folder = make_checkpoint(family)
    base, config = read_config(folder), settings(objectives=dict.fromkeys(objectives, 1.0), trainable=trainable)
    losses = Losses(TwoFaced(load(folder, torch.float32), config.plan_rope(base), config), config.weights)
    reads = objectives == ("lm",)
    with CountedProducts() as counted:
        torch.autograd.backward((losses.language_model if reads else losses.distil)(torch.arange(TOKENS)[None])[0])

    counter = Counter(base, config)
    formula = counter.read(TOKENS) if reads else counter.distilled(TOKENS)
    # Attention forward once a face and again in backward, and backward as two.
    attention = counter._layers(counter.attention(TOKENS)) * (4 if reads else 5)
    # The first layer's input needs no gradient: not through the frozen weights, and not through what learns.
    learnt = 3 * config.rank * base["hidden_size"] if trainable == "lora" else counter._front()
    spared = 2 * TOKENS * (counter._front() + learnt)
    if objectives in (("short_lm",), ("lm",)):  # the last token has no next
        spared += 4 * base["hidden_size"] * base["vocab_size"]
    assert counted.flops == formula.executed - formula.relations - attention - spared


def test_a_7b_models_window_by_hand() -> None:
    """LLaMA2-7B, one window of 4,096 tokens, the default recipe: every product written out."""
    tokens, channels, inner, layers, vocabulary, rank = 4096, 4096, 11008, 32, 32000, 128
    counter = Counter(LLAMA2_7B, settings(rank=rank, target_length=32768))
    weights = layers * (4 * channels**2 + 3 * channels * inner)
    adapters = layers * 4 * rank * 2 * channels
    attention = layers * 2 * tokens**2 * channels
    forward = 2 * tokens * weights + attention
    backward = 2 * tokens * weights + 2 * attention
    learning = 2 * tokens * adapters * 3
    head = 2 * tokens * channels * vocabulary
    expected = 2 * forward + backward + learning + 3 * head  # logits of both faces; short_lm shares the student's
    found = counter.distilled(tokens)
    assert found.model == expected
    assert found.relations == layers * 8 * tokens**2 * channels
    assert found.again == forward + 2 * tokens * adapters + layers * 2 * tokens * (3 * channels**2 - channels * inner)
    read = counter.read(4 * tokens)
    assert read.relations == 0
    assert read.model == 4 * (2 * 2 * tokens * weights + learning + 2 * head) + 16 * 3 * attention


def test_a_run_is_its_windows_and_validation_runs_forward_alone() -> None:
    config = settings(target_length=32768, cut_share=0, steps=10, batch_tokens=65_536)
    plan, counter = plan_steps(config, config.plan_rope(LLAMA2_7B)), Counter(LLAMA2_7B, config)
    step = counter.distilled(4096) * plan.short_windows + counter.read(32768) * plan.long_windows
    assert counter.run(plan) == step * 10
    rare = replace(plan, long_every=4)
    assert counter.reading(rare) == counter.read(32768) * 3
    cut = Counter(LLAMA2_7B, settings(target_length=32768, cut_share=0.25, steps=10, batch_tokens=65_536))
    texts = [counter.distilled(length) * (4096 // length) for length in (64, 128, 256, 512, 1024)]
    windows = plan.short_windows * 10
    mean = sum(flops.counted for flops in texts) / 5
    assert cut.distilling(plan).counted == pytest.approx(windows * (0.75 * counter.distilled(4096).counted + 0.25 * mean))
    assert counter.batch(Batch(torch.zeros(8, 512), 1.0)) == counter.distilled(512) * 8
    assert counter.batch(Batch(torch.zeros(1, 512), 1.0, is_long=True)) == counter.read(512)
    assert Flops(1, 2, 3) * 2 + Flops(1, 1, 1) == Flops(3, 5, 7)
    training, forward = counter.distilled(4096), counter.distilled(4096, trains=False)
    assert (forward.again, forward.relations) == (0, training.relations // 4)
    reading, read = counter.read(4096), counter.read(4096, trains=False)
    last = 32 * 2 * 4096 * 4096 * 11008
    assert reading.again == read.model - counter._head(4096) - last, "all but the head and each layer's last product"
    assert training.model - forward.model == reading.model - read.model, "the student's backward"


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("Tesla T4", None),
    ],
)
def test_gpus_are_known_by_what_the_driver_calls_them(reported: str, name: str | None) -> None:
    found = devices.by_name(reported)
    assert (found.name if found else None) == name
