"""What the student is taught: relations and logits of its native self, and text itself on long windows.

Shapes: B batch, H query heads, G key/value heads, T tokens, D head channels, C hidden channels, V vocabulary.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear
from torch.utils.checkpoint import checkpoint

from restore.kernels import cross_relation_kl, self_relation_kl
from restore.model import TwoFaced
from restore.relations import Relations

# Rows of logits that exist at once: 1024 rows of a 128K vocabulary in fp32 are 0.5 GiB.
LOGIT_ROWS = 1024


def self_relation(student: Relations, teacher: Relations, scale: float | None = None) -> Tensor:
    """LinearARD's loss (arXiv 2604.00004): KL of the Q/Q, K/K and V/V relation rows, summed.

    Each is a mean over the heads that exist, so that K and V count in full under grouped-query attention.
    """
    return (
        self_relation_kl(student.query_BHTD, teacher.query_BHTD, scale=scale)
        + self_relation_kl(student.key_BGTD, teacher.key_BGTD, scale=scale)
        + self_relation_kl(student.value_BGTD, teacher.value_BGTD, scale=scale)
    )


def attention(student: Relations, teacher: Relations) -> Tensor:
    """KL of the attention rows themselves: softmax of Q K^T, which self-relations do not identify."""
    return cross_relation_kl(student.query_BHTD, student.key_BGTD, teacher.query_BHTD, teacher.key_BGTD)


_RELATION_OBJECTIVES: dict[str, Callable[[Relations, Relations], Tensor]] = {
    "self_relation": self_relation,
    "attention": attention,
}


def logits_kl(student_BTC: Tensor, teacher_BTC: Tensor, head_VC: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student) of the next-token distributions, a chunk of rows at a time: scalar fp32."""

    def chunk(student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        teacher_NV = linear(teacher_NC, head_VC).float().log_softmax(-1)
        student_NV = linear(student_NC, head_VC).float().log_softmax(-1)
        return kl_div(student_NV, teacher_NV, log_target=True, reduction="sum")

    return _mean_over_rows(chunk, student_BTC.flatten(0, 1), teacher_BTC.flatten(0, 1))


def lm_loss(hidden_BTC: Tensor, ids_BT: Tensor, head_VC: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats, a chunk of rows at a time: scalar fp32."""

    def chunk(hidden_NC: Tensor, next_N: Tensor) -> Tensor:
        return cross_entropy(linear(hidden_NC, head_VC).float(), next_N, reduction="sum")

    return _mean_over_rows(chunk, hidden_BTC[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def _mean_over_rows(chunk: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    # Each chunk is checkpointed: its logits live only while it is computed, forward and again in backward.
    total = first.new_zeros((), dtype=torch.float32)
    for at in range(0, len(first), LOGIT_ROWS):
        rows = slice(at, at + LOGIT_ROWS)
        total = total + checkpoint(chunk, first[rows], second[rows], use_reentrant=False)
    return total / len(first)


class Losses:
    """The objectives of a run with their weights, computed on one window."""

    def __init__(self, faces: TwoFaced, weights: Mapping[str, float]) -> None:
        self._faces, self._weights = faces, weights
        self._relations = {name: loss for name, loss in _RELATION_OBJECTIVES.items() if name in weights}

    @property
    def compares_relations(self) -> bool:
        return bool(self._relations)

    def distil(
        self, ids_BT: Tensor, student_positions_BT: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Every teacher-student objective on one window.

        Returns:
            The weighted sum (scalar), each objective's own value, and the relation KL of each layer ([layers], weighted
            sum of the relation objectives) or None when no relation is compared.
        """
        relation_loss = self._compare if self._relations else None
        student, teacher, layers = self._faces.pair(ids_BT, relation_loss, student_positions_BT)
        parts = {name: torch.stack([layer[name] for layer in layers]).mean() for name in self._relations}
        if "logits" in self._weights:
            parts["logits"] = logits_kl(student, teacher, self._faces.head_weight_VC)
        layer_kl = torch.stack([self._weigh(layer).detach() for layer in layers]) if self._relations else None
        return self._weigh(parts), parts, layer_kl

    def language_model(self, ids_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The lm objective on one long window, student only: weighted loss and its own value."""
        parts: dict[str, Tensor] = {"lm": lm_loss(self._faces.student(ids_BT), ids_BT, self._faces.head_weight_VC)}
        return self._weigh(parts), parts

    def _compare(self, student: Relations, teacher: Relations) -> dict[str, Tensor]:
        return {name: loss(student, teacher) for name, loss in self._relations.items()}

    def _weigh(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self._weights[name] * value for name, value in parts.items()]).sum()
