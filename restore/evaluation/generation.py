"""Greedy text after many prompts at once: what all of them begin with is read once, and memory alone limits how many there are.

A step of generation takes a GPU as long for hundreds of rows as for ten. Solved examples before every question are most of a
prompt, and the same in all.

Shapes: B rows, T tokens.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from restore.evaluation.batches import cut

_Layers = list[tuple[Tensor, Tensor]]  # of a cache: keys and values, the batch first

# Of the memory that is free on a GPU; elsewhere a fixed allowance, since what is free in a machine is not one process's.
_CACHE_SHARE, _CACHE_BYTES = 0.25, 2 << 30


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    stops: Sequence[str],
    new_tokens: int,
    batch_tokens: int,
) -> Iterator[tuple[int, str]]:
    """The number of each row and the text after it, longest rows first.

    Args:
        model: a causal language model.
        tokenizer: the model's own; its padding or end token fills rows up.
        rows: prompts as token ids.
        stops: strings before which a text ends.
        new_tokens: most tokens of a text.
        batch_tokens: most tokens read in one forward pass.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    cached_tokens = batch_tokens if _slides(model) else max(batch_tokens, _cache_tokens(model))
    for batch in cut(order, lambda index: len(rows[index]) + new_tokens, cached_tokens):
        yield from zip(batch, _write(model, tokenizer, [rows[i] for i in batch], stops, new_tokens, batch_tokens), strict=True)


def _slides(model: PreTrainedModel) -> bool:
    """Whether caches drop what left a sliding window: they cannot be joined, and padding inside a row would push text out."""
    return bool(getattr(model.config, "sliding_window", None))


def _cache_tokens(model: PreTrainedModel) -> int:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    free_bytes = _CACHE_SHARE * torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else _CACHE_BYTES
    return int(free_bytes // token_bytes)


@torch.inference_mode()
def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    stops: Sequence[str],
    new_tokens: int,
    batch_tokens: int,
) -> list[str]:
    padding: int = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    longest = max(map(len, rows))
    shared = 0 if _slides(model) else _alike(rows)
    fill = [longest - len(row) for row in rows]
    ids_BT = torch.tensor([row[:shared] + [padding] * n + row[shared:] for row, n in zip(rows, fill, strict=True)])
    mask_BT = torch.tensor([[1] * shared + [0] * n + [1] * (longest - shared - n) for n in fill])
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
    written_BT = model.generate(  # type: ignore[operator]
        input_ids=ids_BT,
        attention_mask=mask_BT,
        past_key_values=None if _slides(model) else _read(model, ids_BT, mask_BT, shared, batch_tokens),
        do_sample=False,
        max_new_tokens=new_tokens,
        stop_strings=list(stops) or None,
        tokenizer=tokenizer,
        pad_token_id=padding,
    )
    texts = tokenizer.batch_decode(written_BT[:, longest:], skip_special_tokens=True)
    return [min((text.split(stop)[0] for stop in stops), key=len, default=text) for text in texts]


def _alike(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with, the last of each left out: something must be left to be read."""
    first, last = min(rows), max(rows)
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return min(alike, min(map(len, rows)) - 1)


def _read(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, shared: int, batch_tokens: int) -> DynamicCache:
    """The cache after all tokens but each row's last; its first `shared` tokens are read once."""
    beginning = DynamicCache(config=model.config)
    if shared:
        model.model(input_ids=ids_BT[:1, :shared], past_key_values=beginning, use_cache=True)
    width = ids_BT.shape[1] - 1 - shared
    if not width:
        return _joined(model, [_tensors(beginning)] * len(ids_BT))
    positions_BT = mask_BT.cumsum(-1) - 1
    parts = []
    for rows in torch.split(torch.arange(len(ids_BT), device=ids_BT.device), max(1, batch_tokens // width)):
        cache = _joined(model, [_tensors(beginning)] * len(rows))
        where = {"attention_mask": mask_BT[rows, :-1], "position_ids": positions_BT[rows, shared:-1]}
        model.model(input_ids=ids_BT[rows, shared:-1], past_key_values=cache, use_cache=True, **where)
        parts.append(_tensors(cache))
    return _joined(model, parts)


def _tensors(cache: DynamicCache) -> _Layers:
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers if layer.is_initialized]


def _joined(model: PreTrainedModel, parts: Sequence[_Layers]) -> DynamicCache:
    """One cache of the rows of several."""
    layers = [tuple(torch.cat(side) for side in zip(*layer, strict=True)) for layer in zip(*parts, strict=True)]
    return DynamicCache(layers, config=model.config)
