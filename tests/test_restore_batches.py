"""What a step reads: each window once, jumps and facts where they were asked for, the same for every process and resume."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ard_serve.errors import DataError
from restore.batches import Ahead, Batch, Batches, _cut
from restore.config import RestoreConfig
from restore.data import TokenStream
from restore.loading import load_tokenizer
from restore.plan import plan_steps
from restore.retrieval import Weaver
from restore.rope import plan_rope

BASE = {"vocab_size": 259, "model_type": "llama", "max_position_embeddings": 128, "hidden_size": 64, "num_attention_heads": 4}
STREAM = TokenStream(np.arange(20_000, dtype=np.int32) % 251, 1)


def batches(weaver: Weaver | None = None, **values: Any) -> Batches:
    fields = {"model": "m", "target_length": 512, "data": ("x",), "out": "o", "window": 64, "batch_tokens": 1024, **values}
    config = RestoreConfig.model_validate(fields)
    rope = plan_rope(BASE, config.target_length)
    return Batches(plan_steps(config, rope), config, STREAM, rope.target_length, weaver, at_once=4)


def rows(found: list[Batch]) -> list[tuple[int, ...]]:
    return sorted(tuple(row.tolist()) for batch in found for row in batch.ids_BT)


@pytest.mark.parametrize(("recipe", "share"), [("default", 0.5), ("distill", 0.5), ("linearard", 0.0), ("longred", 0.0)])
def test_only_recipes_of_our_own_cut_windows_unless_told(recipe: str, share: float) -> None:
    made = batches(recipe=recipe, window=128, long_window=512)
    found = [batch for step in range(4) for batch in made.of_step(step, range(len(made.lengths(step)))) if not batch.is_long]
    assert sum(batch.share for batch in found if batch.ids_BT.shape[1] < 128) == pytest.approx(4 * share)
    told = batches(recipe=recipe, window=128, long_window=512, cut_share=0)
    assert all(batch.ids_BT.shape[1] in (128, 512) for batch in told.of_step(0, range(len(told.lengths(0)))))


def test_shares_of_each_kind_make_a_whole_and_processes_share_the_same_windows() -> None:
    made = batches(jump_share=0.25, long_window=512)
    count = len(made.lengths(3))
    assert made.lengths(3) == [512] + [64] * 8
    whole = list(made.of_step(3, range(count)))
    for is_long in (False, True):
        assert sum(batch.share for batch in whole if batch.is_long is is_long) == pytest.approx(1)
    apart = [*made.of_step(3, range(0, count, 2)), *made.of_step(3, range(1, count, 2))]
    assert rows(apart) == rows(whole)


def test_the_share_that_jumps_does_and_alone() -> None:
    made = batches(jump_share=0.25, long_window=512)
    found = [batch for step in range(4) for batch in made.of_step(step, range(9)) if not batch.is_long]
    jumped = [batch for batch in found if batch.jumps is not None]
    assert len(jumped) == 0.25 * 4 * 8
    assert all(len(batch.ids_BT) == 1 for batch in jumped)
    places = {tuple(batch.jumps.positions_BT[0].tolist()) for batch in jumped if batch.jumps}
    assert len(places) == len(jumped), "each window jumps elsewhere"
    assert not any(batch.jumps for batch in batches().of_step(0, range(9)))


def test_a_share_is_cut_into_short_texts_of_many_lengths() -> None:
    made = batches(jump_share=0.25, cut_share=0.5, window=128, long_window=512)
    found = [batch for step in range(16) for batch in made.of_step(step, range(5)) if not batch.is_long]
    assert sum(batch.share for batch in found) == pytest.approx(16)
    cut = [batch for batch in found if batch.ids_BT.shape[1] < 128]
    assert (len(cut), sum(batch.jumps is not None for batch in found)) == (16, 16)
    assert {tuple(batch.ids_BT.shape) for batch in cut} == {(4, 64)}, "two windows in one pass, of two texts each"
    whole = batches(window=128, long_window=512, cut_share=0)
    rows_of = {tuple(row.tolist()) for step in range(16) for batch in whole.of_step(step, range(5)) for row in batch.ids_BT}
    texts = [tuple(window.tolist()) for batch in cut for window in batch.ids_BT.view(2, 128)]
    assert all(text in rows_of for text in texts), "the same text, in pieces"
    lengths = {int(_cut(torch.arange(8192)[None], (0, number)).shape[1]) for number in range(40)}
    assert lengths == {64, 128, 256, 512, 1024}
    with pytest.raises(ValueError, match=r"jump_share \+ cut_share = 1.25"):
        batches(jump_share=0.75, cut_share=0.5)


def test_facts_are_woven_into_long_windows_alone(make_checkpoint: Callable[..., Path]) -> None:
    weaver = Weaver(load_tokenizer(make_checkpoint("llama3")), spacing=500)
    made = batches(weaver, objectives={"logits": 1.0, "retrieval": 1.0}, long_window=512)
    found = list(made.of_step(0, range(9)))
    for batch in found:
        assert (batch.answers_N is not None) == batch.is_long
    (long,) = (batch for batch in found if batch.is_long)
    assert long.answers_N is not None
    assert long.ids_BT.shape == (1, 512)
    (again,) = (batch for batch in made.of_step(0, [0]) if batch.is_long)
    assert torch.equal(again.ids_BT, long.ids_BT)


def test_a_steps_batches_are_made_by_another_thread_while_the_step_before_runs() -> None:
    makers: dict[int, str] = {}
    second = threading.Event()

    def make(step: int) -> list[Batch]:
        makers[step] = threading.current_thread().name
        if step == 1:
            second.set()
        if step == 7:
            raise DataError("step 7")
        return [Batch(torch.tensor([[step]]), 1.0)]

    def read(ahead: Ahead, step: int) -> int:
        (batch,) = ahead.of_step(step)
        return int(batch.ids_BT)

    ahead = Ahead(make, steps=3)
    assert read(ahead, 0) == 0
    assert second.wait(10), "nobody asked for step 1"
    assert [read(ahead, step) for step in (1, 2)] == [1, 2]
    here = threading.current_thread().name
    assert makers[0] == here != makers[1] == makers[2]
    assert makers.keys() == {0, 1, 2}, "there is no step 3"
    resumed = Ahead(make, steps=9)
    assert [read(resumed, step) for step in (5, 6)] == [5, 6]
    resumed.wait()
    with pytest.raises(DataError, match="step 7"):
        resumed.of_step(7)
