"""KL divergence between attention-relation rows, exact and linear in memory."""

from restore.kernels.relation_kl import cross_relation_kl, self_relation_kl

__all__ = ["cross_relation_kl", "self_relation_kl"]
