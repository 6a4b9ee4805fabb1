"""What learns: low-rank adapters through peft, or full-rank deltas, on the attention projections of every layer.

Both add to a frozen base projection and are switched off exactly: the base's output is then returned untouched.
They keep their parameters in fp32 and multiply in the dtype of what they read. A step runs them hundreds of times, so peft's
layer gets a forward without its many cases and with two passes over the output fewer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from restore.config import RestoreConfig

_NAME = "default"


@dataclass
class Switch:
    """Whether the adapters that share it add anything: the student's face or the teacher's."""

    on: bool = True


class Adapter(nn.Module):
    """A frozen linear layer, `base_layer`, plus what is learnt."""

    base_layer: nn.Module
    switch: Switch

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x if not self.switch.on else x.reshape(-1, x.shape[-1]))
        return self.add(output, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1) if self.switch.on else output

    def add(self, output_NO: Tensor, rows_NI: Tensor) -> Tensor:
        """`output_NO` plus what is learnt about `rows_NI`, in place."""
        raise NotImplementedError

    def change(self) -> Tensor:
        """What is added to the base's weight: [out, in] fp32."""
        raise NotImplementedError

    def learnt(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by their names."""
        raise NotImplementedError


class LoraLinear(Adapter, lora.Linear):
    """peft's LoRA layer (Hu et al., arXiv 2106.09685): adds scaling * B A, with A [rank, in], and B [out, rank] at zero."""

    def add(self, output_NO: Tensor, rows_NI: Tensor) -> Tensor:
        down, up = self._factors()
        low_NR = linear(rows_NI, down.to(rows_NI.dtype))
        return output_NO.addmm_(low_NR, up.to(rows_NI.dtype).T, alpha=self.scaling[_NAME])

    def change(self) -> Tensor:
        delta: Tensor = self.get_delta_weight(_NAME)
        return delta

    def learnt(self) -> dict[str, nn.Parameter]:
        down, up = self._factors()
        return {"lora_A": down, "lora_B": up}

    def _factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        down, up = self.lora_A[_NAME].weight, self.lora_B[_NAME].weight
        assert isinstance(down, nn.Parameter), "peft keeps its factors in linear layers"
        assert isinstance(up, nn.Parameter), "peft keeps its factors in linear layers"
        return down, up


class DeltaLinear(Adapter):
    """Adds a full-rank delta, kept and multiplied apart from the weight: added to it in bf16, small updates round away."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        # By shape: a weight may be a shard of one, and every process holds the whole of what learns.
        self.delta = nn.Parameter(torch.zeros(base.weight.shape, dtype=torch.float32, device=base.weight.device))

    def add(self, output_NO: Tensor, rows_NI: Tensor) -> Tensor:
        return output_NO.addmm_(rows_NI, self.delta.to(rows_NI.dtype).T)

    def change(self) -> Tensor:
        return self.delta

    def learnt(self) -> dict[str, nn.Parameter]:
        return {"delta": self.delta}


class Adapters:
    """Every adapter of a model, by the name of the weight it changes."""

    def __init__(self, model: PreTrainedModel, config: RestoreConfig) -> None:
        """Freeze the model and attach fresh adapters, which change nothing yet (their output is exactly zero)."""
        model.requires_grad_(False)
        if config.trainable == "lora":
            _inject_lora(model, config)
        else:
            _inject_deltas(model, config)
        self._switch = Switch()
        self._by_weight: dict[str, Adapter] = {}
        for name, module in model.named_modules():
            if isinstance(module, Adapter):
                module.switch = self._switch
                self._by_weight[f"{name}.weight"] = module
        self._by_layer = [
            [parameter for module in layer.modules() if isinstance(module, Adapter) for parameter in module.learnt().values()]
            for layer in model.model.layers
        ]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch every adapter off."""
        self._switch.on = False
        try:
            yield
        finally:
            self._switch.on = True

    def parameters(self) -> list[nn.Parameter]:
        return list(self.state().values())

    def of_layer(self, number: int) -> list[nn.Parameter]:
        """The trainable parameters of one decoder layer."""
        return self._by_layer[number]

    def state(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by a name that does not depend on how they are attached."""
        return {
            f"{weight.removesuffix('.weight')}.{name}": parameter
            for weight, adapter in self._by_weight.items()
            for name, parameter in adapter.learnt().items()
        }

    def leave(self) -> None:
        """Let go of the model they were attached to, and of their gradients, and move to the CPU; what they learnt stays."""
        for adapter in self._by_weight.values():
            adapter.base_layer = nn.Identity()
            for parameter in adapter.learnt().values():
                parameter.grad = None
            adapter.to("cpu")

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
        adapter = self._by_weight.get(weight_name)
        return None if adapter is None else adapter.change()


def _inject_lora(model: PreTrainedModel, config: RestoreConfig) -> None:
    alpha = config.alpha if config.alpha is not None else 2 * config.rank
    wanted = LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=list(config.targets))
    wanted._register_custom_module({nn.Linear: LoraLinear})
    # peft draws on the CPU, so that a seed gives the same adapters on every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(wanted, model, _NAME)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            for parameter in module.learnt().values():
                parameter.data = parameter.data.float()


def _inject_deltas(model: PreTrainedModel, config: RestoreConfig) -> None:
    for layer in model.model.layers:
        for target in config.targets:
            setattr(layer.self_attn, target, DeltaLinear(getattr(layer.self_attn, target)))
