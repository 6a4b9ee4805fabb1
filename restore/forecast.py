"""How much memory a run takes, told before it starts: a training step on tensors that have shapes but no contents.

The step is the trainer's own, run under PyTorch's FakeTensorMode on models of three and four layers; memory grows by the same
amount with every further layer, and beyond some length with every further token. Nothing is computed and nothing of the
model's size is allocated, so a forecast takes seconds for any model, and it follows every change of the training step.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from restore.config import RestoreConfig
from restore.flops import Counter
from restore.inspection import transformers_config
from restore.model import Kept, TwoFaced
from restore.objectives import Losses
from restore.plan import plan_steps
from restore.quantize import QuantizedLinear, quantize
from restore.rope import RopePlan

_FEW, _MORE = 3, 4
# More tokens are extrapolated from so many and half of them. By then a layer's work outweighs a chunk of logits, even of a
# small model with a large vocabulary; from fewer tokens the line would be too flat.
_LONGEST_MEASURED = 131_072
# Adapter, gradient, two moments of AdamW and the best weights so far, in fp32.
BYTES_PER_TRAINED = 20
# Of a sharded model, a process holds at most so many layers whole: the one that runs, the next, and the next as it arrives.
_WHOLE_LAYERS = 3
_NONE = Kept()


@dataclass(frozen=True)
class Forecast:
    """Bytes of device memory that a run needs at its peak, and what they are for."""

    weights_bytes: int
    trained_bytes: int
    """Adapters, their gradients, the optimizer's state and the best adapters so far."""
    passes_bytes: tuple[int, int]
    """What a distillation and a long window add: checkpoints, one layer's work, a chunk of logits."""
    layer_bytes: int
    """The frozen weights of one decoder layer."""
    layers: int

    @property
    def step_bytes(self) -> int:
        return max(self.passes_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.weights_bytes + self.trained_bytes + self.step_bytes

    def sharded(self, processes: int) -> "Forecast":
        """The same for one of several processes that hold a share of every layer each."""
        held = min(self.layers, _WHOLE_LAYERS) * self.layer_bytes + -(-self.layers * self.layer_bytes // processes)
        return replace(self, weights_bytes=self.weights_bytes - self.layers * self.layer_bytes + held)

    def __str__(self) -> str:
        parts = (self.peak_bytes, self.weights_bytes, self.trained_bytes, self.step_bytes)
        peak, weights, trained, step = (f"{size / 1e9:.1f} GB" for size in parts)
        return f"{peak} (weights {weights}, adapters and optimizer {trained}, a step {step})"


def forecast(base: Mapping[str, Any], rope: RopePlan, config: RestoreConfig, kept: Kept = _NONE) -> Forecast:
    """Forecast a run on one device from the model's config.json alone.

    Args:
        base: the contents of config.json.
        rope: how far it is stretched.
        config: the run.
        kept: layers that keep their work until backward.

    Raises:
        UsageError: it is to be quantised, and bitsandbytes is not installed.
    """
    layers = int(base["num_hidden_layers"])
    few, more = (_measure(base, rope, config, count) for count in (_FEW, _MORE))
    weights, trained, distilling, reading = (low + (layers - _FEW) * (high - low) for low, high in zip(few, more, strict=True))
    if kept != _NONE:
        whole, attention = kept_bytes(base, rope, config)
        # One layer that runs again is in the sum already; where none does, the last that keeps its work takes its place.
        distilling += min(kept.distilling, layers - 1) * whole[0] + kept.distilling_attention * attention[0]
        reading += min(kept.reading, layers - 1) * whole[1] + kept.reading_attention * attention[1]
    return Forecast(weights, trained, (distilling, reading), more[0] - few[0], layers)


def kept_bytes(base: Mapping[str, Any], rope: RopePlan, config: RestoreConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """What one layer adds to a distillation and to a long window: where it keeps its work, where it keeps attention alone."""

    def each(one: Kept, two: Kept) -> tuple[int, int]:
        less, more = (_measure(base, rope, config, _MORE, kept) for kept in (one, two))
        return more[2] - less[2], more[3] - less[3]

    return each(Kept(1, 1), Kept(2, 2)), each(Kept(0, 0, 1, 1), Kept(0, 0, 2, 2))


def most_kept(base: Mapping[str, Any], rope: RopePlan, config: RestoreConfig, needed: Forecast, usable_bytes: int) -> Kept:
    """What spares backward the most work within `usable_bytes`, where `needed` keeps nothing.

    A layer of LLaMA2-7B, a window of 32,768 tokens: attention forward is 8.8 of 22.6 TFLOP and comes back from 0.25 GiB; all of
    it takes 2.9 GiB. So all layers keep attention first, 35 TFLOP a GiB, and then as many as fit their work, 5 a GiB more. Of
    4,096 tokens attention is 0.14 of 1.9 TFLOP for 0.03 of 0.6 GiB, and the two are worth about the same.
    """
    plan, counter = plan_steps(config, rope), Counter(base, config)
    rest = usable_bytes - needed.weights_bytes - needed.trained_bytes
    whole, attention = kept_bytes(base, rope, config)
    windows = ((plan.window, counter.distilled(plan.window)), (plan.long_window, counter.read(plan.long_window)))
    best = [
        _most_spared(needed.layers, rest - taken, more, (flops.again // needed.layers, counter.attention(tokens)))
        for taken, more, (tokens, flops) in zip(needed.passes_bytes, zip(whole, attention, strict=True), windows, strict=True)
    ]
    (distilling, distilling_attention), (reading, reading_attention) = best
    return Kept(distilling, reading, distilling_attention, reading_attention)


def _most_spared(layers: int, rest_bytes: int, bytes_each: tuple[int, int], flops_each: tuple[int, int]) -> tuple[int, int]:
    """How many of `layers` keep their work, and how many others attention; bytes and FLOPs of a layer that does either."""
    whole, attention = (max(1, size) for size in bytes_each)
    choices = [
        (count, min(layers - count, (rest_bytes - count * whole) // attention))
        for count in range(layers + 1)
        if count * whole <= rest_bytes
    ]
    return max(choices, key=lambda choice: choice[0] * flops_each[0] + choice[1] * flops_each[1], default=(0, 0))


def _measure(
    base: Mapping[str, Any], rope: RopePlan, config: RestoreConfig, layers: int, kept: Kept = _NONE
) -> tuple[int, int, int, int]:
    """For a model of `layers` layers: bytes of the weights, of what is trained, of a distillation and of an lm window."""
    plan = plan_steps(config, rope)
    shape = rope.native_config(dict(base)) | {"num_hidden_layers": layers}
    if "layer_types" in shape:
        shape["layer_types"] = shape["layer_types"][:1] * layers  # every layer attends fully, or the model was refused
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(transformers_config(shape), dtype=dtype)  # type: ignore[no-untyped-call]
    if config.quantize:
        quantize(model, config.quantize, torch.device("meta"))
    with torch.device("meta"):
        faces = TwoFaced(model, rope, config)
    faces.kept = kept
    with FakeTensorMode():
        _materialise(faces)
        for parameter in faces.adapters.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trained = sum(parameter.numel() for parameter in faces.adapters.parameters())
        weights = sum(weight.untyped_storage().nbytes() for weight in model.parameters() if not weight.requires_grad)
        weights += sum(packed.nbytes for module in model.modules() if isinstance(module, QuantizedLinear)
                       for packed in module.buffers(recurse=False))  # fmt: skip
        losses = Losses(faces, config.weights)

        def read(ids_BT: Tensor) -> Any:
            return losses.language_model(ids_BT, torch.ones(1, dtype=torch.long))

        def peak_bytes(loss: Callable[[Tensor], Any], windows: int, length: int) -> int:
            with _Peak(model) as peak:
                torch.autograd.backward(loss(torch.zeros(windows, length, dtype=torch.long))[0])
            return int(peak.bytes)

        distil = partial(peak_bytes, losses.distil)
        distilling = (
            _extrapolated(distil, plan.windows_at_once(int(base["hidden_size"])), plan.window) if plan.short_windows else 0
        )
        reading = _extrapolated(partial(peak_bytes, read), 1, plan.long_window) if plan.long_windows else 0
    return weights, BYTES_PER_TRAINED * trained, distilling, reading


def _extrapolated(peak_bytes: Callable[[int, int], int], windows: int, length: int) -> int:
    """`peak_bytes` of so many windows of that length, by a straight line from as many tokens as are measured."""
    if length > _LONGEST_MEASURED:
        half, whole = (_extrapolated(peak_bytes, windows, tokens) for tokens in (_LONGEST_MEASURED // 2, _LONGEST_MEASURED))
        return whole + (whole - half) * (length - _LONGEST_MEASURED) // (_LONGEST_MEASURED // 2)
    most = max(2, _LONGEST_MEASURED // length)
    if windows > most:
        half, whole = peak_bytes(most // 2, length), peak_bytes(most, length)
        return whole + (whole - half) * (windows - most) // (most - most // 2)
    return peak_bytes(windows, length)


def _materialise(faces: TwoFaced) -> None:
    """Give every tensor of a model on the meta device a place on the (fake) CPU, where kernels choose as on a device."""
    placed: dict[int, Tensor] = {}  # by identity: tied weights stay tied

    def place(tensor: Tensor) -> Tensor:
        if id(tensor) not in placed:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            placed[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        return placed[id(tensor)]

    for module in {*faces.model.modules(), *(m for rotary in faces.rotary.values() for m in rotary.modules())}:
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: place(tensor) for name, tensor in tensors.items() if tensor is not None})


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that an operation makes, for as long as it lives."""

    def __init__(self, model: nn.Module) -> None:
        """The weights of `model` were there before: a view of one is nothing new."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: int = 0
        self._now = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self._now += size
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size
