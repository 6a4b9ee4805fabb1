"""What an optimizer step reads: windows to distil, some with jumps or cut into short texts, and long ones, some with facts."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ard_serve.errors import DataError
from restore.config import RestoreConfig
from restore.data import TokenStream, Windows, evenly_spaced
from restore.plan import Plan, cut_lengths
from restore.positions import Jumps, jumps
from restore.retrieval import Weaver

Kind = Literal["whole", "jumped", "cut"]


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
        self,
        plan: Plan,
        config: RestoreConfig,
        stream: TokenStream,
        target_length: int,
        weaver: Weaver | None,
        at_once: int = 1,
    ) -> None:
        """`at_once`: distillation windows of one pass. Raises DataError when the stream is shorter than a window."""
        self._plan, self._config, self._target_length, self._weaver = plan, config, target_length, weaver
        self._at_once = at_once
        self._short = Windows(stream, plan.window, config.seed) if plan.short_windows else None
        self._long = Windows(stream, plan.long_window, config.seed) if plan.long_windows else None

    def lengths(self, step: int) -> list[int]:
        """Tokens of every window of step number `step`: long ones, then those to distil."""
        plan = self._plan
        return [plan.long_window] * plan.long_in(step) + [plan.window] * plan.short_windows

    def of_step(self, step: int, windows: Sequence[int]) -> Iterator[Batch]:
        """The batches of step number `step` that hold the `windows`, which count as `lengths` lists them."""
        plan, long = self._plan, self._plan.long_in(step)
        short = [step * plan.short_windows + window - long for window in windows if window >= long]
        for kind, group in groupby(sorted(short, key=self._kind), key=self._kind):
            numbers = list(group)
            at_once = 1 if kind == "jumped" else self._at_once
            yield from (self._distilled(numbers[at : at + at_once], kind) for at in range(0, len(numbers), at_once))
        for window in windows:
            if window < long:
                yield self._read(step // plan.long_every * plan.long_windows + window)

    def _kind(self, number: int) -> Kind:
        """How distillation window `number` is read; each share is spread evenly over the windows."""
        jump, cut = self._config.jump_share, self._config.cut
        if not (special := _falls_on(number, jump + cut)):
            return "whole"
        return "jumped" if _falls_on(special - 1, jump / (jump + cut)) else "cut"

    def _distilled(self, numbers: Sequence[int], kind: Kind) -> Batch:
        assert self._short is not None, "a plan with windows to distil has a stream of them"
        ids_BT = torch.cat([self._short[number] for number in numbers])
        seed, share = (self._config.seed, numbers[0]), len(numbers) / self._plan.short_windows
        if kind == "cut":
            return Batch(_cut(ids_BT, seed), share)
        return Batch(ids_BT, share, jumps=jumps(self._plan.window, self._target_length, seed) if kind == "jumped" else None)

    def _read(self, number: int) -> Batch:
        assert self._long is not None, "a plan with long windows has a stream of them"
        return _long_batch(self._long[number], 1 / self._plan.long_windows, self._weaver, (self._config.seed, number))


class Ahead:
    """What a step reads, made by another thread while the step before it runs.

    Weaving facts into a long window tokenizes every one of them: a small model's GPU would wait for that.
    """

    def __init__(self, make: Callable[[int], list[Batch]], steps: int) -> None:
        """`make` gives the batches of a step, the same whenever it is asked; nothing is made for a step from `steps` on."""
        self._make, self._steps = make, steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def of_step(self, step: int) -> list[Batch]:
        made = self._next[1].result() if self._next and self._next[0] == step else self._make(step)
        self._next = (step + 1, self._thread.submit(self._make, step + 1)) if step + 1 < self._steps else None
        return made

    def wait(self) -> None:
        """Until the thread is done, which nobody else may disturb at the tokenizer."""
        if self._next:
            wait([self._next[1]])


def _falls_on(number: int, share: float) -> int:
    """0, or which one it is, from 1 on, when `number` is one of those that a share of all numbers falls on."""
    before, after = int(number * share), int((number + 1) * share)
    return after if after > before else 0


def _cut(ids_BT: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Windows as texts of one length, which is drawn: [texts, length]. What is left over at the ends is dropped."""
    window = ids_BT.shape[1]
    lengths = cut_lengths(window)
    length = lengths[np.random.default_rng(seed).integers(len(lengths))]
    return ids_BT[:, : window // length * length].reshape(-1, length)


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
