"""Per-layer queries, keys and values out of an unchanged transformers model.

The only file that touches transformers' attention hook. The hooked function hands its inputs to the sink that the
layer was called with, if any, and then runs the stock SDPA attention, so that results stay those of the untouched model; inside
`attending`, if the layer was called with that.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
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


class Taken(Exception):  # noqa: N818 - no error: it ends a forward whose rest nobody wants
    """The relations are in the sink, and the sink wanted nothing else."""


@dataclass
class Sink:
    """Takes the relations of the attention call that it is handed to, as `relation_sink`.

    `attends` false: the call raises `Taken` instead of attending, for a caller that wants the relations alone.
    """

    attends: bool = True
    relations: Relations | None = None

    @property
    def taken(self) -> Relations:
        assert self.relations is not None, "every decoder layer attends once"
        return self.relations


def hook(model: PreTrainedModel) -> None:
    """Route the model's attention through this file."""
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def is_cuda_fp32(query: Tensor) -> bool:
    """Whether shared key heads would leave PyTorch the attention that makes [T, T]: the only other one for fp32 takes none."""
    return query.is_cuda and query.dtype == torch.float32


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    relation_sink: Sink | None = None,
    attending: Callable[[], AbstractContextManager[None]] = nullcontext,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if relation_sink is not None:
        relation_sink.relations = Relations(query, key, value)
        if not relation_sink.attends:
            raise Taken
    stands_for: Any = module
    if attention_mask is None and key.shape[1] != query.shape[1] and is_cuda_fp32(query):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        stands_for = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # says nothing of groups any more
    with attending():
        return sdpa_attention_forward(stands_for, query, key, value, attention_mask, **kwargs)
