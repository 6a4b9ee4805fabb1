"""Log-likelihoods and greedy continuations of a causal LM, without ever holding logits for every token.

Shapes: B batch, T tokens, C hidden channels, N rows that are scored, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from ard_serve.console import progress
from restore.evaluation.batches import cut
from restore.evaluation.generation import generate
from restore.evaluation.packing import Ids, Pack, collate, pack
from restore.evaluation.reader import Likelihood, Request

# Least and most tokens of a row that several sequences share. Longer ones share more, but each token's attention passes over
# its whole row, on the CPU for a third of the time at 1,024. Twice the longest sequence came out best on the short suite.
_ROW_TOKENS = (256, 2048)
# Rows of float32 logits alive at once: 256 x 150,000 entries are 150 MB.
_HEAD_ROWS = 256


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
        for batch in cut(rows, len, self.batch_tokens):
            ids_BT = torch.tensor([list(row) for row in batch])
            for ids_T, hidden_TC in zip(ids_BT, hidden_states(self.model, ids_BT), strict=True):
                found.append(token_log_probs(self.model, hidden_TC[at.to(hidden_TC.device) - 1], ids_T[at])[0].double())
            advance(ids_BT.numel())
        return torch.stack(found).numpy()

    def continue_greedily(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, advance: Callable[[int], None]
    ) -> list[list[int]]:
        written: list[list[int]] = []
        for batch in cut(prompts, len, self.batch_tokens):
            ids_BT = torch.tensor([list(prompt) for prompt in batch])
            written += continue_greedily(self.model, ids_BT, new_tokens).tolist()
            advance(ids_BT.numel())
        return written

    def generate(
        self,
        prompts: Sequence[str],
        stops: Sequence[str],
        new_tokens: int,
        tokenizer: PreTrainedTokenizerBase,
        description: str,
    ) -> list[str]:
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        texts: dict[int, str] = {}
        with progress(description, len(rows)) as bar:
            for index, text in generate(self.model, tokenizer, rows, stops, new_tokens, self.batch_tokens):
                texts[index] = text
                bar.advance()
        return [texts[index] for index in range(len(rows))]


def hidden_states(
    model: PreTrainedModel, ids_BT: Tensor, positions_BT: Tensor | None = None, mask_B1TT: Tensor | None = None
) -> Tensor:
    """Final hidden states [B, T, C] of tokens on the CPU.

    Without positions and a mask (True where seen) attention is causal, so that padding on the right changes nothing before it.
    """
    where = {"position_ids": positions_BT, "attention_mask": mask_B1TT}
    given = {name: tensor.to(model.device) for name, tensor in where.items() if tensor is not None}
    hidden: Tensor = model.model(input_ids=ids_BT.to(model.device), use_cache=False, **given).last_hidden_state
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
    """Score every request, in batches of at most `batch_tokens` padded tokens; what requests share is read once."""
    readers: dict[Ids, list[int]] = {}
    for index, request in enumerate(requests):
        readers.setdefault(request.context + request.continuation[:-1], []).append(index)
    results: dict[int, Likelihood] = {}
    packs = sorted(pack(list(readers), _capacity(model, max(map(len, readers), default=0))), key=len, reverse=True)
    # Apart, so that a long sequence alone in its row is read without a mask.
    alone, shared = ([one for one in packs if (len(one.paths) == 1) is single] for single in (True, False))
    with progress(description, len(requests)) as bar:
        for batch in (*cut(alone, len, batch_tokens), *cut(shared, len, batch_tokens)):
            places = [
                (row, path, index) for row, one in enumerate(batch) for ids, path in one.paths.items() for index in readers[ids]
            ]
            spans = [(row, path, requests[index].continuation) for row, path, index in places]
            results.update(zip((index for *_, index in places), _score_batch(model, batch, spans), strict=True))
            bar.advance(len(places))
    return [results[index] for index in range(len(requests))]


def _capacity(model: PreTrainedModel, longest: int) -> int:
    """Tokens of a row that sequences of at most `longest` share: none where the attention takes no mask of its own."""
    if model.config._attn_implementation != "sdpa":
        return 0
    least, most = _ROW_TOKENS
    # Our mask replaces the model's: rows end before its window begins to slide.
    return min(max(2 * longest, least), most, getattr(model.config, "sliding_window", None) or most)


def _score_batch(
    model: PreTrainedModel, packs: Sequence[Pack], spans: Sequence[tuple[int, np.ndarray, Ids]]
) -> list[Likelihood]:
    """Score each span (row, path of the sequence, continuation): a path's last hidden states predict its continuation."""
    ids_BT, positions_BT, mask_B1TT = collate(packs)
    hidden_BTC = hidden_states(model, ids_BT, positions_BT, mask_B1TT)
    hidden_NC = torch.cat([hidden_BTC[row, path[len(path) - len(span) :]] for row, path, span in spans])
    targets_N = torch.tensor([token for *_, span in spans for token in span])
    log_probs_N, greedy_N = token_log_probs(model, hidden_NC, targets_N)
    sizes = [len(span) for *_, span in spans]
    return [
        Likelihood(float(log_probs.double().sum()), bool(greedy.all()))
        for log_probs, greedy in zip(torch.split(log_probs_N, sizes), torch.split(greedy_N, sizes), strict=True)
    ]


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
