"""The frozen base in 4 or 8 bit: a 7B model in 24 GB, trained by adapters that stay in fp32 (QLoRA, arXiv 2305.14314).

bitsandbytes packs and unpacks: NF4 with its scales in 8 bit too, or blockwise 8 bit. Nothing else is approximated. A layer
multiplies by the unpacked weight in the dtype of what it reads, forward and backward, as teacher and as student.

Shapes: N rows (tokens), I channels in, O channels out.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ard_serve.errors import UsageError

Bits = Literal["4bit", "8bit"]

_BLOCK = {"4bit": 64, "8bit": 256}
_NESTED_BLOCK = 256


def quantize(model: PreTrainedModel, bits: Bits, device: torch.device) -> PreTrainedModel:
    """Pack every projection of the decoder layers, one at a time on `device`, and move the rest there as it is.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    for layer in model.model.layers:
        for name, module in [*layer.named_modules()]:
            if isinstance(module, nn.Linear):
                layer.set_submodule(name, QuantizedLinear(module, bits, device))
    model.to(device)  # type: ignore[arg-type]
    return model


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose `weight` is packed: uint8 of the shape that bitsandbytes gives it."""

    def __init__(self, base: nn.Linear, bits: Bits, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = base.in_features, base.out_features, bits
        self.bias = base.bias
        library = _library()
        # Flat: on the CPU, bitsandbytes 0.50 unpacks 4 bit wrongly where a row is no multiple of a block.
        flat = base.weight.detach().to(device).reshape(1, -1)
        block = _BLOCK[bits]
        if bits == "4bit":
            packed, state = library.quantize_4bit(flat, blocksize=block, compress_statistics=True, quant_type="nf4")
            self._keep(weight=packed, scales=state.absmax, offset=state.offset, code=state.code)
            self._keep(nested_scales=state.state2.absmax, nested_code=state.state2.code)
        else:
            packed, state = library.quantize_blockwise(flat, blocksize=block)
            self._keep(weight=packed, scales=state.absmax, code=state.code)

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return product

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight that all products are made with: [out, in] in `dtype`."""
        library, block = _library(), _BLOCK[self.bits]
        shape = torch.Size((1, self.out_features * self.in_features))
        if self.bits == "4bit":
            nested = library.QuantState(
                absmax=self.nested_scales, code=self.nested_code, blocksize=_NESTED_BLOCK, dtype=torch.float32
            )
            state = library.QuantState(
                absmax=self.scales, shape=shape, code=self.code, blocksize=block, quant_type="nf4", dtype=dtype,
                offset=self.offset, state2=nested,
            )  # fmt: skip
            flat: Tensor = library.dequantize_4bit(self.weight, state)
        else:
            state = library.QuantState(absmax=self.scales, code=self.code, blocksize=block, dtype=dtype)
            flat = library.dequantize_blockwise(self.weight, state)
        return flat.view(self.out_features, self.in_features)


class _Product(torch.autograd.Function):
    """The weight is unpacked again for backward: kept, it would be as large as what was saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.unpack(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.unpack(grad.dtype), None


def is_quantized(model: nn.Module) -> bool:
    """Whether `quantize` has packed it."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def is_available() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


def _library() -> ModuleType:
    try:
        library = import_module("bitsandbytes.functional")
    except ImportError:
        raise UsageError("quantize: bitsandbytes is not installed; pip install 'bitsandbytes>=0.50'") from None
    if "dynamic" not in library.name2qmap:
        # Kept by the library where it is first used, and a forecast uses it on tensors without contents.
        library.name2qmap["dynamic"] = library.create_dynamic_map()
    return library
