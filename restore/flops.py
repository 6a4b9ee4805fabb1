"""Floating-point operations of a step, from config.json alone: the formula of docs/training.md.

A multiply-add counts 2. Matrix products and attention count, everything else (norms, rotations, softmax) does not.
Shapes: T tokens of a window, C hidden channels, H query heads, G key/value heads, D head channels, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from restore.batches import Batch
from restore.config import RestoreConfig
from restore.plan import Plan, cut_lengths
from restore.rope import head_dim


@dataclass(frozen=True)
class Flops:
    """What some work takes, in FLOPs.

    `model`: forward of both faces, backward of the student. `relations`: KL between relation rows, forward and backward.
    `again`: what backward computes a second time because it was not kept: of every layer all but the last product.
    """

    model: int = 0
    relations: int = 0
    again: int = 0

    @property
    def counted(self) -> int:
        """What rates are stated in: recomputation is our own choice and earns nothing."""
        return self.model + self.relations

    @property
    def executed(self) -> int:
        return self.counted + self.again

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.model + other.model, self.relations + other.relations, self.again + other.again)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.model * times, self.relations * times, self.again * times)

    def __floordiv__(self, parts: int) -> "Flops":
        return Flops(self.model // parts, self.relations // parts, self.again // parts)


@dataclass(frozen=True)
class Counter:
    """Counts FLOPs of windows for one model and one choice of objectives and adapters."""

    base: Mapping[str, Any]
    config: RestoreConfig

    def run(self, plan: Plan) -> Flops:
        """Every step of a run, forward and backward."""
        return self.distilling(plan) + self.reading(plan)

    def distilling(self, plan: Plan) -> Flops:
        """All windows that are distilled; those that are cut, in the mean over the lengths of their texts."""
        windows, lengths = plan.steps * plan.short_windows, cut_lengths(plan.window)
        cut = round(windows * self.config.cut)
        whole = self.distilled(plan.window) * (windows - cut)
        texts = (self.distilled(length) * (plan.window // length) for length in lengths)
        return sum(texts, Flops()) * cut // len(lengths) + whole

    def reading(self, plan: Plan) -> Flops:
        """All long windows."""
        return self.read(plan.long_window) * sum(map(plan.long_in, range(plan.steps)))

    def batch(self, batch: Batch) -> Flops:
        """One forward pass and its backward."""
        texts, tokens = batch.ids_BT.shape
        return (self.read(tokens) if batch.is_long else self.distilled(tokens)) * texts

    def distilled(self, tokens: int, trains: bool = True) -> Flops:
        """A text that both faces read; without backward when it does not train.

        A window that the student reads with jumps compares less than is counted here.
        """
        teacher = self._layers(self._layer(tokens))
        relations = self._layers(self._relations_at(tokens))
        # The student's logits are there once, for all that is learnt from them.
        teachers, students = "logits" in self.config.weights, not {"logits", "short_lm"}.isdisjoint(self.config.weights)
        heads = (teachers + (1 + trains) * students) * self._head(tokens)
        if not trains:
            # Forward is 2 of a relation's 8: two products over half the tiles, against three over all of them.
            return Flops(teacher + heads, relations // 4) + self._student(tokens, trains)
        fronts = self._layers(2 * tokens * self._front()) if relations else 0
        return Flops(teacher + heads, relations, fronts) + self._student(tokens, trains)

    def read(self, tokens: int, trains: bool = True) -> Flops:
        """A long window that the student reads alone; without backward when it does not train."""
        head = ("lm" in self.config.weights) * self._head(tokens)
        return Flops((1 + trains) * head) + self._student(tokens, trains)

    def _student(self, tokens: int, trains: bool) -> Flops:
        """The student's layers.

        Backward costs as much as forward for a frozen weight (the gradient of its input) and twice as much for attention and
        for what learns. The first layer's input needs no gradient; that saving is not counted.
        """
        layer, learnt = self._layer(tokens), 2 * tokens * self._learnt()
        forward = self._layers(layer + learnt)
        if not trains:
            return Flops(forward)
        last = 2 * tokens * int(self.base["hidden_size"]) * int(self.base["intermediate_size"])
        backward = self._layers(layer + self.attention(tokens) + 2 * learnt)
        return Flops(forward + backward, again=forward - self._layers(last))

    def _layers(self, each: int) -> int:
        return int(self.base["num_hidden_layers"]) * each

    def _layer(self, tokens: int) -> int:
        """Forward of a layer as it is in the checkpoint."""
        channels = int(self.base["hidden_size"])
        behind = channels * (self._width("q") + 3 * int(self.base["intermediate_size"]))
        return 2 * tokens * (self._front() + behind) + self.attention(tokens)

    def _front(self) -> int:
        """Multiply-adds a token of the query, key and value projections."""
        return int(self.base["hidden_size"]) * (self._width("q") + 2 * self._width("kv"))

    def attention(self, tokens: int) -> int:
        """Forward of one layer's attention: Q K^T and P V over half the tiles."""
        return 2 * tokens**2 * self._width("q")

    def _relations_at(self, tokens: int) -> int:
        """8 T^2 D a head: docs/kernel.md."""
        weights = self.config.weights
        width = ("attention" in weights) * self._width("q")
        width += ("self_relation" in weights) * (self._width("q") + 2 * self._width("kv"))
        return 8 * tokens**2 * width

    def _learnt(self) -> int:
        """Multiply-adds a token and layer of what learns, forward."""
        channels = int(self.base["hidden_size"])
        total = 0
        for target in self.config.targets:
            width = self._width("q" if target in ("q_proj", "o_proj") else "kv")
            total += self.config.rank * (channels + width) if self.config.trainable == "lora" else channels * width
        return total

    def _head(self, tokens: int) -> int:
        return 2 * tokens * int(self.base["hidden_size"]) * int(self.base["vocab_size"])

    def _width(self, heads: str) -> int:
        count = self.base["num_attention_heads"]
        if heads == "kv":
            count = self.base.get("num_key_value_heads") or count
        return int(count) * head_dim(dict(self.base))
