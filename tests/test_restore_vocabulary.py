"""Losses over the vocabulary in chunks: values and gradients of plain PyTorch, and memory that does not grow with the rows."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy, kl_div, linear

from restore import vocabulary
from restore.vocabulary import lm_loss, logits_kl, logits_kl_and_lm, token_loss

WINDOW, CHANNELS, VOCABULARY = 70, 24, 130


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one short."""
    monkeypatch.setattr(vocabulary, "LOGIT_ROWS", 32)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled yet; what a test makes of it is gone afterwards."""
    for forget in (torch.compiler.reset, vocabulary._compiled.cache_clear, counters.clear):
        forget()
    yield
    vocabulary._compiled.cache_clear()
    torch.compiler.reset()


# Compiling takes seconds.
WAYS = [("eager", torch.float32), ("eager", torch.bfloat16), ("compiled", torch.bfloat16)]


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    """As on the CPU, and compiled as on a GPU."""
    monkeypatch.setattr(vocabulary, "_compiles", lambda _: vocabulary._can_compile and request.param == "compiled")
    # A failure to compile must fail the test.
    monkeypatch.setattr(vocabulary._log, "warning", pytest.fail)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, noise = (torch.randn(2, WINDOW, CHANNELS, generator=generator) for _ in range(2))
    head = torch.randn(VOCABULARY, CHANNELS, generator=generator) / 3
    ids = torch.randint(0, VOCABULARY, (2, WINDOW), generator=generator)
    return student.to(dtype).requires_grad_(), (student.detach() + 0.3 * noise).to(dtype), head.to(dtype), ids


def plain_kl(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    of_student, of_teacher = (
        linear(hidden.flatten(0, 1), head).to(_wide(head)).log_softmax(-1) for hidden in (student, teacher)
    )
    return kl_div(of_student, of_teacher, log_target=True, reduction="batchmean")


def plain_lm(hidden: Tensor, ids: Tensor, head: Tensor) -> Tensor:
    return cross_entropy(linear(hidden[:, :-1], head).flatten(0, 1).to(_wide(head)), ids[:, 1:].flatten())


def _wide(head: Tensor) -> torch.dtype:
    return torch.promote_types(head.dtype, torch.float32)


def both(loss: Callable[..., Tensor], hidden: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, of 3 times itself."""
    value = loss(hidden, *rest)
    return value.detach().double(), torch.autograd.grad(3 * value, hidden)[0].double()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("way", "dtype"), WAYS, indirect=["way"])
@pytest.mark.parametrize("name", ["logits", "lm"])
def test_losses_and_gradients_are_no_further_from_float64_than_plain_pytorchs(name: str, dtype: torch.dtype) -> None:
    student, teacher, head, ids = inputs(dtype)
    loss, plain = (logits_kl, plain_kl) if name == "logits" else (lm_loss, plain_lm)
    second = teacher if name == "logits" else ids
    exact = [tensor.detach().double() if tensor.is_floating_point() else tensor for tensor in (student, second, head)]
    truth = both(plain, exact[0].requires_grad_(), *exact[1:])
    for value, eager, true in zip(both(loss, student, second, head), both(plain, student, second, head), truth, strict=True):
        error, allowed = (float((found - true).norm() / true.norm()) for found in (value, eager))
        # The factor on a loss is known only in backward: its product is one more rounding of the gradient.
        assert error <= 1.05 * allowed + max(1e-6, torch.finfo(dtype).eps / 4)


def rows_of_logits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each product with the head has, from here on."""
    seen: list[int] = []
    logits = vocabulary._logits

    def counted(hidden: Tensor, head: Tensor) -> Tensor:
        seen.append(len(hidden))
        return logits(hidden, head)

    monkeypatch.setattr(vocabulary, "_logits", counted)
    return seen


@pytest.mark.parametrize("way", ["eager"], indirect=True)
@pytest.mark.usefixtures("way")
def test_both_losses_from_one_pass_are_those_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = rows_of_logits(monkeypatch)
    student, teacher, head, ids = (value.double() if value.is_floating_point() else value for value in inputs(torch.float32))
    student = student.detach().requires_grad_()
    apart = 0.3 * plain_kl(student, teacher, head) + 2.0 * plain_lm(student, ids, head)
    loss, kl, lm = logits_kl_and_lm(student, teacher, ids, head, (0.3, 2.0))
    assert sum(seen) == 2 * 2 * WINDOW, "student and teacher, once each"
    torch.testing.assert_close(loss.double(), apart, rtol=1e-5, atol=0)
    torch.testing.assert_close(kl, plain_kl(student, teacher, head).float())
    torch.testing.assert_close(lm, plain_lm(student, ids, head).float())
    (expected,), (found,) = (torch.autograd.grad(3 * value, student) for value in (apart, loss))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("way", "dtype"), WAYS, indirect=["way"])
def test_both_losses_are_no_further_from_float64_than_plain_pytorchs(dtype: torch.dtype) -> None:
    def ours(hidden: Tensor, teacher: Tensor, ids: Tensor, head: Tensor) -> Tensor:
        return logits_kl_and_lm(hidden, teacher, ids, head, (0.3, 2.0))[0]

    def plain(hidden: Tensor, teacher: Tensor, ids: Tensor, head: Tensor) -> Tensor:
        return 0.3 * plain_kl(hidden, teacher, head) + 2.0 * plain_lm(hidden, ids, head)

    student, teacher, head, ids = inputs(dtype)
    truth = both(plain, student.detach().double().requires_grad_(), teacher.double(), ids, head.double())
    found, eager = both(ours, student, teacher, ids, head), both(plain, student, teacher, ids, head)
    for value, reference, true in zip(found, eager, truth, strict=True):
        error, allowed = (float((one - true).norm() / true.norm()) for one in (value, reference))
        assert error <= 1.05 * allowed + max(1e-6, torch.finfo(dtype).eps / 4)


def test_chosen_tokens_alone_can_be_asked_for() -> None:
    student, _, head, ids = inputs(torch.float32)
    rows = torch.tensor([3, 17, 40])
    chosen = token_loss(student[0, rows - 1], ids[0, rows], head)
    torch.testing.assert_close(chosen, cross_entropy(linear(student[0, rows - 1], head), ids[0, rows]))


def test_no_more_logits_than_one_chunk_exist_forward_or_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = rows_of_logits(monkeypatch)
    student, teacher, head, _ = inputs(torch.float32)
    loss = logits_kl(student, teacher, head)
    assert max(seen) == 32
    assert sum(seen) == 2 * 2 * WINDOW, "student and teacher, once each"
    torch.autograd.backward(loss)
    assert sum(seen) == 2 * 2 * WINDOW, "backward has what it needs"


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def of_row_counts(counts: range, hidden: Tensor, head: Tensor, ids: Tensor) -> None:
    """Both losses of so many first rows each, forward and backward."""
    for count in counts:
        rows = hidden[:count].detach().requires_grad_()
        torch.autograd.backward(token_loss(rows, ids[:count], head) + logits_kl(rows[None], hidden[None, :count], head))


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
@pytest.mark.usefixtures("way")
def test_other_counts_of_rows_compile_nothing_more() -> None:
    student, _, head, ids = inputs(torch.float32)
    of_row_counts(range(34, 64, 3), student.detach()[0], head, ids[0])
    assert compiled_graphs() == 4, "two losses, of a whole chunk and of any other"


def test_a_machine_that_cannot_compile_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fresh_compiler: None
) -> None:
    def cannot(*_: Any, **__: Any) -> Callable[..., Any]:
        def call(*_: Tensor) -> None:
            raise RuntimeError("Failed to find C compiler.")

        return call

    student, teacher, head, ids = inputs(torch.float32)
    expected = both(logits_kl, student, teacher, head), both(lm_loss, student, ids, head)
    monkeypatch.setattr(torch, "compile", cannot)
    monkeypatch.setattr(vocabulary, "_can_compile", True)
    monkeypatch.setattr(vocabulary, "_compiles", lambda _: vocabulary._can_compile)
    with caplog.at_level(logging.WARNING, "restore.vocabulary"):
        found = both(logits_kl, student, teacher, head), both(lm_loss, student, ids, head)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (record,) = caplog.records
    assert "Failed to find C compiler" in record.getMessage()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.usefixtures("fresh_compiler")
def test_a_gpus_losses_are_float64s_at_the_memory_of_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, channels, words, chunk = 16_384, 576, 49_152, 1024
    monkeypatch.setattr(vocabulary, "LOGIT_ROWS", chunk)
    draw = torch.Generator("cuda").manual_seed(0)
    teacher, noise = (torch.randn(1, rows, channels, device="cuda", generator=draw) for _ in range(2))
    student = (teacher + 0.1 * noise).bfloat16().requires_grad_()
    teacher = teacher.bfloat16()
    head = (3 * channels**-0.5 * torch.randn(words, channels, device="cuda", generator=draw)).bfloat16()
    ids = torch.randint(words, (1, rows), device="cuda", generator=draw)
    exact_head = head.double()

    def truth(of_kl: float, of_lm: float) -> tuple[Tensor, Tensor]:
        total, grad = torch.zeros((), device="cuda", dtype=torch.float64), torch.zeros_like(student, dtype=torch.float64)
        for at in range(0, rows, chunk):
            leaf = student.detach()[:, at : at + chunk].double().requires_grad_()
            readers = leaf[0, : min(chunk, rows - 1 - at)]
            following = ids[0, at + 1 : at + 1 + chunk]
            loss = of_kl * plain_kl(leaf, teacher[:, at : at + chunk].double(), exact_head) * chunk / rows
            loss = loss + of_lm * cross_entropy(linear(readers, exact_head), following, reduction="sum") / (rows - 1)
            grad[:, at : at + chunk] = torch.autograd.grad(loss, leaf)[0]
            total += loss.detach()
        return total, grad

    def ours(of_kl: float, of_lm: float) -> Tensor:
        if of_kl and of_lm:
            return logits_kl_and_lm(student, teacher, ids, head, (of_kl, of_lm))[0]
        return logits_kl(student, teacher, head) if of_kl else lm_loss(student, ids, head)

    # Logits of student and teacher, or of the student, in fp32, and a gradient in bf16; hidden states are little beside them.
    for weights, bytes_each in (((1.0, 0.0), 10), ((0.0, 1.0), 6), ((0.3, 2.0), 10)):
        value, grad = truth(*weights)
        torch.autograd.grad(ours(*weights), student)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = ours(*weights)
        (found,) = torch.autograd.grad(loss, student)
        assert torch.cuda.max_memory_allocated() - before < 1.2 * bytes_each * chunk * words
        assert (loss - value).abs() < 1e-3 * value.abs()
        assert (found - grad).norm() < 5e-3 * grad.norm()
    assert vocabulary._can_compile
    seen = compiled_graphs()
    of_row_counts(range(1100, 2048, 100), student.detach()[0], head, ids[0])
    assert compiled_graphs() <= seen + 2
