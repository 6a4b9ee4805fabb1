"""`ard serve --attach`: an engine that somebody else runs is watched, used through the gateway, and never stopped."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers_server import (
    ENGINE_KEY,
    FAKE_ENGINE,
    Gateway,
    StartGateway,
    complete,
    error_of,
    free_port,
    gateways,
    running_engine,
    wait_for,
)

from ard_serve.errors import UsageError
from server.config import ServeConfig
from server.metrics import engine_sample


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
        return start(environment={"ARD_ENGINE_KEY": ENGINE_KEY}, attach=[f"http://127.0.0.1:{port}"], **fields)

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
        gateway = start(environment={"ARD_ENGINE_KEY": "mistyped"}, attach=[f"http://127.0.0.1:{port}"])
        assert gateway.wait() == 2
    assert "$ARD_ENGINE_KEY" in gateway.stderr
    assert "mistyped" not in gateway.stderr


@pytest.mark.fault("S4")
def test_of_two_attached_engines_one_is_lost_and_the_other_goes_on(start: StartGateway, tmp_path: Path) -> None:
    ports, logs = (free_port(), free_port()), (tmp_path / "log0", tmp_path / "log1")
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with running_engine(FAKE_ENGINE, ports[0], logs[0]) as first, running_engine(FAKE_ENGINE, ports[1], logs[1]):
        gateway = start(environment={"ARD_ENGINE_KEY": ENGINE_KEY}, attach=urls).until_ready()
        wait_for(lambda: gateway.metric("ard_ready") == 2, 5)
        assert gateway.metric("ard_kv_capacity_tokens") == 2 * 64 * 16
        with ThreadPoolExecutor() as pool:
            slow = {"tokens": 30, "gap_s": 0.1}
            streams = [pool.submit(complete, gateway, stream=True, max_tokens=500, script=slow) for _ in range(4)]
            wait_for(lambda: gateway.metric("ard_kv_reserved_tokens") == 4 * 512, 5)
            wait_for(lambda: starts(logs[0]) == starts(logs[1]) == 2, 5)
            os.killpg(first.pid, signal.SIGKILL)
            texts = [stream.result().text for stream in streams]
        assert sorted(text.rstrip().endswith("data: [DONE]") for text in texts) == [False, False, True, True]
        assert sum("engine_failed" in text for text in texts) == 2
        assert gateway.status("/readyz") == 200
        assert gateway.metric("ard_ready") == 1
        assert [complete(gateway).status_code for _ in range(5)] == [200] * 5
        assert (starts(logs[0]), starts(logs[1])) == (2, 7)


@pytest.mark.parametrize("script", ['{"window": 256}', '{"model": "other"}'])
def test_a_wrong_engine_that_comes_late_is_kept_out_and_others_go_on(start: StartGateway, tmp_path: Path, script: str) -> None:
    ports, late = (free_port(), free_port()), tmp_path / "late"
    with running_engine(FAKE_ENGINE, ports[0], tmp_path / "first"):
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        gateway = start(environment={"ARD_ENGINE_KEY": ENGINE_KEY}, attach=urls).until_ready()
        with running_engine(FAKE_ENGINE, ports[1], late, script):
            said = f"engine at {urls[1]}: {urls[1]} "
            wait_for(lambda: said in gateway.stderr)
            assert [complete(gateway).status_code for _ in range(5)] == [200] * 5
            assert (gateway.metric("ard_ready"), starts(late)) == (1, 0)
            assert gateway.stderr.count(said) == 1
        with running_engine(FAKE_ENGINE, ports[1], late):
            wait_for(lambda: gateway.metric("ard_ready") == 2)
        assert gateway.stop() == 0


def test_the_metrics_of_two_engines_are_one_valid_scrape(start: StartGateway, tmp_path: Path) -> None:
    ports = (free_port(), free_port())
    with running_engine(FAKE_ENGINE, ports[0], tmp_path / "a"), running_engine(FAKE_ENGINE, ports[1], tmp_path / "b"):
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        gateway = start(environment={"ARD_ENGINE_KEY": ENGINE_KEY}, attach=urls).until_ready()
        wait_for(lambda: gateway.metric("ard_ready") == 2, 5)
        with gateway.client() as client:
            text = client.get("/metrics").text
    samples = engine_sample(text, "vllm:cache_config_info")
    assert [labels["ard_engine"] for labels, _ in samples] == ["0", "1"]
    assert text.count("# TYPE vllm:cache_config_info") <= 1


def starts(log: Path) -> int:
    """Requests that reached an engine."""
    return sum(json.loads(line)["event"] == "start" for line in log.read_text().splitlines())


@pytest.mark.parametrize("url", ["http://127.0.0.1:abc", "http://127.0.0.1:99999", "http://user:secret@127.0.0.1:8000"])
def test_an_address_that_cannot_be_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError, match="attach"):
        ServeConfig.resolve(None, {"model": "tiny", "attach": [url]})


def test_a_plan_ends_at_the_deadline_when_its_engine_hangs(attach: Callable[..., Gateway], port: int, tmp_path: Path) -> None:
    with running_engine(FAKE_ENGINE, port, tmp_path / "engine.jsonl") as engine:
        gateway = attach(request_timeout_s=1).until_ready()
        engine.send_signal(signal.SIGSTOP)
        with gateway.client() as client:
            response = client.post("/v1/plan", json={"prompt": "x" * 1100})
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
