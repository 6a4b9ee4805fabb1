"""Each objective is its formula, computed here a second time in float64 from two models that are loaded apart."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from restore.config import RECIPES, RestoreConfig
from restore.inspection import transformers_config
from restore.loading import load
from restore.model import TwoFaced
from restore.objectives import Losses, hidden_layers
from restore.positions import Jumps
from restore.rope import RopePlan, plan_rope

IDS = (torch.arange(3, 67)[None] * 7) % 251
Captured = list[tuple[Tensor, Tensor, Tensor]]


class Pair:
    """A tiny model as teacher and stretched student: ours, and two plain ones whose Q, K and V are looked at."""

    def __init__(self, folder: Path) -> None:
        base = json.loads((folder / "config.json").read_text())
        self.plan: RopePlan = plan_rope(base, 512, "linear")
        config = RestoreConfig(model="m", target_length=512, data=("x",), out=Path("o"), rank=4, rope_type="linear")
        self.faces = TwoFaced(load(folder, torch.float32), self.plan, config)
        self._folder, self._base = folder, base

    def plain(self, native: bool, positions_BT: Tensor | None = None) -> tuple[Captured, list[Tensor]]:
        """Q, K, V after RoPE of every layer and all hidden states, float64, by eager transformers."""
        written = self.plan.native_config(self._base) if native else self.plan.target_config(self._base)
        config = transformers_config(written)
        model = AutoModelForCausalLM.from_pretrained(self._folder, config=config, dtype=torch.float64)
        captured: Captured = []

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
        ) -> tuple[Tensor, None]:
            captured.append((query, key, value))
            groups = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
            return (rows(query, key) @ value).transpose(1, 2), None

        from transformers import AttentionInterface

        AttentionInterface.register("objectives_test", attend)
        model.set_attn_implementation("objectives_test")
        with torch.no_grad():
            hidden = model(IDS, position_ids=positions_BT, output_hidden_states=True).hidden_states
        return captured, list(hidden)


def rows(query: Tensor, key: Tensor, chunks: list[int] | None = None) -> Tensor:
    """Causal softmax of scaled products, within chunks where they are given."""
    scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
    tokens = torch.arange(scores.shape[2])
    allowed = tokens[:, None] >= tokens
    if chunks is not None:
        of = torch.bucketize(tokens, torch.tensor(chunks[1:-1]), right=True)
        allowed &= of[:, None] == of
    weights: Tensor = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return weights


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over rows and heads of KL(teacher || student)."""
    rows_kl: Tensor = torch.special.xlogy(teacher, teacher / student.clamp(min=1e-300)).sum(-1)
    return rows_kl.mean()


@pytest.fixture(scope="module")
def pair(make_checkpoint: Callable[..., Path]) -> Pair:
    return Pair(make_checkpoint("llama3"))


def test_linearard_is_the_papers_loss(pair: Pair) -> None:
    """(1/L) sum over layers of KL_Q + KL_K + KL_V, each a mean over the heads that exist (arXiv 2604.00004)."""
    assert RECIPES["linearard"] == {"self_relation": 1.0}
    teacher, student = (pair.plain(native)[0] for native in (True, False))
    layers = [zip(t, s, strict=True) for t, s in zip(teacher, student, strict=True)]
    expected = sum(kl(rows(t, t), rows(s, s)) for layer in layers for t, s in layer)
    loss, parts, _ = Losses(pair.faces, {"self_relation": 1.0}).distil(IDS)
    assert parts.keys() == {"self_relation"}
    assert loss.item() == pytest.approx(float(expected) / len(teacher), rel=1e-4)


def test_attention_is_the_kl_of_attention_rows(pair: Pair) -> None:
    teacher, student = (pair.plain(native)[0] for native in (True, False))
    expected = [kl(rows(*grouped(*t)), rows(*grouped(*s))) for t, s in zip(teacher, student, strict=True)]
    loss, _, layers = Losses(pair.faces, {"attention": 2.0}).distil(IDS)
    assert layers is not None
    assert layers.tolist() == pytest.approx([2 * float(value) for value in expected], rel=1e-4)
    assert loss.item() == pytest.approx(2 * float(sum(expected)) / len(expected), rel=1e-4)


def grouped(query: Tensor, key: Tensor, _value: Tensor) -> tuple[Tensor, Tensor]:
    return query, key.repeat_interleave(query.shape[1] // key.shape[1], 1)


def test_layer_weights_weigh_the_layers(pair: Pair) -> None:
    losses = Losses(pair.faces, {"attention": 1.0})
    _, _, layers = losses.distil(IDS)
    assert layers is not None
    losses.layer_weights = torch.tensor([0.5, 3.0])
    assert losses.distil(IDS)[0].item() == pytest.approx(float(0.5 * layers[0] + 3 * layers[1]) / 2)


def test_with_jumps_relations_are_compared_within_chunks_and_logits_everywhere(pair: Pair) -> None:
    positions_BT = torch.cat([torch.arange(20), torch.arange(100, 124), torch.arange(400, 420)])[None]
    chunks = [0, 20, 44, 64]
    (teacher, teacher_hidden), (student, student_hidden) = pair.plain(True), pair.plain(False, positions_BT)
    losses = Losses(pair.faces, {"attention": 1.0, "self_relation": 1.0, "logits": 1.0})
    jumped = Jumps(positions_BT, torch.tensor(chunks, dtype=torch.int32))
    _, parts, _ = losses.distil(IDS, jumped)
    cut = [(rows(*grouped(*t), chunks), rows(*grouped(*s), chunks)) for t, s in zip(teacher, student, strict=True)]
    assert parts["attention"].item() == pytest.approx(float(sum(kl(t, s) for t, s in cut)) / 2, rel=1e-4)
    head_VC = pair.faces.head_weight_VC.double()
    logits = [(hidden[-1] @ head_VC.T).softmax(-1)[:, None] for hidden in (teacher_hidden, student_hidden)]
    assert parts["logits"].item() == pytest.approx(float(kl(*logits)), rel=1e-4)
    assert not torch.allclose(losses.distil(IDS)[1]["self_relation"], parts["self_relation"])


def test_hidden_is_the_cosine_distance_of_six_layers_and_with_jumps_of_the_last(pair: Pair) -> None:
    teacher, student = (pair.plain(native)[1] for native in (True, False))
    apart = [1 - torch.cosine_similarity(s, t, dim=-1).mean() for s, t in zip(student, teacher, strict=True)][1:]
    losses = Losses(pair.faces, {"hidden": 1.0})
    loss, _, layers = losses.distil(IDS)
    assert layers is None
    assert loss.item() == pytest.approx(float(sum(apart)), rel=1e-4)
    jumps = Jumps(torch.arange(64)[None], torch.tensor([0, 64], dtype=torch.int32))
    assert losses.distil(IDS, jumps)[0].item() == pytest.approx(float(apart[-1]), rel=1e-4)
    assert hidden_layers(30) == {4, 9, 14, 19, 24, 29}
    assert hidden_layers(2) == {0, 1}


def test_short_lm_is_the_next_token_loss_of_what_is_distilled(pair: Pair) -> None:
    _, hidden = pair.plain(False)
    log_probs = (hidden[-1] @ pair.faces.head_weight_VC.double().T).log_softmax(-1)[0]
    expected = -log_probs[torch.arange(63), IDS[0, 1:]].mean()
    loss, parts, _ = Losses(pair.faces, {"logits": 1.0, "short_lm": 0.5}).distil(IDS)
    assert parts["short_lm"].item() == pytest.approx(float(expected), rel=1e-4)
    assert loss.item() == pytest.approx(float(parts["logits"] + 0.5 * expected), rel=1e-4)


def test_retrieval_is_the_lm_loss_on_the_answers_alone(pair: Pair) -> None:
    _, hidden = pair.plain(False)
    log_probs = (hidden[-1] @ pair.faces.head_weight_VC.double().T).log_softmax(-1)[0]
    answers_N = torch.tensor([9, 10, 40])
    expected = -log_probs[answers_N - 1, IDS[0, answers_N]].mean()
    whole = -log_probs[torch.arange(63), IDS[0, 1:]].mean()
    loss, parts = Losses(pair.faces, {"lm": 1.0, "retrieval": 0.5}).language_model(IDS, answers_N)
    assert parts["retrieval"].item() == pytest.approx(float(expected), rel=1e-4)
    assert parts["lm"].item() == pytest.approx(float(whole), rel=1e-4)
    assert loss.item() == pytest.approx(float(whole + 0.5 * expected), rel=1e-4)
    torch.autograd.backward(loss)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in pair.faces.adapters.parameters())
