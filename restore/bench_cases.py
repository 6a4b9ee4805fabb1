"""What `python -m restore.bench` can train: model shapes with random weights, and the trainer over random tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from restore.config import RestoreConfig
from restore.data import TokenStream
from restore.fit import kept_layers
from restore.forecast import forecast
from restore.inspection import transformers_config
from restore.model import TwoFaced
from restore.parallel import World
from restore.plan import plan_steps
from restore.quantize import quantize
from restore.rope import RopePlan
from restore.trainer import Trainer

if TYPE_CHECKING:
    from restore.sharding import Shards

# Of SmolLM2-135M and -1.7B, LLaMA2-7B and Llama 3 8B; `tiny` is for trying the bench itself.
SHAPES: dict[str, dict[str, Any]] = {
    name: {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "rope_theta": 10_000.0,
    }
    for name, hidden, inner, layers, heads, groups, vocabulary, tied in (
        ("tiny", 64, 128, 3, 4, 2, 512, True),
        ("135m", 576, 1536, 30, 9, 3, 49_152, True),
        ("1.7b", 2048, 8192, 24, 32, 32, 49_152, True),
        ("7b", 4096, 11_008, 32, 32, 32, 32_000, False),
        ("8b", 4096, 14_336, 32, 32, 8, 128_256, False),
    )
}  # fmt: skip
_FACTOR = 8
# Of a Llama's weights before it is trained.
_STD = 0.02


@dataclass(frozen=True)
class Case:
    """One row of the bench: a shape, a window, and the settings of a restoration that differ from their defaults."""

    shape: str
    window: int
    settings: dict[str, Any]

    @property
    def base(self) -> dict[str, Any]:
        """The config.json of the shape, native to the window."""
        return SHAPES[self.shape] | {"max_position_embeddings": self.window}

    @property
    def config(self) -> RestoreConfig:
        """The restoration of a model eight-fold; a recipe that only reads long windows reads them at the case's own length."""
        fields: dict[str, Any] = {
            "model": self.shape,
            "target_length": _FACTOR * self.window,
            "data": ("random",),
            "out": Path(),
        }
        config = RestoreConfig.model_validate(fields | self.settings)
        return config if config.distils else config.model_copy(update={"long_window": self.window})

    @property
    def rope(self) -> RopePlan:
        return self.config.plan_rope(self.base)

    def describe(self, processes: int) -> dict[str, Any]:
        """What was run, for the results file."""
        config, plan, base = self.config, plan_steps(self.config, self.rope), self.base
        return {
            "shape": self.shape, "hidden_size": base["hidden_size"], "layers": base["num_hidden_layers"],
            "recipe": config.recipe, "window": plan.window if plan.short_windows else 0,
            "long_window": plan.long_window if plan.long_windows else 0, "step_tokens": plan.round_tokens,
            "trainable": config.trainable, "rank": config.rank, "targets": [target[0] for target in config.targets],
            "dtype": config.dtype, "quantize": config.quantize, "processes": processes, "shard": config.shard == "on",
            "recompute": config.recompute,
        }  # fmt: skip


def build_model(base: dict[str, Any], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of that config.json with random weights."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(transformers_config(base), dtype=dtype)  # type: ignore[no-untyped-call]
    assert isinstance(model, PreTrainedModel)
    return model


def build_sharded(
    base: dict[str, Any], dtype: torch.dtype, device: torch.device, world: World
) -> tuple[PreTrainedModel, "Shards"]:
    """The same, of which each process holds a share of every layer, of numbers of its own."""
    from restore.sharding import Shards, empty_sharded  # imports much of torch.distributed

    model = empty_sharded(base, dtype, device, world)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.fill_(1.0) if parameter.dim() == 1 else local.normal_(std=_STD)
    model.train(False)
    return model, Shards(model.model.layers)


def random_tokens(base: dict[str, Any], count: int) -> TokenStream:
    """A stream of `count` random token ids."""
    ids = np.random.default_rng(0).integers(0, base["vocab_size"], count, dtype=np.int32)
    return TokenStream(ids, documents=2)


def build_trainer(case: Case, device: torch.device, folder: Path, world: World) -> tuple[TwoFaced, Trainer]:
    """A model of random weights and a trainer of it; `folder` takes what it writes when a step fails."""
    config, rope, base = case.config, case.rope, case.base
    plan = plan_steps(config, rope)
    kept = kept_layers(base, rope, config, forecast(base, rope, config), device)
    native, dtype = rope.native_config(base), torch.bfloat16 if config.dtype == "bf16" else torch.float32
    shards = None
    if config.shard == "on":
        model, shards = build_sharded(native, dtype, device, world)
    else:
        model = build_model(native, dtype, device)
    if config.quantize:
        model = quantize(model, config.quantize, device)
    stream = random_tokens(base, 3 * max(plan.window, plan.long_window))
    faces = TwoFaced(model, rope, config, shards)
    faces.kept = kept
    return faces, Trainer(faces, config, rope, stream, stream, folder, world)
