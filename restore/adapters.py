"""What learns: low-rank adapters, or full-rank deltas, on the attention projections of every layer.

Both add to a frozen base projection and are switched off exactly: the base's output is then returned untouched.
They keep their parameters in fp32 and multiply in the dtype of what they read. Written here because the step runs them
hundreds of times: peft's layer asks a dozen questions and makes two more passes over its output each time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from restore.config import RestoreConfig


@dataclass
class Switch:
    """Whether the adapters that share it add anything: the student's face or the teacher's."""

    on: bool = True


class Adapter(nn.Module):
    """A frozen linear layer plus what is learnt."""

    def __init__(self, base: nn.Linear, switch: Switch) -> None:
        super().__init__()
        self.base = base
        self._switch = switch

    def forward(self, x: Tensor) -> Tensor:
        if not self._switch.on:
            unchanged: Tensor = self.base(x)
            return unchanged
        rows_NI = x.reshape(-1, x.shape[-1])
        return self.add(self.base(rows_NI), rows_NI).view(*x.shape[:-1], -1)

    def add(self, output_NO: Tensor, rows_NI: Tensor) -> Tensor:
        """`output_NO` plus what is learnt about `rows_NI`, in place."""
        raise NotImplementedError

    def change(self) -> Tensor:
        """What is added to the base's weight: [out, in] fp32."""
        raise NotImplementedError


class LoraLinear(Adapter):
    """Adds scale * B A (Hu et al., arXiv 2106.09685): A [rank, in] starts uniform as in peft, B [out, rank] at zero."""

    def __init__(self, base: nn.Linear, switch: Switch, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__(base, switch)
        self.scale = scale
        bound = 1 / math.sqrt(base.in_features)
        device = base.weight.device
        # Drawn on the CPU, so that a seed gives the same adapters on every device.
        start = torch.empty(rank, base.in_features, device="cpu").uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(start.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def add(self, output_NO: Tensor, rows_NI: Tensor) -> Tensor:
        low_NR = linear(rows_NI, self.lora_A.to(rows_NI.dtype))
        return output_NO.addmm_(low_NR, self.lora_B.to(rows_NI.dtype).T, alpha=self.scale)

    def change(self) -> Tensor:
        return self.scale * (self.lora_B @ self.lora_A)


class DeltaLinear(Adapter):
    """Adds a full-rank delta, kept and multiplied apart from the weight: added to it in bf16, small updates round away."""

    def __init__(self, base: nn.Linear, switch: Switch) -> None:
        super().__init__(base, switch)
        self.delta = nn.Parameter(torch.zeros_like(base.weight, dtype=torch.float32))

    def add(self, output_NO: Tensor, rows_NI: Tensor) -> Tensor:
        return output_NO.addmm_(rows_NI, self.delta.to(rows_NI.dtype).T)

    def change(self) -> Tensor:
        return self.delta


class Adapters:
    """Every adapter of a model, by the name of the weight it changes."""

    def __init__(self, model: PreTrainedModel, config: RestoreConfig) -> None:
        """Freeze the model and attach fresh adapters, which change nothing yet (their output is exactly zero)."""
        model.requires_grad_(False)
        self._switch = Switch()
        self._by_weight: dict[str, Adapter] = {}
        self._by_layer: list[list[nn.Parameter]] = []
        generator = torch.Generator().manual_seed(config.seed)
        for number, layer in enumerate(model.model.layers):
            made = {target: self._attach(layer.self_attn, target, config, generator) for target in config.targets}
            self._by_weight |= {f"model.layers.{number}.self_attn.{target}.weight": made[target] for target in made}
            self._by_layer.append([own for module in made.values() for own in module.parameters(recurse=False)])

    def _attach(self, attention: nn.Module, target: str, config: RestoreConfig, generator: torch.Generator) -> Adapter:
        base = getattr(attention, target)
        if config.trainable == "lora":
            alpha = config.alpha if config.alpha is not None else 2 * config.rank
            adapter: Adapter = LoraLinear(base, self._switch, config.rank, alpha / config.rank, generator)
        else:
            adapter = DeltaLinear(base, self._switch)
        setattr(attention, target, adapter)
        return adapter

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
            for name, parameter in adapter.named_parameters(recurse=False)
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
        adapter = self._by_weight.get(weight_name)
        return None if adapter is None else adapter.change()
