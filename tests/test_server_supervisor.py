"""The supervisor gives up on an engine that does not come back, however long each of its starts takes."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest

from ard_serve.errors import EngineDiedError
from server import supervisor
from server.config import ServeConfig
from server.engine import EngineSpec
from server.health import Health
from server.supervisor import Supervisor
from server.watch import Watch


class StubEngine:
    async def wait(self) -> int:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def stop(self, grace_s: float) -> None:
        pass

    def reason(self) -> str:
        return "loading shard 3 of 9"


class StubWatch:
    """An engine that is ready in its first `lives` and hangs afterwards."""

    def __init__(self, lives: int) -> None:
        self.name, self.health, self.metrics, self.upstream = "0", Health(), MagicMock(), None
        self.lives, self.runs = lives, 0

    async def run(self) -> str:
        self.runs += 1
        assert self.runs < 50, "it is started for ever"
        if self.runs <= self.lives:
            self.health.ready()
            return "no answer"
        return "not loaded within 9 s"

    def down(self, problem: str) -> None:
        self.health.down(problem)


def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, watch: StubWatch, **fields: float) -> Supervisor:
    async def start(_spec: EngineSpec) -> StubEngine:
        return StubEngine()

    monkeypatch.setattr(supervisor, "Engine", SimpleNamespace(start=start))
    monkeypatch.setattr(supervisor, "_RESTART_WINDOW_S", 0)  # each start takes longer than the window
    config = ServeConfig.model_validate({"model": tmp_path, "max_restarts": 2, "restart_backoff_s": 0.001, **fields})
    return Supervisor(config, EngineSpec((), {}, tmp_path / "socket"), cast(Watch, cast(Any, watch)))


@pytest.mark.fault("S4")
async def test_starts_that_outlast_the_window_of_restarts_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watch = StubWatch(lives=5)
    with pytest.raises(EngineDiedError, match=r"limit is 2 restarts.*not loaded within 9 s"):
        await make(monkeypatch, tmp_path, watch).run()
    assert watch.runs == 5 + 2  # deaths of an engine that had been ready are forgotten, all others count


@pytest.mark.fault("S4")
async def test_an_engine_that_never_loads_is_given_up_with_the_end_of_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(
        EngineDiedError, match="never became ready: not loaded within 9 s; last in its log: loading shard 3 of 9"
    ):
        await make(monkeypatch, tmp_path, StubWatch(lives=0)).run()


@pytest.mark.fault("S4")
async def test_the_pause_before_a_restart_grows_to_a_minute_and_no_further(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    supervised = make(monkeypatch, tmp_path, StubWatch(lives=1), max_restarts=12, restart_backoff_s=1)
    monkeypatch.setattr(supervisor, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    with pytest.raises(EngineDiedError, match="limit is 12 restarts"):
        await supervised.run()
    assert pauses == [1, 2, 4, 8, 16, 32] + [60] * 6
