"""The Triton kernels under Triton's interpreter (CPU, small shapes) or on a GPU where there is one, against dense float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="triton is not installed")

from restore.kernels import cross_relation_kl, self_relation_kl, triton_backend
from restore.kernels.documents import Spans, spans_of_lengths, spans_of_mask
from restore.kernels.reference import relation_rows
from restore.kernels.sampling import sample_rows, take_rows
from restore.kernels.triton_launch import launch
from restore.kernels.triton_tiles import Tile, unit_stride

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALES = (0.06, 0.05)
POISONS = pytest.mark.parametrize(
    ("poison", "channels", "dtype"),
    [(poison, *shape) for poison in (float("nan"), float("inf")) for shape in ((16, torch.float32), (128, torch.float16))],
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _pair(batch: int, heads: int, tokens: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # [B, T, H, D] in memory, as a projection leaves it: the kernels take strides.
    teacher = torch.randn(batch, tokens, heads, channels, device=DEVICE).transpose(1, 2)
    return (teacher + 0.3 * torch.randn_like(teacher)).to(dtype), teacher.to(dtype)


def _check(
    query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor] | None, spans: Spans | None = None, rows: int | None = None
) -> None:
    """Values and gradients against float64, allowed the error of the same dense formula in the inputs' dtype."""
    (q_s, q_t), (k_s, k_t) = query, key or query
    row_BHM = None
    if rows is not None:
        row_BHM, _ = sample_rows(q_s, rows)
        q_s, q_t = take_rows(q_s, row_BHM), take_rows(q_t, row_BHM)
    upstream = torch.randn(q_s.shape[:3], device=DEVICE)
    kl, lse_s, lse_t = triton_backend.forward(q_s, k_s, q_t, k_t, SCALES, spans, row_BHM)
    if key is None and rows is None:
        ours = [triton_backend.self_backward(upstream, q_s, q_t, lse_s, lse_t, SCALES, spans)]
    else:
        ours = list(triton_backend.backward(upstream, q_s, k_s, q_t, k_t, lse_s, lse_t, SCALES, spans, row_BHM))

    def dense(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        leaves = [q_s.to(dtype).requires_grad_()]
        leaves.append(leaves[0] if len(ours) == 1 else k_s.to(dtype).requires_grad_())
        truth = relation_rows(leaves[0], leaves[1], q_t.to(dtype), k_t.to(dtype), SCALES, spans, row_BHM)
        return truth.detach(), list(torch.autograd.grad(truth, leaves[: len(ours)], upstream.to(dtype)))

    truth, true_gradients = dense(torch.float64)
    eager, eager_gradients = dense(q_s.dtype)
    # A kernel keeps one log-sum-exp a row and computes the logit anew. Each is rounded to fp32, so a probability is off by
    # the share `rounding` for either, in student and teacher; in a self-relation a token is both row and column.
    rounding = 2**-24 * max(float(lse.masked_fill(lse.isinf(), 0).abs().max()) for lse in (lse_s, lse_t))
    spread = max(SCALES) * float((upstream[..., None] * q_s.float()).norm())
    _no_worse(kl, eager, truth, 2 * rounding * truth.numel() ** 0.5)
    for gradient, eager_gradient, true_gradient in zip(ours, eager_gradients, true_gradients, strict=True):
        assert gradient.dtype == q_s.dtype
        _no_worse(gradient, eager_gradient, true_gradient, (4 if key else 8) * rounding * spread)


def _no_worse(ours: Tensor, eager: Tensor, truth: Tensor, rounding: float) -> None:
    error, eager_error = (ours.double() - truth).norm(), (eager.double() - truth).norm()
    assert error <= 1.1 * eager_error + rounding, f"error {error:.3g}, eager {eager_error:.3g}, rounding {rounding:.3g}"


@pytest.mark.parametrize("tokens", [1, 31, 64, 65, 129, 200])
def test_self_relation(tokens: int) -> None:
    _check(_pair(2, 2, tokens, 64, torch.float32), None)


@pytest.mark.parametrize("channels", [16, 40, 80, 96, 112, 128, 256])
def test_every_head_size(channels: int) -> None:
    _check(_pair(1, 1, 70, channels, torch.float32), None)
    _check(_pair(1, 2, 70, channels, torch.float32), _pair(1, 1, 70, channels, torch.float32))


# 128 channels: on a Hopper GPU the warp-specialised kernels, which take nothing else.
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype: torch.dtype, channels: int) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("needs a GPU: Triton's interpreter multiplies the bit patterns of bf16 as integers")
    for tokens in (130,) if DEVICE == "cpu" else (1, 63, 130, 1000):
        _check(_pair(1, 2, tokens, channels, dtype), None)
        _check(_pair(1, 4, tokens, channels, dtype), _pair(1, 2, tokens, channels, dtype))


@pytest.mark.parametrize("channels", [80, 96, 112])
def test_half_precision_of_odd_head_sizes_in_documents(channels: int) -> None:
    spans = spans_of_lengths(torch.tensor([0, 1, 37, 95], device=DEVICE), 100)
    _check(_pair(1, 2, 100, channels, torch.float16), None, spans)
    _check(_pair(1, 2, 100, channels, torch.float16), _pair(1, 1, 100, channels, torch.float16), spans, rows=33)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("tokens", [1, 63, 150])
def test_attention_rows(groups: int, tokens: int) -> None:
    _check(_pair(2, 6, tokens, 16, torch.float32), _pair(2, groups, tokens, 16, torch.float32))


def _masks() -> dict[str, Spans]:
    position = torch.arange(150, device=DEVICE)
    lengths = torch.tensor([150, 0, 77], device=DEVICE)[:, None]
    return {
        "right": spans_of_mask(position < lengths),
        "left": spans_of_mask(position >= 150 - lengths),
        "holes": spans_of_mask((position % 50 > 2).expand(3, 150)),
    }


@pytest.mark.parametrize("name", ["right", "left", "holes"])
def test_padding(name: str) -> None:
    spans = _masks()[name]
    _check(_pair(3, 1, 150, 16, torch.float32), None, spans)
    _check(_pair(3, 2, 150, 16, torch.float32), _pair(3, 1, 150, 16, torch.float32), spans)


def test_nothing_but_padding_counts_for_nothing() -> None:
    student, teacher = _pair(2, 2, 70, 16, torch.float32)
    for rows in (None, 9):
        spans = spans_of_mask(torch.zeros(2, 70, dtype=torch.bool, device=DEVICE))
        _check((student, teacher), (student[:, :1], teacher[:, :1]), spans, rows)
    kl, lse_s, lse_t = triton_backend.forward(student, student, teacher, teacher, SCALES, spans, None)
    gradient = triton_backend.self_backward(torch.ones_like(kl), student, teacher, lse_s, lse_t, SCALES, spans)
    assert not kl.any()
    assert not gradient.any()


def test_packed_documents() -> None:
    spans = spans_of_lengths(torch.tensor([0, 1, 70, 90, 190], device=DEVICE), 200)
    _check(_pair(1, 2, 200, 16, torch.float32), None, spans)
    _check(_pair(1, 2, 200, 16, torch.float32), _pair(1, 1, 200, 16, torch.float32), spans)


def test_sampled_rows() -> None:
    spans = _masks()["left"]
    _check(_pair(3, 4, 150, 16, torch.float32), _pair(3, 2, 150, 16, torch.float32), rows=21)
    _check(_pair(3, 4, 150, 16, torch.float32), _pair(3, 2, 150, 16, torch.float32), spans, rows=70)


def test_what_padding_holds_reaches_nothing() -> None:
    student, teacher = _pair(1, 2, 100, 16, torch.float32)
    mask = torch.arange(100, device=DEVICE)[None] >= 37
    spans = spans_of_mask(mask)
    garbage = mask[:, None, :, None].logical_not()
    results = []
    for value in (0.0, float("nan")):
        s, t = student.masked_fill(garbage, value), teacher.masked_fill(garbage, value)
        rows = triton_backend.forward(s, s, t, t, SCALES, spans, None)
        gradient = triton_backend.self_backward(torch.ones_like(rows[0]), s, t, *rows[1:], SCALES, spans)
        cross = triton_backend.backward(torch.ones_like(rows[0]), s, s, t, t, *rows[1:], SCALES, spans, None)
        results.append((*rows, gradient, *cross))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_tiny_upstream_gradients_survive_fp16() -> None:
    student, teacher = _pair(1, 1, 64, 16, torch.float16)
    kl, lse_s, lse_t = triton_backend.forward(student, student, teacher, teacher, SCALES, None, None)
    big, small = (
        triton_backend.self_backward(torch.full_like(kl, weight), student, teacher, lse_s, lse_t, SCALES, None)
        for weight in (1.0, 2.0**-10)
    )
    assert small.count_nonzero() > 0.9 * small.numel()
    torch.testing.assert_close(small.float() * 2**10, big.float(), rtol=0.02, atol=2e-3)


@POISONS
def test_nan_and_inf_are_not_hidden(poison: float, channels: int, dtype: torch.dtype) -> None:
    student, teacher = _pair(1, 2, 70, channels, dtype)
    student[0, 1, 40, 3] = poison
    kl, lse_s, lse_t = triton_backend.forward(student, student, teacher, teacher, SCALES, None, None)
    assert kl[0, 0].isfinite().all()
    assert kl[0, 1, :40].isfinite().all()
    assert not kl[0, 1, 40].isfinite()
    gradient = triton_backend.self_backward(torch.ones_like(kl), student, teacher, lse_s, lse_t, SCALES, None)
    assert gradient[0, 0].isfinite().all()
    assert not gradient[0, 1, 40].isfinite().any()


@POISONS
def test_a_key_that_is_not_finite_spoils_the_rows_that_see_it_and_no_others(
    poison: float, channels: int, dtype: torch.dtype
) -> None:
    (q_s, q_t), (k_s, k_t) = _pair(1, 4, 70, channels, dtype), _pair(1, 2, 70, channels, dtype)
    k_t[0, 1, 40, 3] = poison
    kl, lse_s, lse_t = triton_backend.forward(q_s, k_s, q_t, k_t, SCALES, None, None)
    assert kl[0, :2].isfinite().all()
    assert kl[0, 2:, :40].isfinite().all()
    assert not kl[0, 2:, 40:].isfinite().all(1).any()
    dq, dk = triton_backend.backward(torch.ones_like(kl), q_s, k_s, q_t, k_t, lse_s, lse_t, SCALES, None, None)
    assert dq[0, :2].isfinite().all()
    assert dk[0, 0].isfinite().all()
    assert not dk[0, 1].isfinite().all()


def test_strides_are_taken_as_they_are_and_only_scattered_channels_copied() -> None:
    side_by_side = _pair(1, 2, 40, 16, torch.float32)
    assert not side_by_side[0].is_contiguous()
    assert all(ours is theirs for ours, theirs in zip(unit_stride(*side_by_side), side_by_side, strict=True))
    scattered = tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in side_by_side)
    _check((scattered[0], scattered[1]), None)


def test_heads_that_share_memory_and_slices_of_longer_tensors() -> None:
    """Strides of 0 (one head shown as many) and of more than the shape, in queries, keys and row gradients."""
    query, key = _pair(1, 1, 90, 16, torch.float32), _pair(1, 2, 90, 16, torch.float32)
    shared = tuple(x[:, :, 10:80].expand(1, 4, 70, 16) for x in query)
    sliced = tuple(x[:, :, 10:80] for x in key)
    _check((shared[0], shared[1]), (sliced[0], sliced[1]))
    _check((shared[0], shared[1]), None)


def test_repeats_give_the_same_bits() -> None:
    spans = spans_of_lengths(torch.tensor([0, 30, 95], device=DEVICE), 100)
    (q_s, q_t), (k_s, k_t) = _pair(1, 2, 100, 16, torch.float16), _pair(1, 1, 100, 16, torch.float16)
    upstream = torch.randn(1, 2, 100, device=DEVICE)
    first: list[Tensor] = []
    for _ in range(250 if DEVICE == "cuda" else 3):
        rows = triton_backend.forward(q_s, k_s, q_t, k_t, SCALES, spans, None)
        gradients = triton_backend.backward(upstream, q_s, k_s, q_t, k_t, *rows[1:], SCALES, spans, None)
        own = triton_backend.self_backward(upstream, q_s, q_t, *rows[1:], SCALES, spans)
        first = first or [*rows, *gradients, own]
        assert all(torch.equal(again, once) for again, once in zip((*rows, *gradients, own), first, strict=True))


@pytest.mark.parametrize("rows", [None, 20])
def test_the_public_function_over_these_kernels_compiles_checkpoints_and_autocasts(
    rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operators as on a GPU: without one, the same kernels run in the interpreter behind them."""
    monkeypatch.setattr("restore.kernels.ops._backend", lambda _: triton_backend)
    (q_s, q_t), (k_s, k_t) = _pair(2, 2, 40, 16, torch.float32), _pair(2, 1, 40, 16, torch.float32)
    leaves = [x.contiguous().requires_grad_() for x in (q_s, k_s)]
    mask = torch.arange(40, device=DEVICE) >= torch.tensor([[0], [23]], device=DEVICE)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(0) if rows and not torch.compiler.is_compiling() else None
        return cross_relation_kl(q, k, q_t, k_t, mask_BT=mask, rows=rows, generator=generator)

    plain = loss(*leaves)
    again = checkpoint(loss, *leaves, use_reentrant=False)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(again, plain)
    gradients = [torch.autograd.grad(each, leaves) for each in (plain, again, compiled)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients[0], gradients[1], strict=True))
    if rows is None:  # else other rows are drawn
        assert torch.equal(compiled, plain)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients[0], gradients[2], strict=True))
    with torch.autocast(DEVICE, dtype=torch.float16):
        low = loss(*leaves)
    halves = [x.half() for x in (*leaves, q_t, k_t)]
    generator = torch.Generator(DEVICE).manual_seed(0)
    assert torch.equal(low, cross_relation_kl(*halves, mask_BT=mask, rows=rows, generator=generator))
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(low, leaves))


class _Kernel:
    """Stands for a `triton.jit` kernel and the compiled variant that its first launch returns."""

    def __init__(self) -> None:
        self.asked, self.launched = 0, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def ask(*_: object, **__: object) -> Any:
            self.asked += 1
            return _Compiled(self)

        return ask


class _Compiled:
    def __init__(self, kernel: _Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*_: object) -> None:
            self._kernel.launched += 1

        return run


def test_triton_is_asked_once_for_each_variant() -> None:
    kernel, tile, x = _Kernel(), Tile(64, 64, 4, 2), torch.zeros(64)
    for arguments in ((x, 16), (x, 16), (x, 1), (x.half(), 16), (x[1:], 16), (x, 16), (None, 16)):
        launch(kernel, 3, arguments, {"ROWS": 64}, tile)
    assert (kernel.asked, kernel.launched) == (5, 2)
    launch(kernel, 3, (x, 16), {"ROWS": 32}, tile)
    launch(kernel, 3, (x, 16), {"ROWS": 64}, tile._replace(warps=8))
    assert (kernel.asked, kernel.launched) == (7, 2)


def test_large_logits_stay_finite() -> None:
    student, teacher = _pair(1, 1, 70, 64, torch.float32)
    rows = triton_backend.forward(student * 30, student * 30, teacher * 30, teacher * 30, SCALES, None, None)
    big_s, big_t = student.double() * 30, teacher.double() * 30
    truth = relation_rows(big_s, big_s, big_t, big_t, SCALES)
    torch.testing.assert_close(rows[0].double(), truth, rtol=1e-4, atol=1e-2)
    gradient = triton_backend.self_backward(torch.ones_like(rows[0]), student * 30, teacher * 30, *rows[1:], SCALES, None)
    assert gradient.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose driver tells when it is waited for")
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [None, 20])
def test_nothing_waits_for_the_device(rows: int | None) -> None:
    (q_s, q_t), (k_s, k_t) = _pair(2, 4, 300, 64, torch.bfloat16), _pair(2, 2, 300, 64, torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q_s, k_s)]
    mask = torch.arange(300, device=DEVICE) >= torch.tensor([[0], [23]], device=DEVICE)
    cuts = torch.tensor([0, 1, 77, 290], device=DEVICE)

    def step() -> None:
        torch.autograd.grad(cross_relation_kl(q_s, k_s, q_t, k_t, mask_BT=mask, rows=rows), leaves)
        torch.autograd.grad(self_relation_kl(q_s, q_t, mask_BT=mask, rows=rows), q_s)
        torch.autograd.grad(self_relation_kl(q_s[:1], q_t[:1], cu_seqlens=cuts, rows=rows), q_s)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 40 GB")
@pytest.mark.gpu
def test_tensors_past_2_31_elements() -> None:
    from restore.kernels.bench import check_offsets

    found = check_offsets()
    assert found["elements"] > 2**31
    assert found["last_head_bit_equal"]


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.gpu
def test_kernels_for_hopper_agree_with_tritons() -> None:
    from restore.kernels.tune_hopper import check

    assert check() == []
