"""What a client meets before its request is one: limits on its head, errors of HTTP itself, and what is left of refusals."""

import contextlib
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from helpers_server import Gateway, StartGateway, complete, error_of, gateways, wait_for

from server.auth import hash_key
from server.call import Kind
from server.gateway import Gateway as Routes
from server.routes import build_app

OPENING = b"GET /livez HTTP/1.1\r\nhost: x\r\n"
CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"
FLOODS = {
    "one header": (OPENING + b"x-long: ", b"a" * 65_536),
    "many headers": (OPENING, b"a: b\r\n" * 10_000),
    "url": (b"GET /", b"a" * 65_536),
    "trailers": (CHUNKED, b"a: b\r\n" * 10_000),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    with gateways(tmp_path_factory.mktemp("http")) as start:
        yield start


@pytest.fixture(scope="module")
def gateway(start: StartGateway) -> Gateway:
    return start().until_ready()


@pytest.fixture(scope="module")
def hasty_gateway(start: StartGateway) -> Gateway:
    return start(header_timeout_s=0.5)


def exchange(gateway: Gateway, *parts: bytes) -> tuple[int, dict[str, str]]:
    """Status and error object of the answer to bytes that are sent as they are, until the gateway has closed."""
    answer = b""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):  # the gateway closes before it has read all
            for part in parts:
                connection.sendall(part)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65_536):
                answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert b"connection: close" in head
    (error,) = json.loads(body).values()
    return int(head.split()[1]), error


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.fault("S10")
@pytest.mark.parametrize("name", FLOODS)
def test_headers_without_an_end_take_no_memory(gateway: Gateway, name: str) -> None:
    opening, flood = FLOODS[name]
    before = resident_bytes(gateway.process.pid)
    sent = 0
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(opening)
        with contextlib.suppress(ConnectionError):
            while sent < 40_000_000:
                sent += connection.send(flood)
    assert sent < 40_000_000
    assert resident_bytes(gateway.process.pid) - before < 10_000_000


@pytest.mark.fault("S10")
def test_headers_up_to_the_limit_pass_and_beyond_it_are_431(gateway: Gateway) -> None:
    opening, end = OPENING + b"connection: close\r\nx-long: ", b"\r\n\r\n"
    longest = 65_536 - len(opening) - len(end)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(opening + b"a" * longest + end)
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 200")
    status, error = exchange(gateway, opening + b"a" * (longest + 1) + end)
    assert status == 431
    assert error["code"] == "headers_too_large"
    assert "65536" in error["message"]


def test_a_body_is_no_header(gateway: Gateway) -> None:
    """A head and a body far longer than a head may be, in one piece and in many; then another request on the connection."""
    body = json.dumps({"prompt": "x", "user": "u" * 200_000}).encode()
    with gateway.client() as client:
        for content in (body, iter([body[at : at + 1000] for at in range(0, len(body), 1000)])):
            assert client.post("/v1/completions", content=content).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["no request", "bad header", "bad chunk"],
)
def test_what_is_not_http_is_400_in_openai_shape(gateway: Gateway, sent: bytes) -> None:
    status, error = exchange(gateway, sent)
    assert (status, error["code"]) == (400, "invalid_http")
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.fault("S11")
@pytest.mark.parametrize("sent", [b"", OPENING], ids=["silence", "half a head"])
def test_headers_too_slow_are_408_in_openai_shape(hasty_gateway: Gateway, sent: bytes) -> None:
    status, error = exchange(hasty_gateway, sent)
    assert (status, error["code"]) == (408, "header_timeout")
    assert set(error) == {"message", "type", "param", "code"}


class BrokenGateway:
    """Has a bug in every route."""

    recorded: tuple[object, ...] = ()

    async def generate(self, request: object, kind: Kind) -> object:
        raise RuntimeError("a bug")

    def record(self, request: object, *what: object) -> None:
        self.recorded = what

    def __getattr__(self, name: str) -> object:
        async def endpoint() -> None:
            raise RuntimeError("a bug")

        return endpoint


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/plan"])
async def test_a_bugs_answer_leads_to_its_log(path: str, caplog: pytest.LogCaptureFixture) -> None:
    gateway = BrokenGateway()
    transport = httpx.ASGITransport(build_app(cast(Routes, gateway)))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        response = await client.post(path, json={}, headers={"x-request-id": "trace-17"})
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert response.headers["x-request-id"] == "trace-17"
    (logged,) = [entry for entry in caplog.records if entry.levelno == logging.ERROR]
    assert "trace-17" in logged.getMessage()
    assert logged.exc_info
    assert gateway.recorded == (path, 500, "internal_error")


def access(gateway: Gateway) -> list[dict[str, Any]]:
    lines = [line.partition("INFO server.access: ")[2] for line in gateway.stderr.splitlines()]
    return [json.loads(line) for line in lines if line]


def test_what_was_refused_is_logged_and_counted(start: StartGateway, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.alice]\nsha256 = "{hash_key("secret")}"\nadmin = true\n')
    gateway = start(api_keys=str(path), max_body_bytes=1024, body_timeout_s=0.3).until_ready()
    assert complete(gateway, "guessed").status_code == 401
    assert complete(gateway, "secret", n=0).status_code == 400
    assert complete(gateway, "secret", prompt="x" * 2000).status_code == 413
    with gateway.client("secret") as client:
        assert client.post("/v1/plan", json={"prompt": "the secret recipe"}).status_code == 200
        assert client.get("/v1/models/other").status_code == client.get("/wp-login.php").status_code == 404
        assert client.put("/v1/plan").status_code == 405
        assert client.get("/v1/models").status_code == 200
        half = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\ncontent-length: 9\r\n\r\n{"
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
            connection.sendall(half)
            assert connection.makefile("rb").read().startswith(b"HTTP/1.1 408")
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
            connection.sendall(half)
        wait_for(lambda: len(access(gateway)) == 9)
        counted = client.get("/metrics").text
    expected = [
        ("-", "/v1/completions", 401, "invalid_api_key"),
        ("alice", "/v1/completions", 400, "invalid_value"),
        ("alice", "/v1/completions", 413, "body_too_large"),
        ("alice", "/v1/plan", 200, "ok"),
        ("alice", "/v1/models/{name:path}", 404, "model_not_found"),
        ("-", "-", 404, "not_found"),
        ("-", "/v1/plan", 405, "method_not_allowed"),
        ("alice", "/v1/completions", 408, "body_timeout"),
        ("alice", "/v1/completions", 0, "client_left"),
    ]
    assert [tuple(line[name] for name in ("key", "route", "status", "outcome")) for line in access(gateway)] == expected
    assert all(line["request_id"] and line["client"] == "127.0.0.1" for line in access(gateway))
    for key, route, _, outcome in expected:
        assert f'ard_requests_total{{key="{key}",outcome="{outcome}",profile="",route="{route}"}} 1.0' in counted
    assert "recipe" not in gateway.stderr


def test_a_generation_is_logged_and_counted_once(gateway: Gateway) -> None:
    before = len(access(gateway))
    assert complete(gateway).status_code == 200
    assert complete(gateway, script={"status": 500}).status_code == 500
    wait_for(lambda: len(access(gateway)) >= before + 2)
    assert [line["outcome"] for line in access(gateway)[before:]] == ["ok", "engine_error"]


@pytest.mark.parametrize("size", [b"content-length: 31", b"transfer-encoding: chunked"])
def test_an_upgrades_body_is_never_taken_for_a_request(gateway: Gateway, size: bytes) -> None:
    """Java's HttpClient asks for h2c with every request, a body or not."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: h2c\r\n%b\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as connection:
        connection.sendall(head % size)
        assert b" 400 " in connection.recv(4096)
        with contextlib.suppress(OSError):
            connection.sendall(OPENING + b"\r\n")
            assert not connection.recv(4096)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as connection:
        connection.sendall(OPENING + b"connection: Upgrade\r\nupgrade: h2c\r\n\r\n")
        assert b" 200 " in connection.recv(4096)
