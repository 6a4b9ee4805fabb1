"""What an evaluation asks of a model, however it is reached: loaded here (`likelihood`) or behind a server (`served`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """How likely is `continuation` after `context`? Both are token ids; the context holds at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """Summed log-probability of a continuation in nats, and whether greedy decoding would have written it."""

    log_prob: float
    is_greedy: bool


class Reader(Protocol):
    """A model that reads and writes token ids."""

    def score(self, requests: Sequence[Request], description: str) -> list[Likelihood]:
        """Score every request, with a progress bar of that description."""

    def log_probs(self, rows: Sequence[Sequence[int]], positions: Sequence[int], advance: Callable[[int], None]) -> np.ndarray:
        """Log-probability, float64 [rows, positions], of the tokens at `positions` after all tokens before them.

        Rows are equally long; `advance` is told the tokens that were read.
        """

    def continue_greedily(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, advance: Callable[[int], None]
    ) -> list[list[int]]:
        """The `new_tokens` most likely tokens after each of equally long prompts, whatever ends there.

        `advance` is told the tokens that were read.
        """

    def generate(
        self,
        prompts: Sequence[str],
        stops: Sequence[str],
        new_tokens: int,
        tokenizer: "PreTrainedTokenizerBase",
        description: str,
    ) -> list[str]:
        """Greedy text after each prompt, up to the first of the stop strings, the end of text, or `new_tokens`."""
