"""What clients see, and what the gateway does, when an engine fails before it has answered or is busy for very long."""

import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers_server import PROMPT, StartGateway, complete, error_of, gateways, wait_for


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartGateway]:
    with gateways(tmp_path) as start:
        yield start


@pytest.mark.fault("S4")
def test_a_stream_that_fails_before_its_first_token_has_a_status_of_its_own(start: StartGateway) -> None:
    """vLLM answers such a stream with 200 and an error event; a balancer can only try elsewhere by the status."""
    gateway = start(canary_interval_s=60).until_ready()
    given_up = complete(gateway, stream=True, script={"tokens": 0, "end": "error"})
    assert (given_up.status_code, error_of(given_up)["code"]) == (500, "engine_error")
    died = complete(gateway, stream=True, script={"tokens": 0, "end": "error", "health": 503})
    assert (died.status_code, error_of(died)["code"]) == (503, "engine_failed")
    with gateway.client() as client:
        assert "ard_ttft_seconds_count" not in client.get("/metrics").text
        assert client.post("/v1/plan", json={"prompt": [1]}).json()["estimated_first_token_s"] is None


@pytest.mark.fault("S4")
def test_a_stream_that_breaks_after_its_last_event_was_whole(start: StartGateway) -> None:
    """An error event after `[DONE]` would call an answer failed that the client has."""
    gateway = start().until_ready()
    answer = complete(gateway, stream=True, script={"end": "late"})
    assert answer.text.endswith("data: [DONE]\n\n")
    assert gateway.metric('ard_requests_total{outcome="ok"}') == 1


@pytest.mark.timing
@pytest.mark.fault("S5")
@pytest.mark.parametrize("is_stuck", [False, True])
def test_an_engine_whose_seats_are_taken_is_killed_only_if_it_stands_still(start: StartGateway, is_stuck: bool) -> None:
    """Answers that are not streamed are silent for as long as they take, and the canary waits behind them in the engine."""
    gateway = start({"seats": 2}, canary_timeout_s=0.3, hang_timeout_s=1).until_ready()
    with ThreadPoolExecutor() as pool:
        script = {"tokens": 40, "gap_s": 0.1, "uncounted": is_stuck}
        asked = [pool.submit(complete, gateway, script=script) for _ in range(2)]
        statuses = [answer.result().status_code for answer in asked]
    assert statuses == ([503, 503] if is_stuck else [200, 200])
    gateway.until_ready()
    assert gateway.metric("ard_engine_restarts_total") == is_stuck


@pytest.mark.fault("S8")
def test_a_text_that_a_full_queue_refuses_is_not_counted_by_the_engine(start: StartGateway) -> None:
    gateway = start(queue_size=1).until_ready()
    text: dict[str, Any] = {"prompt": "x" * 400, "max_tokens": 100}
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(complete, gateway, max_tokens=500, script={"first_s": 5}) for _ in range(3)]
        wait_for(lambda: gateway.metric('ard_queue_length{lane="short"}') == 1)
        refused = complete(gateway, **text)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "server_busy")
        assert gateway.engine_events("tokenize") == []
        assert [answer.result().status_code for answer in asked] == [200] * 3
    assert complete(gateway, **text).status_code == 200
    assert len(gateway.engine_events("tokenize")) == 1


@pytest.mark.fault("S6")
def test_a_body_that_was_on_its_way_at_sigterm_is_refused(start: StartGateway) -> None:
    """Whoever is let in is waited for, and the wait may have ended when the body is there."""
    gateway = start(drain_s=30).until_ready()
    body = json.dumps({"prompt": PROMPT, "user": json.dumps({"first_s": 10})}).encode()
    with ThreadPoolExecutor() as pool, socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        running = pool.submit(complete, gateway, script={"first_s": 5})
        wait_for(lambda: len(gateway.engine_events("start")) == 1)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body[:5])
        wait_for(lambda: gateway.status("/livez") == 200)  # by then the head has been read
        gateway.process.send_signal(signal.SIGTERM)
        wait_for(lambda: gateway.status("/readyz") == 503)
        connection.sendall(body[5:])
        answer = connection.makefile("rb").read()
        assert running.result().status_code == 200
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"server_draining" in answer
    assert len(gateway.engine_events("start")) == 1
    assert gateway.wait() == 0
