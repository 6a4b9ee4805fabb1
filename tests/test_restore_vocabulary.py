"""Losses over the vocabulary in chunks: values and gradients of plain PyTorch, and memory that does not grow with the rows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear

from restore import vocabulary
from restore.vocabulary import lm_loss, logits_kl, logits_kl_and_lm, token_loss

WINDOW, CHANNELS, VOCABULARY = 70, 24, 130


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one short."""
    monkeypatch.setattr(vocabulary, "LOGIT_ROWS", 32)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
    log_probs = vocabulary._log_probs

    def counted(hidden: Tensor, head: Tensor) -> Tensor:
        seen.append(len(hidden))
        return log_probs(hidden, head)

    monkeypatch.setattr(vocabulary, "_log_probs", counted)
    return seen


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
