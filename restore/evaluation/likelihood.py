"""Log-likelihoods and greedy continuations of a causal LM, without ever holding logits for every token.

Shapes: B batch, T tokens, C hidden channels, N rows that are scored, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ard_serve.console import progress

# Rows of float32 logits alive at once: 256 x 150,000 entries are 150 MB.
_HEAD_ROWS = 256


@dataclass(frozen=True)
class Request:
    """How likely is `continuation` after `context`? Both are token ids; the context holds at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """Summed log-probability of a continuation in nats, and whether greedy decoding would have written it."""

    log_prob: float
    is_greedy: bool


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
        for batch in _batches(sorted(readers, key=lambda row: (-len(row), row)), batch_tokens):
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


def _batches(rows: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Cut rows, longest first, into batches whose padded size stays within `batch_tokens`; one row at least."""
    batch: list[tuple[int, ...]] = []
    for row in rows:
        if batch and len(batch[0]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
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
