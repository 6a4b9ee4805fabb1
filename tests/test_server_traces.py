"""OpenTelemetry: a span a request, in the client's trace, known to the engine, without prompts; nothing unless asked for."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers_server import StartGateway, gateways
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from ard_serve.errors import UsageError
from server.traces import Traces

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartGateway]:
    with gateways(tmp_path) as start:
        yield start


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Address of an OTLP collector, and what it was sent."""
    received: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
        server.shutdown()


@pytest.mark.fault("S23")
def test_a_span_joins_the_clients_trace_and_the_engines(start: StartGateway, collector: tuple[str, list[bytes]]) -> None:
    endpoint, received = collector
    gateway = start(traces=endpoint).until_ready()
    with gateway.client() as client:
        headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
        client.post("/v1/completions", json={"prompt": "the secret recipe", "stream": True}, headers=headers)
    assert gateway.stop() == 0
    (raw,) = received
    (span,) = ExportTraceServiceRequest.FromString(raw).resource_spans[0].scope_spans[0].spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("POST /v1/completions", TRACE_ID, PARENT_ID)
    attributes = {entry.key: entry.value for entry in span.attributes}
    assert attributes["ard.outcome"].string_value == "ok"
    assert attributes["ard.ttft_s"].double_value > 0
    assert gateway.engine_events("start")[-1]["trace"] == f"00-{TRACE_ID}-{span.span_id.hex()}-01"
    assert b"secret recipe" not in raw


def test_a_collector_that_is_away_holds_nothing_up(start: StartGateway) -> None:
    gateway = start(traces="http://127.0.0.1:9/v1/traces").until_ready()
    with gateway.client() as client:
        assert client.post("/v1/completions", json={"prompt": [1]}).status_code == 200
    gateway.process.terminate()
    assert gateway.wait() == 0


def test_without_the_package_it_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UsageError, match=r"pip install 'ard-serve\[otel\]'"):
        Traces("http://127.0.0.1:4318")
