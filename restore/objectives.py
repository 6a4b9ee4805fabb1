"""What the student is taught: relations and logits of its native self, and text itself on long windows.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head channels, C hidden channels, V vocabulary.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint

from restore.batches import Batch
from restore.kernels import cross_relation_kl, self_relation_kl
from restore.model import TwoFaced
from restore.positions import Jumps
from restore.relations import Relations
from restore.vocabulary import lm_loss, logits_kl, logits_kl_and_lm, token_loss

# As many layers' hidden states as LongReD compares.
_HIDDEN_LAYERS = 6


def self_relation(
    student: Relations, teacher: Relations, scale: float | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """LinearARD's loss (arXiv 2604.00004): KL of the Q/Q, K/K and V/V relation rows, summed.

    Each is a mean over the heads that exist, so that K and V count in full under grouped-query attention.
    `cu_seqlens`: compare within these chunks of the window only, as `restore.kernels` takes them.
    """
    return (
        self_relation_kl(student.query_BHTD, teacher.query_BHTD, scale=scale, cu_seqlens=cu_seqlens)
        + self_relation_kl(student.key_BGTD, teacher.key_BGTD, scale=scale, cu_seqlens=cu_seqlens)
        + self_relation_kl(student.value_BGTD, teacher.value_BGTD, scale=scale, cu_seqlens=cu_seqlens)
    )


def attention(student: Relations, teacher: Relations, cu_seqlens: Tensor | None = None) -> Tensor:
    """KL of the attention rows themselves: softmax of Q K^T, which self-relations do not identify."""
    return cross_relation_kl(student.query_BHTD, student.key_BGTD, teacher.query_BHTD, teacher.key_BGTD, cu_seqlens=cu_seqlens)


_RELATION_OBJECTIVES: dict[str, Callable[..., Tensor]] = {"self_relation": self_relation, "attention": attention}


def hidden_distance(student_BTC: Tensor, teacher_BTC: Tensor) -> Tensor:
    """1 - cosine similarity of hidden states, mean over tokens: LongReD's measure (arXiv 2502.07365). Scalar fp32."""
    return 1 - cosine_similarity(student_BTC.float(), teacher_BTC.float(), dim=-1).mean()


def hidden_layers(layers: int) -> set[int]:
    """The layers whose hidden states are compared: six, evenly spaced, the last among them.

    LongReD picks its six by how far attention has moved; evenly spaced ones need no look at the model first.
    """
    count = min(_HIDDEN_LAYERS, layers)
    return {round((number + 1) * layers / count) - 1 for number in range(count)}


class Losses:
    """The objectives of a run with their weights, computed on one batch.

    `layer_weights` ([layers], mean of about 1) weigh the layers in the relation objectives; None weighs all alike.
    """

    layer_weights: Tensor | None = None

    def __init__(self, faces: TwoFaced, weights: Mapping[str, float]) -> None:
        self._faces, self._weights = faces, weights
        self._relations = {name: loss for name, loss in _RELATION_OBJECTIVES.items() if name in weights}
        self._hidden_layers = hidden_layers(len(faces.layers)) if "hidden" in weights else set()

    @property
    def compares_relations(self) -> bool:
        return bool(self._relations)

    def of(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Every objective of one batch; returns what `distil` does."""
        if not batch.is_long:
            return self.distil(batch.ids_BT, batch.jumps)
        return (*self.language_model(batch.ids_BT, batch.answers_N), None)

    def distil(self, ids_BT: Tensor, jumps: Jumps | None = None) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Every objective on windows of the native length.

        Where the student reads with jumps, only what they leave alone is compared: relations within a chunk, and of the
        hidden states the last, from which the next token is predicted.

        Returns:
            The weighted sum (scalar), each objective's own value, and the relation KL of each layer ([layers], weighted
            sum of the relation objectives) or None when no relation is compared.
        """
        moved: list[Tensor] = []

        def compare(student: Relations, teacher: Relations) -> dict[str, Tensor]:
            chunks = None if jumps is None else jumps.cu_seqlens
            return {name: loss(student, teacher, cu_seqlens=chunks) for name, loss in self._relations.items()}

        def see(number: int, student_BTC: Tensor, teacher_BTC: Tensor) -> None:
            if jumps is None and number in self._hidden_layers and number < len(self._faces.layers) - 1:
                moved.append(checkpoint(hidden_distance, student_BTC, teacher_BTC, use_reentrant=False))

        positions_BT = None if jumps is None else jumps.positions_BT
        student, teacher, layers = self._faces.pair(ids_BT, compare if self._relations else None, positions_BT, see)
        parts = {name: self._over_layers(torch.stack([layer[name] for layer in layers])) for name in self._relations}
        if "hidden" in self._weights:
            last = checkpoint(hidden_distance, student, teacher, use_reentrant=False)
            parts["hidden"] = torch.stack([*moved, last]).sum()
        layer_kl = torch.stack([self._weigh(layer).detach() for layer in layers]) if self._relations else None
        weighed, next_tokens = self._next_tokens(student, teacher, ids_BT)
        return torch.stack([*self._weighed(parts), *weighed]).sum(), parts | next_tokens, layer_kl

    def _next_tokens(self, student_BTC: Tensor, teacher_BTC: Tensor, ids_BT: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What next tokens teach: weighted losses, and each objective's own value. Two share the student's logits."""
        head_VC, of_kl, of_lm = self._faces.head_weight_VC, self._weights.get("logits"), self._weights.get("short_lm")
        if of_kl and of_lm:
            loss, kl, lm = logits_kl_and_lm(student_BTC, teacher_BTC, ids_BT, head_VC, (of_kl, of_lm))
            return [loss], {"logits": kl, "short_lm": lm}
        parts: dict[str, Tensor] = {}
        if of_kl:
            parts["logits"] = logits_kl(student_BTC, teacher_BTC, head_VC)
        if of_lm:
            parts["short_lm"] = lm_loss(student_BTC, ids_BT, head_VC)
        return self._weighed(parts), parts

    def language_model(self, ids_BT: Tensor, answers_N: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """What the student learns alone on one long window: weighted loss and each objective's own value.

        Args:
            ids_BT: token ids, one window.
            answers_N: places of answers in it, for the objective `retrieval`: the lm loss on them alone.
        """
        hidden_BTC, head_VC = self._faces.student(ids_BT), self._faces.head_weight_VC
        parts: dict[str, Tensor] = {}
        if "lm" in self._weights:
            parts["lm"] = lm_loss(hidden_BTC, ids_BT, head_VC)
        if "retrieval" in self._weights and answers_N is not None:
            parts["retrieval"] = token_loss(hidden_BTC[0, answers_N - 1], ids_BT[0, answers_N], head_VC)
        return self._weigh(parts), parts

    def _over_layers(self, values_L: Tensor) -> Tensor:
        return values_L.mean() if self.layer_weights is None else (values_L * self.layer_weights).mean()

    def _weigh(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.stack(self._weighed(parts)).sum()

    def _weighed(self, parts: Mapping[str, Tensor]) -> list[Tensor]:
        return [self._weights[name] * value for name, value in parts.items()]
