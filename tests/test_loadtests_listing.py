"""What servers say of themselves, as vLLM and llama.cpp were seen to say it, over real sockets."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ard_serve.errors import UsageError
from loadtests.address import Address, parse_address
from loadtests.config import LoadConfig
from loadtests.listing import engine_version, list_models, window

# llama-server of October 2026 with -c 16384 -np 2: `n_ctx` is a slot's, `n_ctx_train` the model's.
LLAMA = {"id": "smollm2.gguf", "owned_by": "llamacpp", "meta": {"n_ctx": 8192, "n_ctx_train": 8192}}
VLLM = {"id": "smollm2", "owned_by": "vllm", "max_model_len": 65536}
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}

Serve = Callable[[dict[str, tuple[int, Any]]], Address]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers that answer each path with a status and a JSON body, and others with 404."""
    running: list[ThreadingHTTPServer] = []

    def start(answers: dict[str, tuple[int, Any]]) -> Address:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answers.get(self.path, (404, {"error": "no route"}))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *args: object) -> None:
                pass

        running.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return parse_address(f"http://127.0.0.1:{running[-1].server_address[1]}")

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def config(address: Address, model: str = "") -> LoadConfig:
    return LoadConfig(url=address.base, model=model)


@pytest.mark.parametrize(("listing", "tokens"), [(VLLM, 65536), (LLAMA, 8192), ({"id": "hosted", "meta": None}, None)])
def test_window_is_found_where_each_engine_lists_it(serve: Serve, listing: dict[str, Any], tokens: int | None) -> None:
    address = serve({"/v1/models": (200, {"object": "list", "data": [listing]})})
    found = list_models(address, config(address))
    assert found == listing
    assert window(found) == tokens


@pytest.mark.parametrize(
    ("listing", "answers", "said"),
    [(VLLM, {"/version": (200, {"version": "0.23.0"})}, "vllm 0.23.0"),
     (LLAMA, {"/props": (200, {"build_info": "b1-0c1e570", "total_slots": 2})}, "llamacpp b1-0c1e570"),
     ({"id": "m", "owned_by": "ard-serve"}, {"/openapi.json": (200, {"info": {"title": "ard serve", "version": "0.1.0"}})},
      "ard-serve 0.1.0"),
     ({"id": "hosted"}, {"/version": (200, ["not an object"]), "/openapi.json": (200, {"info": {"title": "Hosted"}})}, "")],
)  # fmt: skip
def test_engine_is_named_with_its_version(
    serve: Serve, listing: dict[str, Any], answers: dict[str, tuple[int, Any]], said: str
) -> None:
    assert engine_version(serve(answers), listing) == said


def test_engine_behind_a_gateway_is_named_too(serve: Serve) -> None:
    engine = serve({"/version": (200, {"version": "0.23.0"}), "/v1/models": (200, {"data": [VLLM]})})
    gateway = serve({"/openapi.json": (200, {"info": {"title": "ard serve", "version": "0.1.0"}})})
    assert engine_version(gateway, {"owned_by": "ard-serve"}, engine) == "ard-serve 0.1.0, vllm 0.23.0"
    assert engine_version(engine, VLLM, engine) == "vllm 0.23.0"


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [(503, LOADING, "503.*Loading model.*wait until"), (401, {}, r"wants a key.*\$OPENAI_API_KEY"),
     (200, {"models": []}, "no model list"), (200, {"data": [VLLM]}, "'other': not served.*serves smollm2")],
)  # fmt: skip
def test_what_stands_in_the_way_is_said(serve: Serve, status: int, body: dict[str, Any], message: str) -> None:
    address = serve({"/v1/models": (status, body)})
    with pytest.raises(UsageError, match=message):
        list_models(address, config(address, "other"))
