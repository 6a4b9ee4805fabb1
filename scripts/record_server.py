"""Run the server's endurance tests and keep what they saw: record_server.py docs/results/server-endurance-cpu.json

Schemathesis' 10,000 cases, 10,000 requests, 1,000 disconnects and 256 idle streams, against the scripted engine. What a test
hands to `record_property` goes into the file, with how it ended and how long it took. Some ten minutes on two cores.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers_bench import circumstances, write  # noqa: E402 - found by the line above

TESTS = (
    "test_server_openapi.py::test_schemathesis_finds_no_5xx_and_no_answer_outside_the_document[1250-10000]",
    "test_server_gateway.py::test_a_thousand_disconnects_leak_nothing",
    "test_server_lifecycle.py::test_memory_is_flat_over_ten_thousand_requests",
    "test_server_lifecycle.py::test_an_idle_stream_costs_little_memory",
)


class Recorder:
    """A pytest plugin that keeps each test's outcome and properties."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            seen = {"outcome": report.outcome, "seconds": round(report.duration, 1)}
            self.tests[report.nodeid] = seen | dict(report.user_properties)


def main(out: Path) -> int:
    results = circumstances(("uvicorn", "uvloop", "fastapi", "schemathesis"))
    recorder = Recorder()
    chosen = [f"{ROOT}/tests/{name}" for name in TESTS]
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--timeout", "3000", *chosen], plugins=[recorder])
    write(out, results | {"tests": recorder.tests})
    return int(code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
