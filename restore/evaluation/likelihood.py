"""Log-likelihoods and greedy continuations of a causal LM, without ever holding logits for every token.

Shapes: B batch, T tokens, C hidden channels, N rows that are scored, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from ard_serve.console import progress
from restore.evaluation.reader import Likelihood, Request

# Rows of float32 logits alive at once: 256 x 150,000 entries are 150 MB.
_HEAD_ROWS = 256
_T = TypeVar("_T")


@dataclass(frozen=True)
class Loaded:
    """A `Reader` of a model in this process; one forward pass reads at most `batch_tokens`, a longer row runs alone."""

    model: PreTrainedModel
    batch_tokens: int

    def score(self, requests: Sequence[Request], description: str) -> list[Likelihood]:
        return score(self.model, requests, self.batch_tokens, description)

    @torch.inference_mode()
    def log_probs(self, rows: Sequence[Sequence[int]], positions: Sequence[int], advance: Callable[[int], None]) -> np.ndarray:
        at = torch.tensor(positions)
        found = []
        for batch in _batches(rows, len, self.batch_tokens):
            ids_BT = torch.tensor([list(row) for row in batch])
            for ids_T, hidden_TC in zip(ids_BT, hidden_states(self.model, ids_BT), strict=True):
                found.append(token_log_probs(self.model, hidden_TC[at.to(hidden_TC.device) - 1], ids_T[at])[0].double())
            advance(ids_BT.numel())
        return torch.stack(found).numpy()

    def continue_greedily(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        batches = _batches(prompts, len, self.batch_tokens)
        return [
            row
            for batch in batches
            for row in continue_greedily(self.model, torch.tensor([list(prompt) for prompt in batch]), new_tokens).tolist()
        ]

    def generate(
        self,
        prompts: Sequence[str],
        stops: Sequence[str],
        new_tokens: int,
        tokenizer: PreTrainedTokenizerBase,
        description: str,
    ) -> list[str]:
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        texts: dict[int, str] = {}
        with progress(description, len(rows)) as bar:
            for batch in _batches(order, lambda index: len(rows[index]) + new_tokens, self.batch_tokens):
                written = _generate(self.model, [rows[index] for index in batch], stops, new_tokens, tokenizer)
                texts.update(zip(batch, written, strict=True))
                bar.advance(len(batch))
        return [texts[index] for index in range(len(rows))]


def hidden_states(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, C] of tokens on the CPU; causal, so padding on the right changes nothing before it."""
    hidden: Tensor = model.model(input_ids=ids_BT.to(model.device), use_cache=False).last_hidden_state
    return hidden


def token_log_probs(model: PreTrainedModel, hidden_NC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability [N] (float32, CPU) of each target and whether it is the argmax [N]."""
    log_probs, greedy = [], []
    for hidden, targets in zip(
        torch.split(hidden_NC, _HEAD_ROWS), torch.split(targets_N.to(hidden_NC.device), _HEAD_ROWS), strict=True
    ):
        logits_NV = model.lm_head(hidden).float()
        chosen_N = logits_NV.gather(-1, targets[:, None])[:, 0]
        log_probs.append((chosen_N - logits_NV.logsumexp(-1)).cpu())
        greedy.append((logits_NV.argmax(-1) == targets).cpu())
    return torch.cat(log_probs), torch.cat(greedy)


@torch.inference_mode()
def score(model: PreTrainedModel, requests: Sequence[Request], batch_tokens: int, description: str) -> list[Likelihood]:
    """Score every request, longest first, in batches of at most `batch_tokens` padded tokens.

    Requests that read the same tokens, such as the letters of one multiple-choice question, share one row.
    """
    readers: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        readers.setdefault(request.context + request.continuation[:-1], []).append(index)
    results: dict[int, Likelihood] = {}
    with progress(description, len(requests)) as bar:
        for batch in _batches(sorted(readers, key=lambda row: (-len(row), row)), len, batch_tokens):
            places = [(place, index) for place, row in enumerate(batch) for index in readers[row]]
            spans = [(place, requests[index].continuation) for place, index in places]
            scored = _score_batch(model, batch, spans)
            results.update(zip((index for _, index in places), scored, strict=True))
            bar.advance(len(places))
    return [results[index] for index in range(len(requests))]


def _score_batch(
    model: PreTrainedModel, rows: Sequence[tuple[int, ...]], spans: Sequence[tuple[int, tuple[int, ...]]]
) -> list[Likelihood]:
    """Score each span (row, continuation): a row's last hidden states predict its continuation."""
    ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    hidden_BTC = hidden_states(model, ids_BT)
    hidden_NC = torch.cat([hidden_BTC[row, len(rows[row]) - len(span) : len(rows[row])] for row, span in spans])
    targets_N = torch.tensor([token for _, span in spans for token in span])
    log_probs_N, greedy_N = token_log_probs(model, hidden_NC, targets_N)
    sizes = [len(span) for _, span in spans]
    return [
        Likelihood(float(log_probs.double().sum()), bool(greedy.all()))
        for log_probs, greedy in zip(torch.split(log_probs_N, sizes), torch.split(greedy_N, sizes), strict=True)
    ]


def _batches(items: Sequence[_T], size: Callable[[_T], int], batch_tokens: int) -> Iterator[list[_T]]:
    """Cut items, longest first, into batches whose padded size stays within `batch_tokens`; one item at least."""
    batch: list[_T] = []
    for item in items:
        if batch and size(batch[0]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@torch.inference_mode()
def continue_greedily(model: PreTrainedModel, ids_BT: Tensor, new_tokens: int) -> Tensor:
    """The `new_tokens` most likely tokens after each row of equally long prompts: [B, new_tokens], on the CPU."""
    cache = DynamicCache(config=model.config)
    step_BT, written = ids_BT.to(model.device), []
    for _ in range(new_tokens):
        output = model.model(input_ids=step_BT, past_key_values=cache, use_cache=True)
        step_BT = model.lm_head(output.last_hidden_state[:, -1]).float().argmax(-1, keepdim=True)
        written.append(step_BT.cpu())
    return torch.cat(written, dim=1)


@torch.inference_mode()
def _generate(
    model: PreTrainedModel, rows: Sequence[list[int]], stops: Sequence[str], new_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Text after each row, which stand padded on the left; the mask sets their positions right."""
    longest = max(map(len, rows))
    padding: int = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    written = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=model.device),
        attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device),
        do_sample=False,
        max_new_tokens=new_tokens,
        stop_strings=list(stops) or None,
        tokenizer=tokenizer,
        pad_token_id=padding,
    )
    texts = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    return [min((text.split(stop)[0] for stop in stops), key=len, default=text) for text in texts]
