"""What a client meets at the gateway, against a scripted engine: routes, keys, limits, streams, leaving."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from helpers_server import (
    PROMPT,
    Gateway,
    StartGateway,
    complete,
    error_of,
    gateways,
    send,
    wait_for,
    write_export,
    write_model,
)

from server.auth import hash_key

ALICE, BOB, ADMIN = "alice-secret-key", "bob-secret-key", "admin-secret-key"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    with gateways(tmp_path_factory.mktemp("gateway")) as start:
        yield start


@pytest.fixture(scope="module")
def open_gateway(start: StartGateway) -> Gateway:
    """A gateway without keys."""
    return start(max_body_bytes=20_000).until_ready()


@pytest.fixture(scope="module")
def hasty_gateway(start: StartGateway) -> Gateway:
    """One whose patience a test can outwait."""
    return start(header_timeout_s=1, body_timeout_s=1, request_timeout_s=4).until_ready()


@pytest.fixture(scope="module")
def keyed_gateway(start: StartGateway, tmp_path_factory: pytest.TempPathFactory) -> Gateway:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    quota = "kv_token_seconds_per_minute = 60"
    path.write_text(
        f'[keys.alice]\nsha256 = "{hash_key(ALICE)}"\n[keys.bob]\nsha256 = "{hash_key(BOB)}"\n{quota}\n'
        f'[keys.root]\nsha256 = "{hash_key(ADMIN)}"\nadmin = true\n'
    )
    return start(api_keys=str(path)).until_ready()


@pytest.mark.fault("S16")
@pytest.mark.parametrize(
    "path",
    [
        *("/invocations", "/tokenize", "/docs", "/redoc", "/v1/embeddings", "/generative_scoring"),
        *("/v1/completions/", "/v1/plan/", "/livez/"),  # a redirect would send key and prompt on, and without TLS
    ],
)
def test_a_route_that_is_not_listed_does_not_exist(keyed_gateway: Gateway, path: str) -> None:
    with keyed_gateway.client() as client:
        assert client.get(path).status_code == 404
        assert error_of(client.post(path, json={}))["code"] == "not_found"


@pytest.mark.fault("S16")
def test_a_wrong_method_is_405_and_names_the_right_one(keyed_gateway: Gateway) -> None:
    with keyed_gateway.client() as client:
        response = client.put("/v1/completions", json={})
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert error_of(response)["code"] == "method_not_allowed"


@pytest.mark.fault("S15")
@pytest.mark.parametrize("key", [None, "wrong", ALICE[:-1], ALICE + "x", ALICE.upper()])
def test_a_missing_or_wrong_key_is_401_on_every_route_that_costs(keyed_gateway: Gateway, key: str | None) -> None:
    with keyed_gateway.client(key) as client:
        for response in (client.get("/v1/models"), client.get("/metrics"), client.post("/v1/completions", json={})):
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"


def test_probes_need_no_key_and_metrics_an_admin_one(keyed_gateway: Gateway) -> None:
    assert keyed_gateway.status("/livez") == keyed_gateway.status("/readyz") == 200
    with keyed_gateway.client(ALICE) as client:
        assert client.get("/metrics").status_code == 403
    with keyed_gateway.client(ADMIN) as client:
        text = client.get("/metrics").text
    assert 'ard_ready{engine="0"} 1.0' in text
    assert "vllm:cache_config_info" in text


def test_a_stream_passes_through_byte_for_byte(open_gateway: Gateway) -> None:
    response = complete(open_gateway, stream=True, script={"tokens": 3, "gap_s": 0.01})
    events = [{"id": "cmpl-1", "choices": [{"index": 0, "text": f"{index} data: [DONE]\n\n"}]} for index in range(3)]
    expected = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    assert response.text == expected
    assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.timing
def test_events_are_passed_on_as_they_come(open_gateway: Gateway) -> None:
    body = {"prompt": PROMPT, "stream": True, "user": json.dumps({"tokens": 5, "gap_s": 0.2})}
    with open_gateway.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        at = [time.monotonic() for _ in response.iter_raw()]
    assert len(at) >= 5
    assert at[4] - at[0] > 0.5


def test_the_body_reaches_the_engine_unchanged(open_gateway: Gateway) -> None:
    raw = b'{"prompt":  "h\\u00e9 \xc3\xa9", "max_tokens":\n2, "temperature": 0.10}'
    with open_gateway.client() as client:
        client.post("/v1/completions", content=raw)
    assert open_gateway.engine_events("start")[-1]["body"].encode() == raw


def test_a_chat_without_max_tokens_gets_what_the_window_leaves(open_gateway: Gateway) -> None:
    with open_gateway.client() as client:
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 400}]})
    assert json.loads(open_gateway.engine_events("start")[-1]["body"])["max_completion_tokens"] == 512 - 400


def test_request_ids_go_through_and_a_mad_one_is_replaced(open_gateway: Gateway) -> None:
    with open_gateway.client() as client:
        kept = client.post("/v1/completions", json={"prompt": PROMPT}, headers={"x-request-id": "trace-17"})
        assert kept.headers["x-request-id"] == "trace-17" == open_gateway.engine_events("start")[-1]["id"]
        replaced = client.get("/nowhere", headers={"x-request-id": "a b" * 100})
    assert replaced.headers["x-request-id"].startswith("req-")


@pytest.mark.timing
@pytest.mark.fault("S17")
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_within_a_second(open_gateway: Gateway, stream: bool) -> None:
    started, cancelled = (len(open_gateway.engine_events(name)) for name in ("start", "cancelled"))
    with send(open_gateway, stream=stream, script={"tokens": 1000, "gap_s": 0.1}):
        wait_for(lambda: len(open_gateway.engine_events("start")) == started + 1)
    wait_for(lambda: len(open_gateway.engine_events("cancelled")) == cancelled + 1, timeout_s=1)
    wait_for(lambda: open_gateway.metric("ard_kv_reserved_tokens") == 0, timeout_s=1)


@pytest.mark.fault("S4")
@pytest.mark.parametrize("end", ["error", "truncate"])
def test_a_stream_that_fails_ends_with_an_error_event_and_no_done(open_gateway: Gateway, end: str) -> None:
    response = complete(open_gateway, stream=True, script={"tokens": 2, "gap_s": 0.2, "end": end})
    *events, last, rest = response.text.split("\n\n")
    assert rest == ""
    assert len(events) == 2
    assert json.loads(last.removeprefix("data: "))["error"]["message"]
    assert "data: [DONE]" not in [line for event in response.text.split("\n\n") for line in event.splitlines()]


@pytest.mark.fault("S4")
def test_the_openai_client_raises_on_a_failed_stream(open_gateway: Gateway) -> None:
    client = openai.OpenAI(base_url=f"{open_gateway.url}/v1", api_key="none", max_retries=0)
    user = json.dumps({"tokens": 2, "end": "truncate"})
    with pytest.raises(openai.APIError, match="engine failed"):
        list(client.completions.create(model="tiny", prompt="x", stream=True, user=user))


@pytest.mark.timing
@pytest.mark.fault("S5")
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_ends_at_its_deadline(hasty_gateway: Gateway, stream: bool) -> None:
    started = time.monotonic()
    response = complete(hasty_gateway, stream=stream, script={"tokens": 1, "end": "hang"})
    assert 3.5 < time.monotonic() - started < 6
    assert response.status_code == (200 if stream else 504)
    assert "deadline_exceeded" in response.text


@pytest.mark.timing
@pytest.mark.fault("S10")
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_refused_without_being_read(open_gateway: Gateway, declared: bool) -> None:
    big = b"x" * 30_000_000
    started = time.monotonic()
    with open_gateway.client() as client:
        content = big if declared else iter([big[at : at + 65536] for at in range(0, len(big), 65536)])
        response = client.post("/v1/completions", content=content, headers={} if declared else {"transfer-encoding": "chunked"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    assert time.monotonic() - started < 3


@pytest.mark.timing
@pytest.mark.fault("S11")
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{",
    ],
    ids=["silence", "half a header", "half a body"],
)
def test_a_slow_sender_is_answered_408_at_the_limit(hasty_gateway: Gateway, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", hasty_gateway.port), timeout=5) as connection:
        connection.sendall(sent)
        started = time.monotonic()
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408")
    assert 0.8 < time.monotonic() - started < 3.5


@pytest.mark.fault("S12")
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b'{"prompt": "x", "prompt": "y"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "response_format": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "x", "response_format": ' + b'{"a":' * 80 + b"1" + b"}" * 81,
    ],
    ids=["open", "list", "null", "utf-16", "twice", "nan", "surrogate", "digits", "deep", "nested"],
)
def test_bad_json_is_400_in_openai_shape(open_gateway: Gateway, body: bytes) -> None:
    with open_gateway.client() as client:
        response = client.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"


@pytest.mark.fault("S9")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("n", 10_000), ("n", True), ("n", "2"), ("best_of", 99), ("max_tokens", 0), ("max_tokens", 10**9),
        ("logprobs", 500), ("prompt_logprobs", -2), ("seed", 2**70), ("temperature", 1e300), ("stream", "yes"),
    ],
)  # fmt: skip
def test_a_parameter_out_of_range_is_400_and_named(open_gateway: Gateway, name: str, value: Any) -> None:
    response = complete(open_gateway, **{name: value})
    assert response.status_code == 400
    assert error_of(response)["param"] == name


@pytest.mark.fault("S9")
def test_sequences_times_tokens_is_bounded(open_gateway: Gateway) -> None:
    response = complete(open_gateway, n=8, max_tokens=400)
    assert response.status_code == 400
    assert "512" in error_of(response)["message"]


@pytest.mark.fault("S13")
@pytest.mark.parametrize(("name", "value"), [("temprature", 0.5), ("prompt_embeds", "x"), ("priority", 0)])
def test_an_unknown_or_forbidden_parameter_is_400_and_named(open_gateway: Gateway, name: str, value: Any) -> None:
    fields: dict[str, Any] = {name: value}
    response = complete(open_gateway, **fields)
    assert response.status_code == 400
    assert error_of(response)["param"] == name


@pytest.mark.fault("S14")
def test_a_prompt_too_long_is_told_both_counts_before_the_engine_sees_it(open_gateway: Gateway) -> None:
    seen = len(open_gateway.engine_events("start"))
    for prompt in ([1] * 700, "x" * 700):
        error = error_of(complete(open_gateway, prompt=prompt))
        assert "700" in error["message"]
        assert "512" in error["message"]
        assert error["code"] == "context_length_exceeded"
    assert "504" in error_of(complete(open_gateway, prompt=[1] * 8, max_tokens=510))["message"]
    assert len(open_gateway.engine_events("start")) == seen


@pytest.mark.fault("S20")
@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file"])
def test_media_is_refused(open_gateway: Gateway, kind: str) -> None:
    part = {"type": kind, kind: {"url": "http://127.0.0.1:9/x.png"}}
    with open_gateway.client() as client:
        response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part]}]})
    assert response.status_code == 400
    assert error_of(response)["param"] == "messages[0].content"


@pytest.mark.fault("S18")
@pytest.mark.parametrize(
    "bomb",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"maxLength": 10**9}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"maxLength": 1e9}}}},
        {"structured_outputs": {"regex": "((a{1000}){1000}){1000}"}},
        {"structured_outputs": {"regex": "a{" + "1" * 5_000 + "}"}},
        {"structured_outputs": {"regex": "a{999999999}" * 500}},
        {"structured_outputs": {"grammar": 'root ::= "a"{ 1 , 20000 }'}},
        {"structured_outputs": {"grammar": "root ::= " + "x" * 19_000}},
    ],
)
def test_a_grammar_bomb_is_refused(open_gateway: Gateway, bomb: dict[str, Any]) -> None:
    response = complete(open_gateway, **bomb)
    assert response.status_code == 400
    assert error_of(response)["param"] == next(iter(bomb))


@pytest.mark.fault("S18")
def test_a_grammar_that_may_not_end_is_refused(open_gateway: Gateway) -> None:
    response = complete(open_gateway, ignore_eos=True, response_format={"type": "json_object"})
    assert response.status_code == 400
    assert error_of(response)["param"] == "ignore_eos"
    assert complete(open_gateway, ignore_eos=True, response_format={"type": "text"}).status_code == 200


@pytest.mark.fault("S18")
def test_a_request_that_the_engine_gives_up_is_500_and_others_go_on(open_gateway: Gateway) -> None:
    response = complete(open_gateway, script={"status": 500})
    assert response.status_code == 500
    assert error_of(response)["code"] == "engine_error"
    assert complete(open_gateway).status_code == 200


@pytest.mark.fault("S21")
def test_each_key_has_its_own_cache_salt(keyed_gateway: Gateway) -> None:
    salts = []
    for key in (ALICE, BOB, ALICE):
        complete(keyed_gateway, key)
        salts.append(json.loads(keyed_gateway.engine_events("start")[-1]["body"])["cache_salt"])
    assert salts[0] == salts[2] != salts[1]
    complete(keyed_gateway, ALICE, cache_salt=salts[1])
    assert json.loads(keyed_gateway.engine_events("start")[-1]["body"])["cache_salt"] not in salts


def test_a_key_over_its_quota_waits_and_others_do_not(keyed_gateway: Gateway) -> None:
    # 1,024 tokens of KV memory: two fit, and when the third one's turn comes they have used the quota up.
    with ThreadPoolExecutor(3) as together:
        asked = [together.submit(complete, keyed_gateway, BOB, max_tokens=480, script={"first_s": 0.5}) for _ in range(3)]
        assert sorted(each.result().status_code for each in asked) == [200, 200, 429]
    refused = complete(keyed_gateway, BOB)
    assert refused.status_code == 429
    assert error_of(refused)["code"] == "quota_exceeded"
    assert int(refused.headers["retry-after"]) > 60
    assert complete(keyed_gateway, ALICE).status_code == 200


@pytest.mark.fault("S23")
def test_logs_hold_neither_prompts_nor_keys(keyed_gateway: Gateway) -> None:
    complete(keyed_gateway, ALICE, prompt="the secret recipe")
    complete(keyed_gateway, "sk-mistyped-key", prompt="the secret recipe")
    text = keyed_gateway.stderr + keyed_gateway.stdout
    assert '"key": "alice"' in text
    for secret in ("secret recipe", ALICE, "sk-mistyped-key", hash_key(ALICE)):
        assert secret not in text


@pytest.mark.timing
@pytest.mark.fault("S8")
def test_a_full_server_says_429_at_once(start: StartGateway) -> None:
    gateway = start(queue_size=1).until_ready()  # 65 blocks of 16 tokens, one of them vLLM's own: 1024 tokens
    slow = {"first_s": 5}
    threads = [threading.Thread(target=complete, args=(gateway,), kwargs={"max_tokens": 500, "script": slow}) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: gateway.metric('ard_queue_length{lane="short"}') == 1)
    started = time.monotonic()
    response = complete(gateway, max_tokens=500)
    elapsed_s = time.monotonic() - started
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert elapsed_s < 0.5  # 50 ms and a client's start on a loaded test machine
    for thread in threads:
        thread.join()


def test_a_client_that_stops_reading_ends_at_its_deadline(start: StartGateway) -> None:
    gateway = start(request_timeout_s=1.5).until_ready()
    with send(gateway, stream=True, max_tokens=500, script={"tokens": 200_000}):
        wait_for(lambda: bool(gateway.engine_events("start")))
        wait_for(lambda: bool(gateway.engine_events("cancelled")))
        wait_for(lambda: gateway.metric("ard_requests_in_flight") == 0)


def test_a_thousand_disconnects_leak_nothing(open_gateway: Gateway, record_property: Callable[[str, object], None]) -> None:
    fds = Path(f"/proc/{open_gateway.process.pid}/fd")
    body = json.dumps({"prompt": PROMPT, "stream": True, "user": json.dumps({"tokens": 100, "gap_s": 0.05})}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    async def leave() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", open_gateway.port)
        writer.write(request)
        await reader.readline()
        writer.transport.abort()

    async def leave_many(count: int) -> None:
        for _ in range(count // 20):
            await asyncio.gather(*(leave() for _ in range(20)))

    asyncio.run(leave_many(40))
    wait_for(lambda: open_gateway.metric("ard_requests_in_flight") == 0)
    before = len(list(fds.iterdir()))
    asyncio.run(leave_many(1000))
    wait_for(lambda: open_gateway.metric("ard_requests_in_flight") == 0)
    wait_for(lambda: len(list(fds.iterdir())) <= before + 2)
    assert open_gateway.metric("ard_kv_reserved_tokens") == 0
    record_property("file descriptors before and after", f"{before}, {len(list(fds.iterdir()))}")


def test_a_plan_says_what_a_request_would_take(open_gateway: Gateway) -> None:
    complete(open_gateway, stream=True, script={"tokens": 4, "gap_s": 0.05})
    sent = len(open_gateway.engine_events("start"))
    with open_gateway.client() as client:
        plan = client.post("/v1/plan", json={"prompt": [1] * 200, "max_tokens": 100, "n": 2}).json()
        assert client.post("/v1/plan", json={"prompt": [1] * 600}).status_code == 400
    assert plan["kv_tokens"] == 2 * 304
    assert (plan["fits"], plan["lane"], plan["requests_waiting"]) == (True, "short", 0)
    assert plan["estimated_last_token_s"] > 100 * 0.02
    assert len(open_gateway.engine_events("start")) == sent


def test_an_answer_beyond_the_measured_length_is_marked(start: StartGateway, tmp_path: Path) -> None:
    model = write_export(tmp_path / "tiny", served_limit=256)
    gateway = start(model=str(model), max_model_len=512, beyond_measured="mark").until_ready()
    mark = "x-ard-beyond-measured"
    assert mark not in complete(gateway, prompt=[1] * 100, max_tokens=156).headers
    assert complete(gateway, prompt=[1] * 100, max_tokens=157).headers[mark] == "256"
    assert complete(gateway, prompt="x" * 250, max_tokens=8, stream=True).headers[mark] == "256"
    assert gateway.metric('ard_model_info{base="base",model="tiny",recipe="default",served_limit="256"}') == 1
    with gateway.client() as client:
        assert client.post("/v1/plan", json={"prompt": [1] * 300}).json()["beyond_measured"] is True


@pytest.mark.fault("S19")
def test_only_messages_with_control_tokens_are_rewritten(start: StartGateway, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    tokens = [{"content": "<|im_end|>", "special": True}, {"content": "<think>", "special": False}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    gateway = start(model=str(folder)).until_ready()
    typed = {"role": "user", "content": [{"type": "text", "text": "<|im_end|><think>"}]}
    messages = [{"role": "system", "content": "<|im_end|>"}, typed]
    with gateway.client() as client:
        client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    seen = json.loads(gateway.engine_events("start")[-1]["body"])["messages"]
    assert seen[0]["content"] == "<|im_end|>"
    assert seen[1]["content"][0]["text"] == "<\u2060|im_end|><think>"


def test_the_metrics_port_needs_no_key_and_has_nothing_else(start: StartGateway, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.alice]\nsha256 = "{hash_key(ALICE)}"\n')
    gateway = start(api_keys=str(path), metrics_port=0).until_ready()
    url = re.findall(r"listening on (\S+), metrics", gateway.stdout)[0]
    assert 'ard_ready{engine="0"} 1.0' in httpx.get(f"{url}/metrics").text
    assert httpx.post(f"{url}/v1/completions", json={}).status_code == httpx.get(f"{url}/livez/").status_code == 404
