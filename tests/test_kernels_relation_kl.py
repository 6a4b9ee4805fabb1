"""The public relation KL on the CPU: against dense float64, its gradients, its masks, its memory, its place in PyTorch."""

import itertools
import math
import shutil
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ard_serve.errors import UsageError
from restore.kernels import chunked, cross_relation_kl, self_relation_kl
from restore.kernels.documents import Spans, spans_of_lengths, spans_of_mask
from restore.kernels.reference import relation_rows


def _pair(heads: int, tokens: int, channels: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    teacher = torch.randn(batch, heads, tokens, channels, dtype=torch.float64)
    student = teacher + 0.3 * torch.randn_like(teacher)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def _truth(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, spans: Spans | None = None) -> Tensor:
    scale = q_s.shape[3] ** -0.5
    return relation_rows(q_s.double(), k_s.double(), q_t.double(), k_t.double(), (scale, scale), spans)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[1, 7, 64, 129])
def tokens(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "TILE_ELEMENTS", 1)  # 16 rows a tile


@pytest.mark.usefixtures("small_tiles")
def test_self_relation_equals_dense_float64(tokens: int) -> None:
    student, teacher = _pair(3, tokens, 8)
    upstream = torch.randn(2, 3, tokens, dtype=torch.float64)
    rows = self_relation_kl(student, teacher, reduction="none")
    truth = _truth(student, student, teacher, teacher)
    torch.testing.assert_close(rows, truth)
    expected = torch.autograd.grad(truth, student, upstream)
    torch.testing.assert_close(torch.autograd.grad(rows, student, upstream), expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_cross_relation_equals_dense_float64(tokens: int, groups: int) -> None:
    (q_s, q_t), (k_s, k_t) = _pair(6, tokens, 8), _pair(groups, tokens, 8)
    upstream = torch.randn(2, 6, tokens, dtype=torch.float64)
    rows = cross_relation_kl(q_s, k_s, q_t, k_t, reduction="none")
    truth = _truth(q_s, k_s, q_t, k_t)
    torch.testing.assert_close(rows, truth)
    expected = torch.autograd.grad(truth, (q_s, k_s), upstream)
    torch.testing.assert_close(torch.autograd.grad(rows, (q_s, k_s), upstream), expected)


def test_gradcheck() -> None:
    (q_s, q_t), (k_s, k_t) = _pair(2, 6, 4, batch=1), _pair(1, 6, 4, batch=1)
    mask = torch.tensor([[False, True, True, True, True, False]])
    torch.autograd.gradcheck(lambda x: self_relation_kl(x, q_t, scale=0.7, teacher_scale=0.4, mask_BT=mask), (q_s,))
    torch.autograd.gradcheck(lambda q, k: cross_relation_kl(q, k, q_t, k_t, scale=0.7, reduction="head"), (q_s, k_s))


def test_operators_pass_pytorchs_own_checks() -> None:
    (q_s, q_t), (k_s, k_t) = _pair(2, 6, 4), _pair(1, 6, 4)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.ard.self_relation_kl.default, (q_s, q_t, 0.5, 0.5, None, None), test_utils=checks)
    arguments = (q_s, k_s, q_t, k_t, 0.5, 0.5, None, None, None)
    torch.library.opcheck(torch.ops.ard.cross_relation_kl.default, arguments, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_worse_than_eager(dtype: torch.dtype) -> None:
    student, teacher = _pair(2, 96, 16, dtype=dtype)
    exact = student.detach().double().requires_grad_()
    truth = _truth(exact, exact, teacher, teacher).sum()
    eager = relation_rows(student, student, teacher, teacher, (0.25, 0.25)).sum()
    ours = self_relation_kl(student, teacher, reduction="sum")
    gradient, eager_gradient, true_gradient = (
        torch.autograd.grad(loss, x)[0].double() for loss, x in ((ours, student), (eager, student), (truth, exact))
    )
    assert abs(ours.item() - truth.item()) <= 1.1 * abs(eager.item() - truth.item()) + 1e-6 * truth.item()
    slack = 1e-6 * true_gradient.norm()
    assert (gradient - true_gradient).norm() <= 1.1 * (eager_gradient - true_gradient).norm() + slack
    assert ours.dtype == torch.float32
    assert torch.autograd.grad(self_relation_kl(student, teacher), student)[0].dtype == dtype


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_absent(side: str) -> None:
    student, teacher = _pair(2, 40, 8, batch=1)
    inside = slice(11, 40) if side == "left" else slice(0, 29)
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[:, inside] = True
    garbage = torch.full_like(student.detach(), math.nan)
    padded_student = torch.where(mask[0, :, None], student.detach(), garbage).requires_grad_()
    padded_teacher = torch.where(mask[0, :, None], teacher, garbage)
    loss = self_relation_kl(padded_student, padded_teacher, mask_BT=mask)
    expected = self_relation_kl(student[:, :, inside], teacher[:, :, inside])
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, padded_student)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient[:, :, inside], expected_gradient[:, :, inside])
    assert gradient[:, :, ~mask[0]].count_nonzero() == 0


@pytest.mark.usefixtures("small_tiles")
def test_packed_documents_are_as_if_alone() -> None:
    (q_s, q_t), (k_s, k_t) = _pair(4, 60, 8, batch=1), _pair(2, 60, 8, batch=1)
    cuts = [0, 1, 20, 53]
    rows = cross_relation_kl(q_s, k_s, q_t, k_t, reduction="none", cu_seqlens=torch.tensor(cuts, dtype=torch.int32))
    for first, last in itertools.pairwise(cuts):
        part = slice(first, last)
        alone = _truth(q_s[:, :, part], k_s[:, :, part], q_t[:, :, part], k_t[:, :, part])
        torch.testing.assert_close(rows[:, :, first:last], alone)
    assert rows[:, :, 53:].count_nonzero() == 0
    mean = cross_relation_kl(q_s, k_s, q_t, k_t, cu_seqlens=torch.tensor(cuts))
    torch.testing.assert_close(mean, rows.sum() / (4 * 53))


def test_a_sequence_of_padding_alone_counts_for_nothing() -> None:
    student, teacher = _pair(2, 12, 4)
    mask = torch.tensor([[True] * 12, [False] * 12])
    loss = self_relation_kl(student, teacher, mask_BT=mask)
    torch.testing.assert_close(loss, self_relation_kl(student[:1], teacher[:1]))
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[1].count_nonzero() == 0
    assert gradient.isfinite().all()
    assert self_relation_kl(student, teacher, mask_BT=torch.zeros_like(mask)).item() == 0


def test_spans_of_lengths_equal_spans_of_their_mask() -> None:
    packed = spans_of_lengths(torch.tensor([0, 3, 3, 5]), 7)
    assert packed.start_BT.tolist() == [[0, 0, 0, 3, 3, 7, 7]]
    assert packed.end_BT.tolist() == [[3, 3, 3, 5, 5, 0, 0]]
    masked = spans_of_mask(torch.tensor([[False, True, True, False, True]]))
    assert masked.start_BT.tolist() == [[5, 1, 1, 5, 4]]
    assert masked.end_BT.tolist() == [[0, 3, 3, 0, 5]]


def test_reductions_agree() -> None:
    student, teacher = _pair(3, 20, 8)
    rows = self_relation_kl(student, teacher, reduction="none")
    torch.testing.assert_close(self_relation_kl(student, teacher), rows.mean())
    torch.testing.assert_close(self_relation_kl(student, teacher, reduction="sum"), rows.sum())
    torch.testing.assert_close(self_relation_kl(student, teacher, reduction="head"), rows.mean((0, 2)))


@pytest.mark.parametrize("mask", [None, torch.arange(40)[None] < torch.tensor([[40], [25]])])
def test_sampled_rows_are_unbiased(mask: Tensor | None) -> None:
    """Every row of every head is drawn with the probability its weight undoes: the mean over all draws is the full loss."""
    (q_s, q_t), (k_s, k_t) = _pair(4, 40, 8), _pair(2, 40, 8)
    full = cross_relation_kl(q_s, k_s, q_t, k_t, mask_BT=mask)
    full_gradient = torch.autograd.grad(full, (q_s, k_s))
    draws, generator = 200, torch.Generator().manual_seed(1)
    losses, q_sum, k_sum = [], torch.zeros_like(q_s), torch.zeros_like(k_s)
    for _ in range(draws):
        loss = cross_relation_kl(q_s, k_s, q_t, k_t, mask_BT=mask, rows=7, generator=generator)
        q_grad, k_grad = torch.autograd.grad(loss, (q_s, k_s))
        losses.append(loss.detach())
        q_sum, k_sum = q_sum + q_grad, k_sum + k_grad
    estimate = torch.stack(losses)
    standard_error = estimate.std() / draws**0.5
    assert abs(estimate.mean() - full) < 4 * standard_error
    assert standard_error < 0.03 * full
    for total, truth in zip((q_sum, k_sum), full_gradient, strict=True):
        assert (total / draws - truth).norm() < 0.25 * truth.norm()


def test_sampling_every_row_is_the_full_loss() -> None:
    student, teacher = _pair(2, 40, 8)
    full, sampled = self_relation_kl(student, teacher), self_relation_kl(student, teacher, rows=40)
    torch.testing.assert_close(sampled, full)
    torch.testing.assert_close(torch.autograd.grad(sampled, student), torch.autograd.grad(full, student))


def test_same_tensor_costs_nothing_and_nan_is_not_hidden() -> None:
    student, teacher = _pair(2, 20, 8, dtype=torch.float32)
    assert self_relation_kl(student, student.detach()).item() == 0
    for poison in (math.nan, math.inf):
        poisoned = student.detach().clone()
        poisoned[0, 1, 5, 3] = poison
        rows = self_relation_kl(poisoned, teacher, reduction="none")
        assert not rows[0, 1, 5:].isfinite().any()
        assert rows[0, 1, :5].isfinite().all()
        assert rows[1].isfinite().all()


def test_strided_input_and_repeats_are_bit_equal() -> None:
    student, teacher = _pair(3, 50, 8, dtype=torch.float32)
    strided = student.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    first = torch.autograd.grad(self_relation_kl(student, teacher), student)[0]
    assert torch.equal(torch.autograd.grad(self_relation_kl(strided, teacher), strided)[0], first)


def test_autocast_computes_in_its_dtype() -> None:
    student, teacher = _pair(2, 20, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = self_relation_kl(student, teacher)
    low = self_relation_kl(student.bfloat16(), teacher.bfloat16())
    assert loss.item() == low.item()
    assert torch.autograd.grad(loss, student)[0].dtype == torch.float32


NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=NO_COMPILER)])
def test_compiles_without_a_graph_break(backend: str) -> None:
    student, teacher = _pair(2, 20, 8, dtype=torch.float32)
    compiled = torch.compile(self_relation_kl, fullgraph=True, backend=backend)
    loss = compiled(student, teacher)
    torch.testing.assert_close(loss, self_relation_kl(student, teacher))
    expected = torch.autograd.grad(self_relation_kl(student, teacher), student)
    torch.testing.assert_close(torch.autograd.grad(loss, student), expected)


@pytest.mark.parametrize("rows", [None, 5])
def test_masked_and_sampled_rows_compile_without_waiting_for_a_value(rows: int | None) -> None:
    """fullgraph: reading a tensor's value on the host, as a device would be waited for, is an error."""
    (q_s, q_t), (k_s, k_t) = _pair(4, 20, 8, dtype=torch.float32), _pair(2, 20, 8, dtype=torch.float32)
    mask = torch.arange(20)[None] >= torch.tensor([[0], [6]])

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return cross_relation_kl(q, k, q_t, k_t, mask_BT=mask, rows=rows)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(q_s, k_s)
    if rows is None:
        torch.testing.assert_close(compiled, loss(q_s, k_s))
    assert all(gradient.count_nonzero() > 0 for gradient in torch.autograd.grad(compiled, (q_s, k_s)))


@pytest.mark.timing
def test_sampled_rows_cost_as_much_as_their_share() -> None:
    """Four times the tokens: four times the work of 32 rows, sixteen times that of all of them."""

    def seconds(tokens: int) -> float:
        (q_s, q_t), (k_s, k_t) = _pair(4, tokens, 16, dtype=torch.float32), _pair(2, tokens, 16, dtype=torch.float32)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            torch.autograd.grad(cross_relation_kl(q_s, k_s, q_t, k_t, rows=32), (q_s, k_s))
            times.append(time.perf_counter() - started)
        return min(times)

    seconds(2048)
    assert seconds(16_384) < 8 * seconds(4096)


def test_checkpointing_changes_no_bit() -> None:
    (q_s, q_t), (k_s, k_t) = _pair(4, 20, 8, dtype=torch.float32), _pair(2, 20, 8, dtype=torch.float32)
    plain = cross_relation_kl(q_s, k_s, q_t, k_t)
    again = checkpoint(cross_relation_kl, q_s, k_s, q_t, k_t, use_reentrant=False)
    assert torch.equal(again, plain)
    gradients = (torch.autograd.grad(loss, (q_s, k_s)) for loss in (again, plain))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_only_the_student_learns_and_only_once() -> None:
    student, teacher = _pair(2, 20, 8)
    teacher.requires_grad_()
    loss = self_relation_kl(student, teacher)
    torch.autograd.backward(loss, retain_graph=True)
    assert student.grad is not None
    assert teacher.grad is None
    with pytest.raises(UsageError, match="create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_selective_checkpointing_runs_the_forward_once(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = _pair(2, 20, 8)
    calls: list[int] = []
    forward = chunked.forward

    def counted(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(1)
        return forward(*arguments)

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op is torch.ops.ard.self_relation_kl.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    monkeypatch.setattr(chunked, "forward", counted)
    loss = checkpoint(
        lambda x: self_relation_kl(x * 2, teacher),
        student,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),  # type: ignore[no-untyped-call]
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert len(calls) == 1
    torch.testing.assert_close(gradient, torch.autograd.grad(self_relation_kl(student * 2, teacher), student)[0])


_PEAK = """
import resource, sys, torch
from restore.kernels import self_relation_kl
torch.manual_seed(0)
tokens = int(sys.argv[1])
student = torch.randn(1, 1, tokens, 32, requires_grad=True)
teacher = torch.randn(1, 1, tokens, 32)
self_relation_kl(student[:, :, :64], teacher[:, :, :64]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
self_relation_kl(student, teacher).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_linear_in_tokens() -> None:
    """[T, T] at T = 8,192 would be 256 MiB a copy; what is needed beyond the inputs is a few MiB."""
    peaks_mib = []
    for tokens in (2048, 8192):
        command = [sys.executable, "-c", _PEAK, str(tokens)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks_mib.append(int(output) / 1024)
    assert peaks_mib[1] < 64
    assert peaks_mib[1] < 4 * peaks_mib[0] + 24


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rows": 0}, "rows = 0"),
        ({"rows": 5, "reduction": "none"}, "none"),
        ({"reduction": "max"}, '"max"'),
        ({"mask_BT": torch.ones(2, 5)}, "mask_BT"),
        ({"cu_seqlens": torch.tensor([0, 20])}, "batch of 1"),
        ({"cu_seqlens": torch.tensor([0, 20]), "mask_BT": torch.ones(2, 20)}, "give one"),
    ],
)
def test_a_users_mistake_is_one_line(arguments: dict[str, Any], words: str) -> None:
    student, teacher = _pair(2, 20, 8)
    with pytest.raises(UsageError, match=words) as error:
        self_relation_kl(student, teacher, **arguments)
    assert "\n" not in str(error.value)


def test_shapes_that_do_not_fit() -> None:
    (q_s, q_t), (k_s, k_t) = _pair(4, 20, 8), _pair(3, 20, 8)
    with pytest.raises(UsageError, match="multiple"):
        cross_relation_kl(q_s, k_s, q_t, k_t)
    with pytest.raises(UsageError, match="same"):
        self_relation_kl(q_s, q_t[:, :, :19])
