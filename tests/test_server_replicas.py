"""Two replicas behind HAProxy as deploy/haproxy.cfg sets it up: killing one under load loses nothing that had not begun.

The same with two real engines: `real_replicas.py`.
"""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_replicas import CONFIG, HAPROXY, Load, balancer
from helpers_server import PROMPT, StartGateway, gateways

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="needs haproxy")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartGateway]:
    with gateways(tmp_path) as start:
        yield start


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_replica_that_ends_under_load_loses_no_request_that_had_not_begun(
    start: StartGateway, tmp_path: Path, number: signal.Signals
) -> None:
    replicas = [start({"blocks": 4000}).until_ready() for _ in range(2)]
    with balancer(replicas, tmp_path) as url:
        script = {"first_s": 0.3, "tokens": 40, "gap_s": 0.05}
        load = Load(url, clients=16, fields={"prompt": PROMPT, "max_tokens": 8, "user": json.dumps(script)})
        time.sleep(4)
        before = load.done
        replicas[0].process.send_signal(number)
        time.sleep(5)
        load.stop()
    assert before > 0
    assert replicas[0].engine_events("start")
    assert load.done > before
    assert load.lost == []
    assert load.cut <= (8 if number is signal.SIGKILL else 0), "only streams that had begun, and on one replica of two"


def test_the_deployed_configuration_is_valid() -> None:
    done = subprocess.run([str(HAPROXY), "-c", "-f", str(CONFIG)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
