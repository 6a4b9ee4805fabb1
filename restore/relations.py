"""Per-layer queries, keys and values out of an unchanged transformers model.

The only file that touches transformers' attention hook. The hooked function hands its inputs to whoever is capturing and
then runs the stock SDPA attention, so that results stay those of the untouched model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "ard_relations"


@dataclass(frozen=True)
class Relations:
    """What one attention function received, after RoPE.

    B batch, H query heads, G key/value heads (G divides H), T tokens, D channels of a head.
    """

    query_BHTD: Tensor
    key_BGTD: Tensor
    value_BGTD: Tensor

    def detach(self) -> "Relations":
        return Relations(self.query_BHTD.detach(), self.key_BGTD.detach(), self.value_BGTD.detach())


@dataclass
class _Sink:
    relations: Relations | None = None
    skip_attention: bool = False


_sink: ContextVar[_Sink | None] = ContextVar("relation_sink", default=None)


def hook(model: PreTrainedModel) -> None:
    """Route the model's attention through this file."""
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


@contextmanager
def capture(skip_attention: bool = False) -> Iterator[_Sink]:
    """Capture the relations of the one attention layer that runs inside.

    Args:
        skip_attention: return zeros instead of attending, for a caller that wants the relations alone.
    """
    sink = _Sink(skip_attention=skip_attention)
    token = _sink.set(sink)
    try:
        yield sink
    finally:
        _sink.reset(token)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    sink = _sink.get()
    if sink is not None:
        sink.relations = Relations(query, key, value)
        if sink.skip_attention:
            return torch.zeros_like(query).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
