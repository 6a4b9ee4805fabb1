"""One set of weights, two faces: the teacher reads with native RoPE and no adapter, the student with scaled RoPE and adapters.

Shapes: B batch, T tokens, C hidden channels.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from restore.adapters import Adapters
from restore.config import RestoreConfig
from restore.mlp import fuse as fuse_mlps
from restore.mlp import unread
from restore.norms import fuse as fuse_norms
from restore.recompute import KeptRows, Outputs, Present, recomputed
from restore.relations import Relations, Sink, Taken, hook
from restore.rope import RopePlan
from restore.rotation import fuse as fuse_rotations

if TYPE_CHECKING:
    from restore.sharding import Shards

# From one layer's (student, teacher) relations to named losses, each a scalar.
RelationLoss = Callable[[Relations, Relations], dict[str, Tensor]]
# Is shown a layer's number and the hidden states it gives: the student's, the teacher's.
See = Callable[[int, Tensor, Tensor], None]
# Cosines and sines of every position: [B or 1, T, D] each.
Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kept:
    """How many layers keep their work until backward instead of doing it again: in a distillation, in a long window.

    After them, so many keep what attention returned to the student, and do all else again.
    """

    distilling: int = 0
    reading: int = 0
    distilling_attention: int = 0
    reading_attention: int = 0


class TwoFaced:
    """A causal language model that is teacher and student at once."""

    kept = Kept()

    def __init__(self, model: PreTrainedModel, plan: RopePlan, config: RestoreConfig, shards: "Shards | None" = None) -> None:
        """Hook the model's attention, fuse what is around its products, attach adapters and build both rotary tables.

        The tables are made by transformers' own module.
        `shards` are the model's layers where their weights are spread over several processes.
        """
        self.model, self.shards = model, shards
        self.adapters = Adapters(model, config)
        hook(model)
        for fuse in (fuse_norms, fuse_mlps, fuse_rotations):
            fuse(model)
        model.train(False)
        rotary, config_class = type(model.model.rotary_emb), type(model.config)
        base = model.config.to_dict()
        self.rotary = {
            "teacher": rotary(config_class.from_dict(plan.native_config(base))).to(model.device),
            "student": rotary(config_class.from_dict(plan.target_config(base))).to(model.device),
        }
        for face in self.rotary.values():
            # Its short and its long list are one (rope.py), so there is nothing to choose by the positions of each batch, for
            # which transformers waits for the GPU, and which a forecast without data (forecast.py) cannot know.
            face.rope_type = "default" if face.rope_type == "longrope" else face.rope_type
        model.model.rotary_emb = self.rotary["student"]

    def let_go(self) -> None:
        """Free the frozen weights. The adapters keep what they learnt, on the CPU; nothing can be read any more."""
        self.adapters.leave()
        del self.model, self.rotary

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
        """Final hidden states of the student, one checkpoint a layer that is not kept: [B, T, C]."""
        hidden = self._embed(ids_BT)
        rope = self.rotary["student"](hidden, self._positions(ids_BT, positions_BT))
        for number, layer in enumerate(self.layers):
            reading = _Reading(layer, rope, number < self.kept.reading + self.kept.reading_attention)
            hidden = (
                reading(hidden, None, None, False)
                if number < self.kept.reading
                else recomputed(reading, hidden, None, self.adapters.of_layer(number), self._present(number))
            )[0]
        return self._norm(hidden)

    def pair(
        self,
        ids_BT: Tensor,
        relation_loss: RelationLoss | None = None,
        student_positions_BT: Tensor | None = None,
        see: See = lambda _number, _student, _teacher: None,
    ) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
        """Teacher and student read the same tokens together, layer by layer.

        Each layer's relations are compared inside that layer's checkpoint, so they never outlive it: what stays until
        backward is one hidden state of each face a layer, and the work of those that are `kept`.

        Args:
            ids_BT: token ids, T at most the native window.
            relation_loss: compares a layer's relations; None compares none.
            student_positions_BT: positions the student reads at, where they differ from 0..T-1.
            see: is shown what each layer gives, [B, T, C] of the student and of the teacher.

        Returns:
            Final hidden states of the student and of the teacher, [B, T, C] each, and each layer's losses.
        """
        student = teacher = self._embed(ids_BT)
        ropes = (
            self.rotary["student"](student, self._positions(ids_BT, student_positions_BT)),
            self.rotary["teacher"](teacher, self._positions(ids_BT, None)),
        )
        losses: list[dict[str, Tensor]] = []
        for number, layer in enumerate(self.layers):
            attends_once = number < self.kept.distilling + self.kept.distilling_attention
            comparing = _Comparing(layer, ropes, relation_loss, self._frozen, attends_once)
            student, values, native = (
                comparing(student, teacher, None, False)
                if number < self.kept.distilling
                else recomputed(comparing, student, teacher, self.adapters.of_layer(number), self._present(number))
            )
            losses.append(dict(zip(comparing.names, values, strict=True)) if values is not None else {})
            assert native is not None, "the first pass gives the teacher's hidden states"
            teacher = native
            see(number, student, teacher)
        with self._frozen():
            teacher = self._norm(teacher)
        return self._norm(student), teacher, losses

    def _present(self, number: int) -> Present:
        """What makes the weights of layer `number` be there."""
        return partial(self.shards.whole, number) if self.shards else lambda _again: nullcontext()

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Compute as the untouched model does: no gradient, no adapter."""
        with torch.no_grad(), self.adapters.disabled():
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


@dataclass(frozen=True)
class _Reading:
    """A layer that the student alone reads."""

    layer: nn.Module
    rope: Rope
    attends_once: bool

    def __call__(self, student_BTC: Tensor, _teacher: Tensor | None, rows: KeptRows | None, again: bool) -> Outputs:
        with unread(self.layer) if again else nullcontext():
            return _run_layer(self.layer, student_BTC, self.rope, rows=rows if self.attends_once else None), None, None


@dataclass
class _Comparing:
    """A layer that both faces read, and whose relations are compared."""

    layer: nn.Module
    ropes: tuple[Rope, Rope]
    relation_loss: RelationLoss | None
    frozen: Callable[[], AbstractContextManager[None]]
    attends_once: bool
    names: tuple[str, ...] = ()
    """Of the losses, once it has run."""

    def __call__(self, student_BTC: Tensor, teacher_BTC: Tensor | None, rows: KeptRows | None, again: bool) -> Outputs:
        assert teacher_BTC is not None, "both faces read"
        student_rope, teacher_rope = self.ropes
        attention = rows if self.attends_once else None
        if self.relation_loss is None:
            with self.frozen():
                teacher = None if again else _run_layer(self.layer, teacher_BTC, teacher_rope)
            with unread(self.layer) if again else nullcontext():
                return _run_layer(self.layer, student_BTC, student_rope, rows=attention), None, teacher
        native, own = Sink(), Sink()
        with self.frozen():
            if again:
                teacher = None
                _attend(self.layer, teacher_BTC, teacher_rope, native)
            else:
                teacher = _run_layer(self.layer, teacher_BTC, teacher_rope, native)
        with unread(self.layer) if again else nullcontext():
            student = _run_layer(self.layer, student_BTC, student_rope, own, attention)
        with rows.around() if rows else nullcontext():
            losses = self.relation_loss(own.taken, native.taken)
        self.names = tuple(losses)
        return student, torch.stack(list(losses.values())), teacher


def _run_layer(
    layer: nn.Module, hidden_BTC: Tensor, rope: Rope, sink: Sink | None = None, rows: KeptRows | None = None
) -> Tensor:
    """`sink` takes the layer's relations, `rows` what attention returns."""
    # Its forward, not the module: FSDP's hooks on it would gather and free weights by an idea of their own.
    output = layer.forward(
        hidden_BTC,
        attention_mask=None,
        position_embeddings=rope,
        relation_sink=sink,
        attending=rows.around if rows else nullcontext,
    )
    assert isinstance(output, Tensor)
    return output


def _attend(layer: nn.Module, hidden_BTC: Tensor, rope: Rope, sink: Sink) -> None:
    """A layer's relations from its input alone: norm and projections, without attention and MLP."""
    sink.attends = False
    normed = layer.input_layernorm(hidden_BTC)  # type: ignore[operator]
    with suppress(Taken):
        layer.self_attn(normed, position_embeddings=rope, attention_mask=None, relation_sink=sink)  # type: ignore[operator]
