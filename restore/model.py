"""One set of weights, two faces: the teacher reads with native RoPE and no adapter, the student with scaled RoPE and adapters.

Shapes: B batch, T tokens, C hidden channels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

import restore.kernels  # noqa: F401 - registers torch.ops.ard
from restore.adapters import Adapters
from restore.config import RestoreConfig
from restore.relations import Relations, capture, hook
from restore.rope import RopePlan

# From one layer's (student, teacher) relations to named losses, each a scalar.
RelationLoss = Callable[[Relations, Relations], dict[str, Tensor]]


class TwoFaced:
    """A causal language model that is teacher and student at once."""

    def __init__(self, model: PreTrainedModel, plan: RopePlan, config: RestoreConfig) -> None:
        """Hook the model's attention, attach adapters and build both rotary tables with transformers' own module."""
        self.model = model
        self.adapters = Adapters(model, config)
        hook(model)
        model.train(False)
        rotary, config_class = type(model.model.rotary_emb), type(model.config)
        base = model.config.to_dict()
        self.rotary = {
            "teacher": rotary(config_class.from_dict(plan.native_config(base))).to(model.device),
            "student": rotary(config_class.from_dict(plan.target_config(base))).to(model.device),
        }
        model.model.rotary_emb = self.rotary["student"]

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.model.model.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def head_weight_VC(self) -> Tensor:
        """[vocabulary, C] weight of the output head; no supported architecture gives it a bias."""
        weight = self.model.lm_head.weight
        assert isinstance(weight, Tensor)
        return weight

    @contextmanager
    def as_teacher(self) -> Iterator[PreTrainedModel]:
        """The untouched model, for a plain transformers forward; outside, the model is the student."""
        self.model.model.rotary_emb = self.rotary["teacher"]
        try:
            with self.adapters.disabled():
                yield self.model
        finally:
            self.model.model.rotary_emb = self.rotary["student"]

    def student(self, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Final hidden states of the student, one checkpoint a layer: [B, T, C]."""
        hidden = self._embed(ids_BT)
        rope = self.rotary["student"](hidden, self._positions(ids_BT, positions_BT))
        for layer in self.layers:
            hidden = checkpoint(_run_layer, layer, hidden, rope, use_reentrant=False)
        return self._norm(hidden)

    def pair(
        self, ids_BT: Tensor, relation_loss: RelationLoss | None = None, student_positions_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
        """Teacher and student read the same tokens together, layer by layer.

        Each layer's relations are compared inside that layer's checkpoint, so they never outlive it: what stays until
        backward is one hidden state of each face a layer.

        Args:
            ids_BT: token ids, T at most the native window.
            relation_loss: compares a layer's relations; None compares none.
            student_positions_BT: positions the student reads at, where they differ from 0..T-1.

        Returns:
            Final hidden states of the student and of the teacher, [B, T, C] each, and each layer's losses.
        """
        student = teacher = self._embed(ids_BT)
        teacher_rope = self.rotary["teacher"](teacher, self._positions(ids_BT, None))
        student_rope = self.rotary["student"](student, self._positions(ids_BT, student_positions_BT))
        losses: list[dict[str, Tensor]] = []

        def compare(number: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            layer = self.layers[number]
            if relation_loss is None:
                return _run_layer(layer, student, student_rope), {}
            with self._frozen(number):
                native = _relations_of(layer, teacher, teacher_rope)
            with capture() as sink:
                student = _run_layer(layer, student, student_rope)
            assert sink.relations is not None, "every decoder layer attends once"
            return student, relation_loss(sink.relations, native)

        for number, layer in enumerate(self.layers):
            student, loss = checkpoint(compare, number, student, teacher, use_reentrant=False, context_fn=_KEEP_ROWS)
            losses.append(loss)
            with self._frozen(number):
                teacher = _run_layer(layer, teacher, teacher_rope)
        with self._frozen():
            teacher = self._norm(teacher)
        return self._norm(student), teacher, losses

    @contextmanager
    def _frozen(self, layer: int | None = None) -> Iterator[None]:
        """Compute as the untouched model does: no gradient, no adapter, no autocast."""
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False), self.adapters.disabled(layer):
            yield

    def _embed(self, ids_BT: Tensor) -> Tensor:
        hidden: Tensor = self.model.get_input_embeddings()(ids_BT)
        return hidden

    def _norm(self, hidden_BTC: Tensor) -> Tensor:
        hidden: Tensor = self.model.model.norm(hidden_BTC)
        return hidden

    @staticmethod
    def _positions(ids_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
        return positions_BT if positions_BT is not None else torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]


def _keep_rows(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep what a relation kernel returns, a few numbers a row, so that backward does not run its forward again."""
    return CheckpointPolicy.MUST_SAVE if operation in _RELATION_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE


_RELATION_OPERATIONS = (torch.ops.ard.self_relation_kl.default, torch.ops.ard.cross_relation_kl.default)
_KEEP_ROWS = partial(create_selective_checkpoint_contexts, _keep_rows)


def _run_layer(layer: nn.Module, hidden_BTC: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    output = layer(hidden_BTC, attention_mask=None, position_embeddings=rope)
    assert isinstance(output, Tensor)
    return output


def _relations_of(layer: nn.Module, hidden_BTC: Tensor, rope: tuple[Tensor, Tensor]) -> Relations:
    """A layer's relations from its input alone: norm and projections, without attention and MLP."""
    with capture(skip_attention=True) as sink:
        layer.self_attn(layer.input_layernorm(hidden_BTC), position_embeddings=rope, attention_mask=None)  # type: ignore[operator]
    assert sink.relations is not None, "every decoder layer attends once"
    return sink.relations
