"""What sequences share is read once, and every one scores and continues as if it had been read by itself."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from restore import loading
from restore.evaluation import likelihood
from restore.evaluation.likelihood import Loaded
from restore.evaluation.packing import collate, pack
from restore.evaluation.reader import Request

FAMILIES = ("llama3", "qwen3", "mistral")


def branching(seed: int = 0) -> list[Request]:
    """Questions of several lengths behind two beginnings, with choices of several lengths, some beginning alike."""
    draw = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 90) for _ in range(count))

    contexts = [beginning + ids(draw.randrange(1, 9)) for beginning in (ids(12), ids(20)) for _ in range(6)]
    stems = [(context, ids(2)) for context in contexts]
    return [Request(context, stem[: draw.randrange(3)] + ids(draw.randrange(1, 7))) for context, stem in stems for _ in "abcd"]


@torch.no_grad()
def alone(model: PreTrainedModel, request: Request) -> tuple[float, bool]:
    logits = model(torch.tensor([request.context + request.continuation])).logits
    rows = logits[0, len(request.context) - 1 : -1].log_softmax(-1)
    targets = torch.tensor(request.continuation)
    return float(rows.gather(-1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_packed_sequences_score_as_each_does_alone(
    make_checkpoint: Callable[..., Path], family: str, batch_tokens: int
) -> None:
    model = loading.load(make_checkpoint(family, seed=5), torch.float64)
    requests = branching()
    scored = likelihood.score(model, requests, batch_tokens, "test")
    for request, found in zip(requests, scored, strict=True):
        log_prob, greedy = alone(model, request)
        assert found.log_prob == pytest.approx(log_prob, rel=1e-6)
        assert found.is_greedy == greedy


@pytest.mark.parametrize("batch_tokens", [60, 100_000])
def test_a_window_slides_as_it_does_over_each_sequence_alone(make_checkpoint: Callable[..., Path], batch_tokens: int) -> None:
    folder = make_checkpoint("mistral", seed=5, sliding_window=24)
    model, tokenizer = loading.load(folder, torch.float64), loading.load_tokenizer(folder)
    requests = branching()
    sizes = [len(request.context + request.continuation) for request in requests]
    assert min(sizes) < 24 < max(sizes)
    for request, found in zip(requests, likelihood.score(model, requests, batch_tokens, "test"), strict=True):
        assert found.log_prob == pytest.approx(alone(model, request)[0], rel=1e-6)
    prompts = [f"Rain {'and more rain ' * count}fell" for count in range(4)]
    together = Loaded(model, batch_tokens).generate(prompts, (), 7, tokenizer, "test")
    assert together == [_alone(model, tokenizer, prompt, 7) for prompt in prompts]


def test_what_is_shared_is_read_once(make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = loading.load(make_checkpoint("llama3", seed=5), torch.float32)
    read: list[int] = []
    hidden_states = likelihood.hidden_states

    def counting(model: PreTrainedModel, ids_BT: torch.Tensor, *where: torch.Tensor | None) -> torch.Tensor:
        read.append(ids_BT.numel())
        return hidden_states(model, ids_BT, *where)

    monkeypatch.setattr(likelihood, "hidden_states", counting)
    questions = [(*range(3, 43), 50 + n) for n in range(4)]
    scored = likelihood.score(model, [Request(q, (letter,)) for q in questions for letter in (7, 8, 9)], 4096, "letters")
    # Forty tokens before all questions and one of each question; the letters are only predicted.
    assert read == [44]
    assert len({found.log_prob for found in scored}) == 12


def test_attention_that_takes_no_mask_reads_each_sequence_by_itself(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama3", seed=5)
    packed, plain = loading.load(folder, torch.float64), loading.load(folder, torch.float64)
    plain.set_attn_implementation("eager")
    by_packs, by_rows = (likelihood.score(model, branching(1), 300, "test") for model in (packed, plain))
    for one, other in zip(by_packs, by_rows, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, rel=1e-6)


def test_rows_hold_their_capacity_and_a_longer_sequence_is_a_row_of_its_own() -> None:
    sequences = [(1, 2, 3), (1, 2, 4), (1, 2, 4, 5), (9, *range(30)), (8,)]
    packs = pack(sequences, 8)
    assert sorted(path for one in packs for path in one.paths) == sorted(sequences)
    assert [len(one) for one in packs] == [6, 31]
    first = packs[0]
    assert first.tokens == [1, 2, 3, 4, 5, 8]
    assert first.positions == [0, 1, 2, 2, 3, 0]
    seen = first.attends(7)
    assert [seen[place].nonzero()[0].tolist() for place in range(7)] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5], [6]
    ]  # fmt: skip
    _, positions, mask = collate(packs[1:])
    assert positions is None
    assert mask is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [1, 60, 100_000])
@pytest.mark.parametrize("beginning", ["", "Once there lived a cooper who "])
def test_texts_are_those_of_each_prompt_alone_whatever_prompts_begin_with(
    make_checkpoint: Callable[..., Path], family: str, batch_tokens: int, beginning: str
) -> None:
    folder = make_checkpoint(family, seed=5)
    model, tokenizer = loading.load(folder, torch.float64), loading.load_tokenizer(folder)
    prompts = [f"{beginning}{'abcde'[count]}{' mended casks and' * count} one day" for count in range(5)]
    together = Loaded(model, batch_tokens).generate(prompts, (), 7, tokenizer, "test")
    assert together == [_alone(model, tokenizer, prompt, 7) for prompt in prompts]


def test_a_common_beginning_is_read_once(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama3", seed=5)
    model, tokenizer = loading.load(folder, torch.float32), loading.load_tokenizer(folder)
    read: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _module, _args, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    prompts = [f"{'Solved examples stand here. ' * 6}Question {n}" for n in (1, 2, 3)]
    Loaded(model, 4096).generate(prompts, (), 2, tokenizer, "test")
    tokens = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    # All but the last token of each, and then two tokens of three rows; only their ends differ.
    assert sum(read) < tokens[0] + 3 * 12
    assert max(read) < tokens[0]


def _alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    written = model.generate(ids, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)  # type: ignore[operator]
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
