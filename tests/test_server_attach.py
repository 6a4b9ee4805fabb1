"""`ard serve --attach`: an engine that somebody else runs is watched, used through the gateway, and never stopped."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_server import (
    ENGINE_KEY,
    FAKE_ENGINE,
    Gateway,
    StartGateway,
    complete,
    free_port,
    gateways,
    running_engine,
    wait_for,
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartGateway]:
    with gateways(tmp_path) as start:
        yield start


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def attach(start: StartGateway, port: int) -> Callable[..., Gateway]:
    def attach(**fields: Any) -> Gateway:
        return start(environment={"ARD_ENGINE_KEY": ENGINE_KEY}, attach=f"http://127.0.0.1:{port}", **fields)

    return attach


def test_an_attached_engine_serves_and_outlives_the_gateway(attach: Callable[..., Gateway], port: int, tmp_path: Path) -> None:
    with running_engine(FAKE_ENGINE, port, tmp_path / "log") as process:
        gateway = attach().until_ready()
        assert complete(gateway, stream=True).text.rstrip().endswith("data: [DONE]")
        assert gateway.metric("ard_kv_capacity_tokens") == 64 * 16
        assert gateway.stop() == 0
        assert process.poll() is None


@pytest.mark.fault("S4")
def test_requests_wait_for_an_attached_engine_that_comes_back(
    attach: Callable[..., Gateway], port: int, tmp_path: Path
) -> None:
    gateway = attach(hang_timeout_s=1)
    assert gateway.status("/readyz") == 503
    with running_engine(FAKE_ENGINE, port, tmp_path / "log"):
        gateway.until_ready()
        with_death = threading.Thread(target=complete, args=(gateway,), kwargs={"script": {"end": "die"}})
        with_death.start()
    with_death.join()
    wait_for(lambda: gateway.status("/readyz") == 503)
    with running_engine(FAKE_ENGINE, port, tmp_path / "log"):
        gateway.until_ready()
        assert complete(gateway).status_code == 200
    assert gateway.process.poll() is None


@pytest.mark.parametrize(
    ("fields", "script", "says"),
    [
        ({"served_model_name": "other"}, "{}", "serves 'tiny', not 'other'; use --served-model-name"),
        ({}, '{"window": 256}', "use --max-model-len 256"),
        ({"engine_args": ["--enforce-eager"]}, "{}", "--enforce-eager after --"),
    ],
)
def test_an_engine_that_does_not_fit_is_exit_2(
    attach: Callable[..., Gateway], port: int, tmp_path: Path, fields: dict[str, Any], script: str, says: str
) -> None:
    with running_engine(FAKE_ENGINE, port, tmp_path / "log", script):
        gateway = attach(**fields)
        assert gateway.wait() == 2
    assert says in gateway.stderr.splitlines()[-1]


def test_a_wrong_engine_key_is_exit_2_and_not_shown(start: StartGateway, port: int, tmp_path: Path) -> None:
    with running_engine(FAKE_ENGINE, port, tmp_path / "log"):
        gateway = start(environment={"ARD_ENGINE_KEY": "mistyped"}, attach=f"http://127.0.0.1:{port}")
        assert gateway.wait() == 2
    assert "$ARD_ENGINE_KEY" in gateway.stderr
    assert "mistyped" not in gateway.stderr
