"""Row S22 of the record, which on a GPU may start two engines at once, tried here with scripted ones."""

from pathlib import Path
from typing import Any

import pytest
import real_rows_engine
from helpers_server import FAKE_ENGINE, Gateway, gateways, write_model
from real_scene import Scene

DIES, COMPUTES_NANS = {"exit": 1, "last_words": "a token out of the vocabulary"}, {"corrupted": 1}


def scene_of(start: Any, folder: Path, default: dict[str, Any], older: dict[str, Any]) -> Scene:
    def begin(environment: dict[str, str], engine_args: tuple[str, ...], **fields: Any) -> Gateway:
        gateway: Gateway = start(script=older if environment else default, environment=environment, **fields)
        return gateway

    return Scene(begin, folder, write_model(folder / "model"), FAKE_ENGINE, (), window=512)


@pytest.mark.parametrize("cores_for_two", [1, 1000])
def test_an_engine_that_dies_of_nans_is_tried_with_the_older_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores_for_two: int
) -> None:
    monkeypatch.setattr(real_rows_engine, "_CORES_FOR_TWO_ENGINES", cores_for_two)
    with gateways(tmp_path) as start:
        seen = real_rows_engine.non_finite(scene_of(start, tmp_path, DIES, COMPUTES_NANS))
    assert "default runner: exit code 70" in seen
    assert "a token out of the vocabulary" in seen
    assert "ard_engine_non_finite 1, 500 non_finite_logits" in seen


def test_the_row_fails_where_no_runner_raises_the_alarm(tmp_path: Path) -> None:
    with gateways(tmp_path) as start, pytest.raises(AssertionError, match="older runner: exit code 70"):
        real_rows_engine.non_finite(scene_of(start, tmp_path, DIES, DIES))
