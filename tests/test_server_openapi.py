"""The published OpenAPI document is ours and true: its routes exist, and Schemathesis finds no answer outside it."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from helpers_server import Gateway, gateways, write_model

from server.auth import hash_key
from server.gateway import Gateway as Routes
from server.routes import build_app

KEY = "admin-secret-key"

# A request that keeps the schema may still be too long, or its schema too large: that is not a lie of the document.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,ignored_auth"
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateways(tmp_path_factory.mktemp("gateway")) as start:
        path = tmp_path_factory.mktemp("keys") / "keys.toml"
        path.write_text(f'[keys.root]\nsha256 = "{hash_key(KEY)}"\nadmin = true\n')
        model = write_model(tmp_path_factory.mktemp("model") / "tiny")  # with a control token: messages are read for those
        (model / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "<|im_end|>", "special": True}]}))
        yield start({"blocks": 4000}, model=str(model), api_keys=str(path)).until_ready()


def test_the_document_names_every_route_and_no_other(gateway: Gateway) -> None:
    app: FastAPI = build_app(cast(Routes, FakeRoutes()))
    routes = {route.path.replace(":path", "") for route in app.routes if isinstance(route, APIRoute)}
    with gateway.client(KEY) as client:
        assert set(client.get("/openapi.json").json()["paths"]) == routes


class FakeRoutes:
    """Stands for the gateway where only the list of routes is asked for."""

    def __getattr__(self, name: str) -> object:
        async def endpoint() -> None: ...

        return endpoint


@pytest.mark.fault("S12")
@pytest.mark.parametrize(
    ("cases", "at_least"), [(25, 500), pytest.param(1250, 10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])]
)
def test_schemathesis_finds_no_5xx_and_no_answer_outside_the_document(
    gateway: Gateway, cases: int, at_least: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """`cases` are for one operation in one phase of Schemathesis; `at_least` so many are made in all."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{gateway.url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {KEY}"]
    options = ["--checks", CHECKS, "--max-examples", str(cases), "--seed", "1", "--suppress-health-check", "all"]
    done = subprocess.run([*command, *options, "--no-color"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    (generated,) = re.findall(r"(\d+) generated", done.stdout.replace(",", ""))
    record_property("cases generated", int(generated))
    record_property("checks", CHECKS)
    assert int(generated) >= at_least
