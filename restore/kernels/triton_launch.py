"""Launch a Triton kernel again without asking Triton again which compiled variant its arguments call for.

Triton looks at each argument's type, alignment and divisibility at every launch, three times the cost of the launch itself.
Here that answer is kept by all it depends on, and the compiled kernel launched directly, as Triton's tutorials do.
"""

from typing import Any

import torch
from torch import Tensor

from restore.kernels.triton_tiles import Tile

Argument = Tensor | int | float | None

_COMPILED: dict[tuple[object, ...], Any] = {}
# Values are part of a key, so that a run over windows of ever new lengths would fill it: begin anew then.
_KEPT = 4096


def launch(kernel: Any, programs: int, arguments: tuple[Argument, ...], constants: dict[str, Any], tile: Tile) -> None:
    """Run `programs` programs of a `triton.jit` kernel whose parameters are `arguments` and then `constants`, in this order."""
    key = (kernel, tile, _device(arguments[0]), *map(_kind, arguments), *constants.values())
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*arguments, *constants.values())
        return
    if len(_COMPILED) >= _KEPT:
        forget()
    # None from the interpreter, which is asked again.
    _COMPILED[key] = kernel[programs,](
        *arguments, **constants, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers
    )


def forget() -> None:
    """Ask Triton anew for every kernel."""
    _COMPILED.clear()


def last_compiled() -> Any:
    """The compiled kernel that joined last: its registers, spills and shared memory, for whoever tunes."""
    return next(reversed(_COMPILED.values()))


def _kind(argument: Argument) -> object:
    # Of a pointer Triton asks the type and whether it is a multiple of 16, of a number no more than its value tells.
    return (argument.dtype, argument.data_ptr() % 16) if isinstance(argument, Tensor) else argument


def _device(argument: Argument) -> torch.device | None:
    return argument.device if isinstance(argument, Tensor) else None
