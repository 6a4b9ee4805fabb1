"""The kernels' benchmark and tile search, as far as they go without a GPU: peers, fits, a profiler's table, other tiles."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, flex_attention

from restore.kernels import bench_peers, cross_relation_kl, self_relation_kl, tune
from restore.kernels.bench import fit_memory
from restore.kernels.bench_profile import read_details
from restore.kernels.triton_tiles import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _attention(q: Tensor, k: Tensor, v: Tensor, return_aux: AuxRequest | None = None, **_: Any) -> Any:
    """What FlexAttention computes, which has no backward on the CPU."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1) > 0, -torch.inf)
    out = logits.softmax(-1) @ v
    return (out, AuxOutput(lse=logits.logsumexp(-1))) if return_aux else out


@pytest.mark.parametrize("groups", [1, 2])
def test_peers_compute_our_loss(groups: int) -> None:
    torch.manual_seed(0)
    q_s, q_t = (torch.randn(1, 2, 40, 16, requires_grad=grad) for grad in (True, False))
    k_s, k_t = (torch.randn(1, groups, 40, 16, requires_grad=grad) for grad in (True, False))
    ours = cross_relation_kl(q_s, k_s, q_t, k_t)
    expected = torch.autograd.grad(ours, (q_s, k_s))
    for theirs in (bench_peers.dense(q_s, k_s, q_t, k_t), bench_peers.flex(_attention, q_s, k_s, q_t, k_t)):
        torch.testing.assert_close(theirs, ours)
        torch.testing.assert_close(torch.autograd.grad(theirs, (q_s, k_s)), expected, rtol=1e-3, atol=1e-6)
    q_s, k_s, ours = q_s.detach(), k_s.detach(), ours.detach()
    torch.testing.assert_close(bench_peers.flex(flex_attention, q_s, k_s, q_t, k_t), ours)
    torch.testing.assert_close(bench_peers.flex(flex_attention, q_s, q_t), self_relation_kl(q_s, q_t))


@pytest.mark.parametrize("name", ["flex", "compiled"])
def test_compiled_peers_are_compiled_at_every_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Uncompiled they would give the same: past PyTorch's limit of 8 variants they must fail instead, and must not come so far.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for tokens, channels in product((24, 32, 40), (8, 16, 32)):
        q_s, q_t = torch.randn(1, 2, tokens, channels), torch.randn(1, 2, tokens, channels)
        loss = bench_peers.peers(tokens, None)[name]
        torch.testing.assert_close(loss(q_s, q_t), self_relation_kl(q_s, q_t), rtol=1e-4, atol=1e-6)


def test_memory_fit_says_how_far_from_a_line() -> None:
    def rows(kib: list[float]) -> list[dict[str, object]]:
        return [
            {"op": "self_relation", "head_dim": 64, "T": tokens, "extra_mib": value / 1024}
            for tokens, value in zip((1000, 2000, 4000), kib, strict=True)
        ]

    straight = fit_memory(rows([8010, 16010, 32010]))["self_relation 64"]
    assert straight == {"kib_per_token": 8.0, "kib_at_0": 10.0, "largest_distance_percent": 0.0}
    assert fit_memory(rows([1000, 4000, 16000]))["self_relation 64"]["largest_distance_percent"] > 30


def test_a_profilers_table_becomes_kept_metrics() -> None:
    lines = [
        "==PROF== Connected to process 7",
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"',
        '"0","_forward_kernel","GPU Speed Of Light Throughput","Duration","ms","1.40"',
        '"0","_forward_kernel","Compute Workload Analysis","Issue Slots Busy","%","34.67"',
        '"0","_forward_kernel","Launch Statistics","Grid Size","","2,048"',
        '"1","_key_backward_kernel","Launch Statistics","Registers Per Thread","register/thread","255"',
    ]
    assert read_details(lines) == [
        {"kernel": "_forward_kernel", "Duration": "1.40 ms", "Issue Slots Busy": "34.67 %"},
        {"kernel": "_key_backward_kernel", "Registers Per Thread": "255 register/thread"},
    ]


def test_candidates_fit_a_multiprocessor() -> None:
    for kernel in tune.KERNELS:
        tiles = list(tune.candidates(kernel, 128))
        assert Tile(64, 64, 4, 2) in tiles
        assert all(4 * 128 * (tile.rows + tile.stages * tile.columns) <= tune.SHARED_BYTES for tile in tiles)


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_other_tiles_compute_the_same(kernel: str) -> None:
    run = tune.problem(kernel, 90, 16, heads=2, groups=1, device=DEVICE)
    for tile in (Tile(32, 64, 4, 2), Tile(64, 32, 4, 1)):
        assert tune.differs(run(tile), run(None)) is None


def test_a_wrong_result_is_told_and_nan_is_wrong() -> None:
    right = (torch.ones(4),)
    assert tune.differs((torch.ones(4),), right) is None
    assert "0.5" in str(tune.differs((torch.full((4,), 0.5),), right))
    assert tune.differs((torch.full((4,), torch.nan),), right) is not None
