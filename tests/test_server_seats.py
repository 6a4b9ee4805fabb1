"""Seats: no more sequences go to an engine than it computes at once, and what waits, waits in the gateway's own queue."""

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers_server import (
    ENGINE_KEY,
    FAKE_ENGINE,
    PROMPT,
    Gateway,
    StartGateway,
    complete,
    error_of,
    free_port,
    gateways,
    running_engine,
    send,
    wait_for,
)

from server.config import ServeConfig

HANGS = {"end": "hang"}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartGateway]:
    with gateways(tmp_path) as start:
        yield start


def waiting(gateway: Gateway, lane: str = "short") -> float:
    return gateway.metric(f'ard_queue_length{{lane="{lane}"}}')


def started(gateway: Gateway) -> list[int]:
    """Prompt lengths of the requests that have reached the engine, in their order."""
    return [len(json.loads(event["body"])["prompt"]) for event in gateway.engine_events("start")]


@pytest.mark.fault("S8")
def test_a_flood_of_small_requests_leaves_the_server_ready(start: StartGateway) -> None:
    """Memory is there for 64 of them. Inside the engine the canary would wait behind them, and nothing would bound the wait."""
    gateway = start(engine_args=["--max-num-seqs", "4"], queue_size=6, canary_timeout_s=5).until_ready()
    with ExitStack() as flood:
        first, *_ = [flood.enter_context(send(gateway, script=HANGS, max_tokens=8)) for _ in range(3)]
        wait_for(lambda: len(started(gateway)) == 3)
        for _ in range(6):
            flood.enter_context(send(gateway, script=HANGS, max_tokens=8))
        wait_for(lambda: waiting(gateway) == 6)
        assert len(started(gateway)) == 3
        assert (gateway.metric("ard_seats"), gateway.metric("ard_seats_reserved")) == (4, 3)
        answered = gateway.metric("vllm:generation_tokens_total")  # by canaries alone
        while gateway.metric("vllm:generation_tokens_total") < answered + 3:
            assert gateway.status("/readyz") == 200
        refused = complete(gateway)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "server_busy")
        assert plan(gateway)["fits_now"] is False
        first.close()
        wait_for(lambda: len(started(gateway)) == 4)
        assert waiting(gateway) == 5
    wait_for(lambda: gateway.metric("ard_seats_reserved") == gateway.metric("ard_kv_reserved_tokens") == 0)
    assert complete(gateway).status_code == 200
    assert plan(gateway)["fits_now"] is True


def test_who_gets_a_free_seat_is_decided_by_the_lanes(start: StartGateway) -> None:
    """Of the long prompts one is read at a time, so a short one that came after them all is the second to enter."""
    lanes: dict[str, Any] = {"batch_tokens": 128, "long_prompt_tokens": 64}
    gateway = start(engine_args=["--max-num-seqs", "3"], **lanes).until_ready()
    with ExitStack() as flood, ThreadPoolExecutor() as pool:
        inside = [flood.enter_context(send(gateway, script=HANGS, max_tokens=8)) for _ in range(2)]
        wait_for(lambda: len(started(gateway)) == 2)
        for _ in range(3):
            flood.enter_context(send(gateway, script=HANGS, prompt=[1] * 100, max_tokens=8))
        wait_for(lambda: waiting(gateway, "long") == 3)
        short = pool.submit(complete, gateway)
        wait_for(lambda: waiting(gateway) == 1)
        assert len(started(gateway)) == 2
        for connection in inside:
            connection.close()
        assert short.result().status_code == 200
        assert started(gateway) == [len(PROMPT), len(PROMPT), 100, len(PROMPT)]
        assert waiting(gateway, "long") == 2


@pytest.mark.parametrize(
    ("fields", "seats"),
    [({}, None), ({"seats": 7}, 7), ({"seats": 7, "engine_args": ["--max-num-seqs", "9"]}, 9)],
    ids=["by itself", "ours", "the operator's"],
)
def test_an_engine_is_told_the_seats_that_the_ledger_counts(
    start: StartGateway, fields: dict[str, Any], seats: int | None
) -> None:
    gateway = start(**fields).until_ready()
    (arguments,) = [event["arguments"] for event in gateway.engine_events("engine")]
    told = [int(value) for flag, value in itertools.pairwise(arguments) if flag == "--max-num-seqs"]
    assert told[-1] == gateway.metric("ard_seats")
    assert seats in (None, told[-1])


@pytest.mark.parametrize("seats", [None, 3])
def test_seats_of_an_attached_engine_are_those_that_it_is_said_to_have(
    start: StartGateway, tmp_path: Path, seats: int | None
) -> None:
    port = free_port()
    with running_engine(FAKE_ENGINE, port, tmp_path / "log"), ExitStack() as flood:
        address = {"attach": [f"http://127.0.0.1:{port}"], "seats": seats}
        gateway = start(environment={"ARD_ENGINE_KEY": ENGINE_KEY}, **address).until_ready()
        for _ in range(4):
            flood.enter_context(send(gateway, script=HANGS, max_tokens=8))
        wait_for(lambda: gateway.metric("ard_seats_reserved") + waiting(gateway) == 4)
        assert waiting(gateway) == (2 if seats else 0)
        with gateway.client() as client:
            assert ("\nard_seats{" in client.get("/metrics").text) is (seats is not None)


@pytest.mark.slow
@pytest.mark.vllm
def test_nothing_waits_inside_a_real_vllm(start: StartGateway, tmp_path: Path) -> None:
    from helpers_tiny_llama import WINDOW, write_tiny_llama

    fields = {"engine_command": ServeConfig.model_fields["engine_command"].default, "kv_cache_gib": 0.1, "canary_timeout_s": 30}
    args = ["--enforce-eager", "--max_num_seqs=4"]
    gateway = start(
        environment={"OMP_NUM_THREADS": "2"}, model=str(write_tiny_llama(tmp_path / "real")), engine_args=args, **fields
    ).until_ready(300)
    with ExitStack() as flood:
        for _ in range(8):
            flood.enter_context(send(gateway, prompt=[1, 2], max_tokens=WINDOW - 10, ignore_eos=True))
        wait_for(lambda: waiting(gateway) == 5)
        seen = []
        while gateway.metric("ard_requests_in_flight"):
            seen.append((gateway.metric("vllm:num_requests_running"), gateway.metric("vllm:num_requests_waiting")))
            assert gateway.status("/readyz") == 200
    assert max(running for running, _ in seen) in (3, 4)
    assert max(inside for _, inside in seen) <= 1  # one that has just come, the canary among them
    assert gateway.metric("ard_seats_reserved") == 0


def plan(gateway: Gateway) -> dict[str, Any]:
    with gateway.client() as client:
        return dict(client.post("/v1/plan", json={"prompt": PROMPT, "max_tokens": 8}).json())
