"""Sequences that begin alike, read once: packed into rows as trees, in which each token attends to what it follows alone.

The four choices of a question, or all questions behind the same solved examples, share most of their tokens. A row holds
several sequences, one behind the other; each writes only what the one before it did not. Positions and attention are those
of every sequence read by itself, as when candidates are verified in a tree (arXiv 2305.09781).

Shapes: B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

Ids = tuple[int, ...]


@dataclass
class Pack:
    """One row: its tokens, their positions, and for each sequence the places of its tokens in the row."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    paths: dict[Ids, np.ndarray] = field(default_factory=dict)
    _written: list[tuple[int, int, np.ndarray]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, sequence: Ids, shared: np.ndarray) -> None:
        """Write a sequence whose first tokens already lie at the places `shared`."""
        start, fresh = len(self.tokens), sequence[len(shared) :]
        self.tokens += fresh
        self.positions += range(len(shared), len(sequence))
        self.paths[sequence] = np.concatenate((shared, np.arange(start, len(self.tokens))))
        self._written.append((start, len(self.tokens), shared))

    def attends(self, size: int) -> np.ndarray:
        """Which place sees which: bool [size, size]. Padding sees itself, so that no row of the softmax is empty."""
        seen = np.eye(size, dtype=bool)
        for start, end, shared in self._written:
            seen[start:end, shared] = True
            seen[start:end, start:end] = np.tri(end - start, dtype=bool)
        return seen


def pack(sequences: Sequence[Ids], capacity: int) -> list[Pack]:
    """Pack distinct sequences into rows of at most `capacity` tokens; a longer one is a row of its own."""
    packs: list[Pack] = []
    before: Ids = ()
    for sequence in sorted(sequences):
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, sequence, strict=False)))
        if not packs or len(packs[-1]) + len(sequence) - alike > capacity:
            packs.append(Pack())
            alike = 0
        packs[-1].add(sequence, packs[-1].paths[before][:alike] if alike else np.arange(0))
        before = sequence
    return packs


def collate(packs: Sequence[Pack]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Token ids [B, T], padded on the right, their positions [B, T] and the attention mask [B, 1, T, T], True where seen.

    Rows of one sequence each need neither of the last two: causal attention is right there and never looks at the padding.
    """
    ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(one.tokens) for one in packs], batch_first=True)
    if all(len(one.paths) == 1 for one in packs):
        return ids_BT, None, None
    positions_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(one.positions) for one in packs], batch_first=True)
    mask_BTT = torch.from_numpy(np.stack([one.attends(ids_BT.shape[1]) for one in packs]))
    return ids_BT, positions_BT, mask_BTT[:, None]
