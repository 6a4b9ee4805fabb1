"""The gateway as a process: probes, an engine that dies or hangs, restarts, draining, exit codes. Real signals throughout."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_server import PROMPT, Gateway, StartGateway, complete, error_of, gateways, is_alive, wait_for


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartGateway]:
    with gateways(tmp_path) as start:
        yield start


def engine_pid(gateway: Gateway) -> int:
    return int(gateway.engine_events("engine")[-1]["pid"])


def worker_pid(gateway: Gateway) -> int:
    return int(gateway.engine_events("worker")[-1]["pid"])


def has_moved_on(gateway: Gateway, pid: int) -> bool:
    return gateway.process.poll() is not None or engine_pid(gateway) != pid


@pytest.mark.timing
@pytest.mark.fault("S3")
def test_while_the_engine_loads_the_server_is_live_and_not_ready(start: StartGateway) -> None:
    gateway = start({"load_s": 4})
    assert gateway.status("/livez") == 200
    with gateway.client() as client:
        probe = client.get("/readyz")
        assert client.get("/v1/models").status_code == 200
    refused = complete(gateway)
    assert probe.status_code == refused.status_code == 503
    assert probe.json()["status"] == "loading"
    assert refused.headers["retry-after"]
    gateway.until_ready()
    assert complete(gateway).status_code == 200


@pytest.mark.fault("S2")
def test_a_port_in_use_is_exit_2_before_the_model_is_read(start: StartGateway, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gateway = start(port=taken.getsockname()[1], model=str(tmp_path / "no such model"))
        assert gateway.wait() == 2
    assert f":{taken}" not in gateway.stderr
    assert "cannot listen" in gateway.stderr
    assert len(gateway.stderr.splitlines()) == 1


@pytest.mark.timing
@pytest.mark.fault("S4")
def test_an_engine_that_is_killed_is_started_again(start: StartGateway) -> None:
    gateway = start().until_ready()
    first, worker = engine_pid(gateway), worker_pid(gateway)
    body = {"prompt": PROMPT, "stream": True, "user": json.dumps({"tokens": 500, "gap_s": 0.2})}
    with ThreadPoolExecutor() as pool, gateway.client() as client:
        plain = pool.submit(complete, gateway, script={"first_s": 100})
        wait_for(lambda: len(gateway.engine_events("start")) == 1)
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            while not next(lines).startswith("data: "):
                pass
            os.kill(first, signal.SIGKILL)
            killed_at = time.monotonic()
            rest = [line for line in lines if line]
        failed = plain.result()
        assert time.monotonic() - killed_at < 1
    assert "engine_failed" in rest[-1]
    assert "data: [DONE]" not in rest
    assert failed.status_code == 503
    assert error_of(failed)["code"] == "engine_failed"
    wait_for(lambda: gateway.status("/readyz") == 503)
    gateway.until_ready()
    assert engine_pid(gateway) != first
    assert not is_alive(worker)
    assert gateway.metric("ard_engine_restarts_total") == 1
    assert complete(gateway).status_code == 200


@pytest.mark.fault("S4")
def test_an_engine_that_keeps_dying_ends_the_server_with_70(start: StartGateway) -> None:
    gateway = start(max_restarts=1).until_ready()
    for _ in range(2):
        gateway.until_ready()
        pid = engine_pid(gateway)
        os.kill(pid, signal.SIGKILL)
        wait_for(partial(has_moved_on, gateway, pid))
    assert gateway.wait() == 70
    assert "--max-restarts" in gateway.stderr.splitlines()[-1]


@pytest.mark.fault("S4")
def test_an_engine_that_cannot_start_is_70_with_its_last_words(start: StartGateway) -> None:
    gateway = start({"exit": 0, "last_words": "KV cache needs 3 GiB"})
    assert gateway.wait() == 70
    assert "KV cache needs 3 GiB" in gateway.stderr.splitlines()[-1]


@pytest.mark.fault("S4")
@pytest.mark.parametrize(
    ("script", "fields", "named"),
    [
        ({"load_s": 60}, {"start_timeout_s": 1}, "not loaded within 1 s (--start-timeout-s)"),
        ({"canary": {"end": "hang"}}, {"canary_timeout_s": 0.3, "hang_timeout_s": 1}, "no answer to the canary within 0.3 s"),
        ({"canary": {"status": 500}}, {"hang_timeout_s": 1}, "the canary got status 500"),
    ],
    ids=["does not load", "does not answer", "answers nonsense"],
)
def test_an_engine_that_never_becomes_ready_is_70_in_bounded_time(
    start: StartGateway, script: dict[str, Any], fields: dict[str, float], named: str
) -> None:
    gateway = start(script, **fields)
    assert gateway.wait(20) == 70
    last = gateway.stderr.splitlines()[-1]
    assert "the engine never became ready" in last
    assert named in last


@pytest.mark.timing
@pytest.mark.fault("S5")
def test_a_hung_engine_makes_the_server_not_ready_and_ready_again(start: StartGateway) -> None:
    gateway = start(canary_timeout_s=0.5).until_ready()
    os.kill(engine_pid(gateway), signal.SIGSTOP)
    wait_for(lambda: gateway.status("/readyz") == 503)
    assert gateway.status("/livez") == 200
    os.kill(engine_pid(gateway), signal.SIGCONT)
    gateway.until_ready()
    assert gateway.metric("ard_engine_restarts_total") == 0


@pytest.mark.timing
@pytest.mark.fault("S5")
def test_an_engine_that_stays_hung_is_replaced(start: StartGateway) -> None:
    gateway = start(canary_timeout_s=0.3, hang_timeout_s=1, request_timeout_s=10).until_ready()
    first = engine_pid(gateway)
    os.kill(first, signal.SIGSTOP)
    hanging = complete(gateway)
    assert hanging.status_code == 503
    wait_for(lambda: engine_pid(gateway) != first)
    gateway.until_ready()
    assert not is_alive(first)


@pytest.mark.timing
@pytest.mark.fault("S6")
def test_sigterm_lets_requests_finish_and_refuses_new_ones(start: StartGateway) -> None:
    gateway = start(drain_s=30).until_ready()
    with ThreadPoolExecutor() as pool:
        stream = pool.submit(complete, gateway, stream=True, script={"tokens": 20, "gap_s": 0.15})
        plain = pool.submit(complete, gateway, script={"first_s": 3})
        wait_for(lambda: len(gateway.engine_events("start")) == 2)
        gateway.process.send_signal(signal.SIGTERM)
        wait_for(lambda: gateway.status("/readyz") == 503)
        refused = complete(gateway)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert error_of(refused)["code"] == "server_draining"
        assert gateway.status("/livez") == 200
        assert stream.result().text.rstrip().endswith("data: [DONE]")
        assert plain.result().status_code == 200
    assert gateway.wait() == 0
    assert not is_alive(worker_pid(gateway))


@pytest.mark.timing
@pytest.mark.fault("S7")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_drain_deadline_ends_what_is_left(start: StartGateway, number: signal.Signals, code: int) -> None:
    gateway = start(drain_s=0.5).until_ready()
    with ThreadPoolExecutor() as pool:
        stream = pool.submit(complete, gateway, stream=True, script={"tokens": 100, "gap_s": 0.2})
        wait_for(lambda: bool(gateway.engine_events("start")))
        signalled_at = time.monotonic()
        assert gateway.stop(number) == code
        assert time.monotonic() - signalled_at < 0.5 + 2
        events = stream.result().text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "server_draining"
    assert "data: [DONE]" not in events


def test_a_second_signal_ends_the_wait(start: StartGateway) -> None:
    gateway = start(drain_s=60).until_ready()
    with ThreadPoolExecutor() as pool:
        pool.submit(complete, gateway, stream=True, script={"tokens": 100, "gap_s": 0.2})
        wait_for(lambda: bool(gateway.engine_events("start")))
        gateway.process.send_signal(signal.SIGTERM)
        wait_for(lambda: gateway.status("/readyz") == 503)
        assert gateway.stop() == 143


def test_the_engine_does_not_outlive_a_killed_gateway(start: StartGateway) -> None:
    gateway = start().until_ready()
    pids = (engine_pid(gateway), worker_pid(gateway))
    gateway.process.kill()
    gateway.process.wait()
    wait_for(lambda: not any(map(is_alive, pids)))


@pytest.mark.fault("S22")
@pytest.mark.parametrize(
    "script",
    [
        {"canary": {"logprob": float("nan")}, "counts_nans": False},
        {"canary": {"status": 500}, "corrupted": 1},
        {"corrupted": 1},
    ],
    ids=["written", "not writable", "counted"],
)
def test_non_finite_logits_raise_the_alarm(start: StartGateway, script: dict[str, Any]) -> None:
    """A NaN that the engine writes as a logprob, one at which it fails to write its answer, and one that it only counts."""
    gateway = start(script)
    wait_for(lambda: gateway.metric("ard_engine_non_finite") == 1)
    assert gateway.status("/readyz") == 503
    response = complete(gateway)
    assert response.status_code == 500
    assert error_of(response)["code"] == "non_finite_logits"


def test_the_engines_parameters_are_asked_once_for_a_version_of_it(start: StartGateway, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # below it nobody can write, root neither
    own, image = (
        {"XDG_CACHE_HOME": str(tmp_path)},
        {"XDG_CACHE_HOME": str(tmp_path / "file"), "ARD_SERVE_CACHE": str(tmp_path / "ard-serve")},
    )
    for version, cache, asked in (("1.2", own, 1), ("1.2", own, 0), ("1.3", own, 1), ("1.3", image, 0), ("1.4", image, 1)):
        gateway = start({"version": version}, cache).until_ready()
        assert len(gateway.engine_events("openapi")) == asked
        assert error_of(complete(gateway, top_q=5))["code"] == "unknown_parameter"
        gateway.stop()


def test_queued_requests_survive_a_restart(start: StartGateway) -> None:
    """A request that had not reached the engine when it died is answered by the next one."""
    gateway = start().until_ready()
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(complete, gateway, max_tokens=500, script={"first_s": 20}) for _ in range(2)]
        wait_for(lambda: len(gateway.engine_events("start")) == 2)
        queued = pool.submit(complete, gateway, max_tokens=500)
        wait_for(lambda: gateway.metric('ard_queue_length{lane="short"}') == 1)
        os.kill(engine_pid(gateway), signal.SIGKILL)
        assert [request.result().status_code for request in running] == [503, 503]
        assert queued.result().status_code == 200


def test_sighup_reads_the_key_file_again_and_a_broken_one_changes_nothing(start: StartGateway, tmp_path: Path) -> None:
    from server.auth import hash_key

    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.old]\nsha256 = "{hash_key("old")}"\n')
    gateway = start(api_keys=str(path)).until_ready()

    def status(key: str) -> int:
        with gateway.client(key) as client:
            return client.get("/v1/models").status_code

    assert (status("old"), status("new")) == (200, 401)
    path.write_text(f'[keys.new]\nsha256 = "{hash_key("new")}"\n')
    gateway.process.send_signal(signal.SIGHUP)
    wait_for(lambda: (status("old"), status("new")) == (401, 200))
    path.write_text("[keys.new]\nsha256 = 7\n")
    gateway.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "not read again" in gateway.stderr)
    assert status("new") == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost.example.com", "127.example.com"])
def test_an_address_that_others_may_reach_needs_keys(start: StartGateway, host: str) -> None:
    gateway = start(host=host)
    assert gateway.wait() == 2
    assert "--api-keys" in gateway.stderr


@pytest.mark.slow
async def test_memory_is_flat_over_ten_thousand_requests(
    start: StartGateway, record_property: Callable[[str, object], None]
) -> None:
    import psutil

    gateway = start({"blocks": 4000}).until_ready()
    process = psutil.Process(gateway.process.pid)

    async def ask_many(count: int) -> int:
        """Resident bytes after `count` requests, a third of them streams, a third too long, sixteen at a time."""
        body = {"prompt": [1] * 3, "max_tokens": 8, "user": '{"tokens": 3}'}
        bodies = [body, {**body, "stream": True}, {**body, "prompt": [1] * 600}]
        async with httpx.AsyncClient(base_url=gateway.url, timeout=30, trust_env=False) as client:
            for first in range(0, count, 16):
                asked = (client.post("/v1/completions", json=bodies[number % 3]) for number in range(first, first + 16))
                statuses = [answer.status_code for answer in await asyncio.gather(*asked)]
                assert set(statuses) == {200, 400}
        return int(process.memory_info().rss)

    before_bytes = await ask_many(2000)
    grown_bytes = await ask_many(10_000) - before_bytes
    record_property("bytes more after 10,000 requests", grown_bytes)
    record_property("resident bytes before", before_bytes)
    assert grown_bytes < 3_000_000


def test_an_idle_stream_costs_little_memory(start: StartGateway, record_property: Callable[[str, object], None]) -> None:
    """256 streams that wait for their next token take less than 100 MB together."""
    import psutil

    gateway = start({"blocks": 4000}, seats=300).until_ready()
    before = psutil.Process(gateway.process.pid).memory_info().rss
    body = {"prompt": [1], "max_tokens": 8, "stream": True, "user": json.dumps({"tokens": 2, "gap_s": 30})}
    limits = httpx.Limits(max_connections=300)
    with httpx.Client(base_url=gateway.url, limits=limits, trust_env=False) as client:
        responses = [client.send(client.build_request("POST", "/v1/completions", json=body), stream=True) for _ in range(256)]
        assert gateway.metric("ard_requests_in_flight") == 256
        grown_bytes = psutil.Process(gateway.process.pid).memory_info().rss - before
        for response in responses:
            response.close()
    record_property("bytes more with 256 idle streams", grown_bytes)
    assert grown_bytes < 100_000_000
