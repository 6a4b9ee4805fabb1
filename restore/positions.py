"""Positions with jumps: a native window read as if its parts lay far apart in the target length.

After PoSE (arXiv 2309.10400) and CREAM (arXiv 2406.07138): the student meets far positions at the price of a short window.
The teacher reads the same tokens without jumps.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_CHUNKS = 3


class Jumps(NamedTuple):
    """Where a window's tokens are read.

    `positions_BT` [1, T] rise from 0 and jump between chunks; `cu_seqlens` [chunks + 1] int32 are the chunks' ends in tokens.
    """

    positions_BT: Tensor
    cu_seqlens: Tensor


def jumps(window: int, target_length: int, seed: tuple[int, ...]) -> Jumps:
    """Cut `window` tokens into three chunks of random lengths and move all but the first to random places, in order.

    The first chunk stays at 0, for that is where attention puts what it does not need elsewhere.
    """
    generator = np.random.default_rng(seed)
    chunks = min(_CHUNKS, window)
    cuts = np.sort(generator.choice(np.arange(1, window), chunks - 1, replace=False))
    moved = np.sort(generator.integers(0, target_length - window + 1, chunks - 1))
    lengths = np.diff([0, *cuts, window])
    positions = np.arange(window) + np.repeat([0, *moved], lengths)
    ends = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
    return Jumps(torch.from_numpy(positions)[None], ends)
