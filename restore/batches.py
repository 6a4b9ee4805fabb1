"""What an optimizer step reads: windows to distil, some of them with jumps, and long windows, some with facts woven in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ard_serve.errors import DataError
from restore.config import RestoreConfig
from restore.data import TokenStream, Windows, evenly_spaced
from restore.plan import Plan
from restore.positions import Jumps, jumps
from restore.retrieval import Weaver


@dataclass(frozen=True)
class Batch:
    """Windows of one forward pass, and the share of the step's windows of their kind that they are.

    `ids_BT` are token ids. `is_long`: the student alone reads them. `jumps`: where the student reads a window that the teacher
    reads without jumps. `answers_N`: places in a long window of the answers that were told before.
    """

    ids_BT: Tensor
    share: float
    is_long: bool = False
    jumps: Jumps | None = None
    answers_N: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; the GPU is not waited for, which goes on with what it was told before."""
        jumped = None if self.jumps is None else Jumps(*(_moved(part, device) for part in self.jumps))
        answers_N = None if self.answers_N is None else _moved(self.answers_N, device)
        return Batch(_moved(self.ids_BT, device), self.share, self.is_long, jumped, answers_N)


class Batches:
    """Every batch of a run, by the number of its step: a pure function of the settings and the data."""

    def __init__(
        self, plan: Plan, config: RestoreConfig, stream: TokenStream, target_length: int, weaver: Weaver | None
    ) -> None:  # fmt: skip
        """Raises DataError when the stream is shorter than a window."""
        self._plan, self._config, self._target_length, self._weaver = plan, config, target_length, weaver
        self._short = Windows(stream, plan.window, config.seed) if plan.short_windows else None
        self._long = Windows(stream, plan.long_window, config.seed) if plan.long_windows else None

    def lengths(self) -> list[int]:
        """Tokens of every window of a step: long ones, then those to distil."""
        return [self._plan.long_window] * self._plan.long_windows + [self._plan.window] * self._plan.short_windows

    def of_step(self, step: int, windows: Sequence[int]) -> Iterator[Batch]:
        """The batches of step number `step` that hold the `windows`, which count as `lengths` lists them."""
        plan = self._plan
        short = [step * plan.short_windows + window - plan.long_windows for window in windows if window >= plan.long_windows]
        for jumped, group in groupby(sorted(short, key=self._is_jumped), key=self._is_jumped):
            numbers = list(group)
            at_once = 1 if jumped else plan.windows_at_once
            yield from (self._distilled(numbers[at : at + at_once], jumped) for at in range(0, len(numbers), at_once))
        for window in windows:
            if window < plan.long_windows:
                yield self._read(step * plan.long_windows + window)

    def _is_jumped(self, number: int) -> bool:
        """Spread evenly: one window in four for a share of a quarter."""
        share = self._config.jump_share
        return int((number + 1) * share) > int(number * share)

    def _distilled(self, numbers: Sequence[int], jumped: bool) -> Batch:
        assert self._short is not None, "a plan with windows to distil has a stream of them"
        ids_BT = torch.cat([self._short[number] for number in numbers])
        seed = (self._config.seed, numbers[0])
        return Batch(
            ids_BT, len(numbers) / self._plan.short_windows,
            jumps=jumps(self._plan.window, self._target_length, seed) if jumped else None,
        )  # fmt: skip

    def _read(self, number: int) -> Batch:
        assert self._long is not None, "a plan with long windows has a stream of them"
        return _long_batch(self._long[number], 1 / self._plan.long_windows, self._weaver, (self._config.seed, number))


def validation_batches(plan: Plan, config: RestoreConfig, stream: TokenStream, weaver: Weaver | None) -> list[Batch]:
    """Held-out windows of both kinds, always the same and without jumps.

    Raises:
        DataError: the stream is shorter than a window.
    """
    short = evenly_spaced(stream, plan.window, config.validation_windows) if plan.short_windows else []
    # A long window costs as many tokens as many short ones: one of them is enough to choose by.
    try:
        long = evenly_spaced(stream, plan.long_window, 1) if plan.long_windows else []
    except DataError as error:
        raise DataError(
            f"{error}: hold more out (--validation-share) or train on shorter long windows (--long-window)"
        ) from None
    return [Batch(window, 1 / len(short)) for window in short] + [
        _long_batch(window, 1 / len(long), weaver, (config.seed,)) for window in long
    ]


def _long_batch(ids_BT: Tensor, share: float, weaver: Weaver | None, seed: tuple[int, ...]) -> Batch:
    """A long window, with facts in it where there is a weaver."""
    if weaver is None:
        return Batch(ids_BT, share, is_long=True)
    ids_BT, answers_N = weaver.weave(ids_BT, seed)
    return Batch(ids_BT, share, is_long=True, answers_N=answers_N)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    # A copy from memory that the system may page out would wait until the GPU has nothing left to do.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
