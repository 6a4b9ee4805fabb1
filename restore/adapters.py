"""What learns: low-rank adapters through peft, or full-rank deltas, on the attention projections of every layer.

Both add to a frozen base projection and can be switched off exactly: the base output is then returned untouched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from restore.config import RestoreConfig


class DeltaLinear(nn.Module):
    """A frozen linear layer plus a trainable full-rank delta of the same shape.

    The delta is kept and multiplied apart from the weight: added in bf16, small updates would round away.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.zeros_like(base.weight, dtype=torch.float32))
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + nn.functional.linear(x, self.delta.to(x.dtype)) if self.enabled else y


Adapter: TypeAlias = DeltaLinear | LoraLinear


class Adapters:
    """Every adapter of a model, by the name of the weight it changes."""

    def __init__(self, model: PreTrainedModel, config: RestoreConfig) -> None:
        """Freeze the model and attach fresh adapters, which change nothing yet (their output is exactly zero)."""
        model.requires_grad_(False)
        if config.trainable == "lora":
            _inject_lora(model, config)
        else:
            _inject_deltas(model, config)
        self._by_weight: dict[str, Adapter] = {
            f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, DeltaLinear | LoraLinear)
        }
        self._by_layer = [
            [module for module in layer.modules() if isinstance(module, DeltaLinear | LoraLinear)]
            for layer in model.model.layers
        ]

    @contextmanager
    def disabled(self, layer: int | None = None) -> Iterator[None]:
        """Switch the adapters of one layer, or of all, off."""
        chosen = self._by_layer[layer] if layer is not None else list(self._by_weight.values())
        for module in chosen:
            _enable(module, False)
        try:
            yield
        finally:
            for module in chosen:
                _enable(module, True)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.state().values())

    def state(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by a name that does not depend on peft's wrapping."""
        return {
            f"{weight.removesuffix('.weight')}.{name}": parameter
            for weight, module in self._by_weight.items()
            for name, parameter in _trainable(module).items()
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy values into the trainable parameters; names and shapes must match."""
        own = self.state()
        assert own.keys() == state.keys(), "the adapters in a checkpoint belong to the same configuration"
        for name, parameter in own.items():
            parameter.copy_(state[name])

    @torch.no_grad()
    def delta(self, weight_name: str) -> Tensor | None:
        """What the adapter adds to the weight `weight_name`: [out, in] fp32, or None where nothing learns."""
        module = self._by_weight.get(weight_name)
        if module is None:
            return None
        if isinstance(module, DeltaLinear):
            return module.delta.float()
        (name,) = module.active_adapters
        delta: Tensor = module.get_delta_weight(name)
        return delta.float()


def _inject_lora(model: PreTrainedModel, config: RestoreConfig) -> None:
    alpha = config.alpha if config.alpha is not None else 2 * config.rank
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=list(config.targets)), model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name, "only adapters learn"
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, LoraLinear):
            # Autocast makes the products' inputs bf16 in any case; peft would keep an fp32 copy of each beside them.
            module.cast_input_dtype_enabled = False


def _inject_deltas(model: PreTrainedModel, config: RestoreConfig) -> None:
    for layer in model.model.layers:
        for target in config.targets:
            setattr(layer.self_attn, target, DeltaLinear(getattr(layer.self_attn, target)))


def _enable(module: Adapter, enabled: bool) -> None:
    if isinstance(module, DeltaLinear):
        module.enabled = enabled
    else:
        module.enable_adapters(enabled)


def _trainable(module: Adapter) -> dict[str, nn.Parameter]:
    if isinstance(module, DeltaLinear):
        return {"delta": module.delta}
    (name,) = module.active_adapters
    return {side: module.get_parameter(f"{side}.{name}.weight") for side in ("lora_A", "lora_B")}
