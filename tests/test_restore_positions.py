"""Positions with jumps: in order, inside the target, chunks whole."""

import pytest
import torch

from restore.positions import jumps


@pytest.mark.parametrize(("window", "target"), [(2, 16), (3, 3), (64, 512), (8192, 65536)])
def test_positions_rise_from_zero_within_the_target_and_jump_only_between_chunks(window: int, target: int) -> None:
    for seed in range(20):
        positions_BT, cu_seqlens = jumps(window, target, (seed,))
        assert positions_BT.shape == (1, window)
        assert positions_BT[0, 0] == 0
        assert positions_BT[0, -1] < target
        steps = positions_BT[0].diff()
        assert bool((steps >= 1).all())
        starts = cu_seqlens[1:-1].tolist()
        assert set((torch.nonzero(steps > 1).flatten() + 1).tolist()) <= set(starts)
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == window
        assert bool((cu_seqlens.diff() > 0).all())


def test_the_far_end_is_reached_and_a_seed_gives_the_same_jumps() -> None:
    assert max(int(jumps(64, 512, (seed,)).positions_BT[0, -1]) for seed in range(50)) > 400
    assert torch.equal(jumps(64, 512, (3, 1)).positions_BT, jumps(64, 512, (3, 1)).positions_BT)
    assert not torch.equal(jumps(64, 512, (3, 1)).positions_BT, jumps(64, 512, (3, 2)).positions_BT)
