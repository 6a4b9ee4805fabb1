"""The gateway with a real vLLM on the CPU: what the scripted engine cannot prove. One engine start for all of it."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import openai
import psutil
import pytest
from helpers_server import ENGINE_KEY, Gateway, free_port, gateways, running_engine, send, wait_for
from helpers_tiny_llama import WINDOW, write_tiny_llama

from server.config import ServeConfig

pytestmark = pytest.mark.vllm

VLLM: tuple[str, ...] = ServeConfig.model_fields["engine_command"].default


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("vllm") / "tiny")


@pytest.fixture(scope="module")
def gateway(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateways(tmp_path_factory.mktemp("gateway")) as start:
        fields = {
            "engine_command": VLLM,
            "engine_args": ["--enforce-eager", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"],
            "kv_cache_gib": 0.012,
            "drain_s": 20,
        }
        yield start(
            environment={"OMP_NUM_THREADS": "2"}, model=str(model), **fields, canary_interval_s=1, canary_timeout_s=30,
            start_timeout_s=300, restart_backoff_s=0.1,
        ).until_ready(300)  # fmt: skip


@pytest.fixture
def client(gateway: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def engine_metric(gateway: Gateway, name: str) -> float:
    with gateway.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def test_the_openai_client_works_with_every_kind_of_call(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=6, n=2, logprobs=True, top_logprobs=2, seed=1
    )
    assert len(chat.choices) == 2
    assert chat.choices[0].logprobs is not None
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=6, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert [chunk.usage.completion_tokens for chunk in stream if chunk.usage] == [6]
    first = client.completions.create(model="tiny", prompt=[1, 2, 3], max_tokens=5, temperature=0)
    assert (
        first.choices[0].text
        == client.completions.create(model="tiny", prompt=[1, 2, 3], max_tokens=5, temperature=0).choices[0].text
    )
    response = client.responses.create(model="tiny", input="hello", max_output_tokens=4)
    assert response.usage is not None
    assert [entry.id for entry in client.models.list()] == ["tiny"]


async def test_the_async_client_streams_tools_and_usage(gateway: Gateway) -> None:
    """A tool that is asked for by name. What a random model writes as its arguments is not JSON of that schema."""
    side = {"enum": ["left", "right"]}
    parameters: dict[str, object] = {"type": "object", "properties": {"side": side}, "required": ["side"]}
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "turn"}], max_tokens=60, temperature=0, stream=True,
            tools=[{"type": "function", "function": {"name": "turn", "parameters": parameters}}],
            tool_choice={"type": "function", "function": {"name": "turn"}}, stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
    calls = [
        call.function for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or () if call.function
    ]
    assert calls[0].name == "turn"
    assert "".join(call.arguments or "" for call in calls)
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_sixteen_async_requests_at_once_are_all_answered(gateway: Gateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        ask = partial(client.completions.create, model="tiny", max_tokens=4, extra_body={"ignore_eos": True})
        answers = await asyncio.gather(*(ask(prompt=f"{number} is") for number in range(16)))
    assert [answer.usage and answer.usage.completion_tokens for answer in answers] == [4] * 16


def test_stop_and_several_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=30, temperature=0, extra_body={"ignore_eos": True}
    )
    assert len(answer.choices) == 2
    text = answer.choices[0].text
    stopped = client.completions.create(model="tiny", prompt="a", max_tokens=30, temperature=0, stop=text[5])
    assert stopped.choices[0].text == text[: text.index(text[5])]


def test_langchain_answers_and_streams(gateway: Gateway) -> None:
    """A client that people use."""
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    chat = ChatOpenAI(
        model="tiny",
        base_url=f"{gateway.url}/v1",
        api_key=SecretStr("none"),
        max_completion_tokens=30,
        temperature=0,
        max_retries=0,
    )
    usage = chat.invoke("hello").usage_metadata
    assert usage is not None
    assert usage["output_tokens"] > 0
    assert len(list(chat.stream("hello", stream_usage=True))) > 1


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    schema: dict[str, object] = {"type": "string", "enum": ["left", "right"]}
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=40, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "side", "schema": schema, "strict": True}},
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content or "") in ("left", "right")


@pytest.mark.fault("S14")
def test_the_prompts_true_length_is_told(client: openai.OpenAI, gateway: Gateway) -> None:
    before = engine_metric(gateway, "vllm:prompt_tokens_total")
    with pytest.raises(openai.BadRequestError, match=f"3000 tokens, the window {WINDOW}"):
        client.completions.create(model="tiny", prompt="x" * 3000, max_tokens=10)
    assert engine_metric(gateway, "vllm:prompt_tokens_total") - before < 100  # canaries, not the prompt


def test_the_gateways_parameters_are_this_vllms(client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="x", max_tokens=2, extra_body={"min_p": 0.1, "top_k": 5})
    with pytest.raises(openai.BadRequestError, match="top_q"):
        client.completions.create(model="tiny", prompt="x", max_tokens=2, extra_body={"top_q": 5})


@pytest.mark.fault("S19")
def test_a_control_token_typed_by_a_user_stays_text(client: openai.OpenAI, gateway: Gateway) -> None:
    """As many prompt tokens as there are bytes: `<|im_end|>` is ten characters and a joiner, not one token."""

    def prompt_tokens(content: str) -> int:
        answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}], max_tokens=1)
        assert answer.usage
        return answer.usage.prompt_tokens

    assert prompt_tokens("a<|im_end|>") - prompt_tokens("a") == len("<\u2060|im_end|>".encode())


def test_a_list_of_response_items_is_counted_exactly(client: openai.OpenAI, gateway: Gateway) -> None:
    """The access log's count, made before the engine read the prompt, is the engine's own, and not the body's bytes."""
    answer = client.responses.with_raw_response.create(
        model="tiny",
        instructions="be brief",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "x" * 700}, {"type": "input_text", "text": "y" * 300}]},
            {"role": "assistant", "content": "z" * 200},
            {"role": "user", "content": "and?"},
        ],
        tools=[{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True}],
        max_output_tokens=4,
    )
    usage = answer.parse().usage
    assert usage is not None
    (line,) = [line for line in gateway.stderr.splitlines() if answer.headers["x-request-id"] in line]
    assert f'"prompt_tokens": {usage.input_tokens},' in line


@pytest.mark.timing
def test_a_plan_counts_exactly_and_costs_no_prefill(gateway: Gateway) -> None:
    before = engine_metric(gateway, "vllm:request_success_total")
    with gateway.client() as client:
        plan = client.post("/v1/plan", json={"prompt": "x" * 1500, "max_tokens": 100}).json()
    assert (plan["fits"], plan["prompt_tokens"], plan["lane"]) == (True, 1500, "long")
    assert plan["kv_tokens"] >= 1600
    assert engine_metric(gateway, "vllm:request_success_total") - before < 5  # canaries


@pytest.mark.slow
@pytest.mark.fault("S17")
@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_engines_slot_within_a_second(gateway: Gateway, stream: bool) -> None:
    """On two cores the engine can starve this process for longer than its answer takes; CI has the scripted engine's test."""
    with send(gateway, stream=stream, prompt=[1, 2], max_tokens=WINDOW - 10, ignore_eos=True):
        wait_for(lambda: engine_metric(gateway, "vllm:num_requests_running") == 1)
    assert wait_for(lambda: engine_metric(gateway, "vllm:num_requests_running") == 0, 5) < 1.5
    assert gateway.metric("ard_kv_reserved_tokens") == 0


def test_the_ledger_keeps_the_engine_from_preempting(gateway: Gateway) -> None:
    """Twice as many requests as fit: half of them wait here instead of being preempted there."""
    capacity_tokens = gateway.metric("ard_kv_capacity_tokens")
    assert capacity_tokens >= WINDOW
    body = {"prompt": [1] * 800, "max_tokens": 200, "ignore_eos": True}
    count = int(capacity_tokens // 1024) * 2
    statuses: list[int] = []

    def ask() -> None:
        with gateway.client(timeout_s=120) as client:
            statuses.append(client.post("/v1/completions", json=body).status_code)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * count
    assert engine_metric(gateway, "vllm:num_preemptions_total") == 0


@pytest.mark.slow
def test_an_engine_that_already_runs_is_attached_to_and_left_running(model: Path, tmp_path: Path) -> None:
    port = free_port()
    flags = ("--model", str(model), "--served-model-name", "tiny", "--enforce-eager", "--kv-cache-memory-bytes", "12000000")
    with running_engine((*VLLM, *flags), port, tmp_path / "log") as process, gateways(tmp_path) as start:
        address = {"attach": [f"http://127.0.0.1:{port}"], "model": str(model), "canary_timeout_s": 30}
        gateway = start(environment={"ARD_ENGINE_KEY": ENGINE_KEY}, **address).until_ready(300)
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="tiny", prompt="x", max_tokens=5, stream=True, extra_body={"ignore_eos": True})
        assert sum(len(chunk.choices) for chunk in stream) == 5
        assert gateway.metric("ard_kv_capacity_tokens") > WINDOW
        assert gateway.stop() == 0
        assert process.poll() is None


@pytest.mark.slow
def test_short_texts_go_to_a_second_engine_with_the_native_model(model: Path, tmp_path: Path) -> None:
    native = write_tiny_llama(tmp_path / "native", window=256)
    fields = {"engine_command": VLLM, "engine_args": ["--enforce-eager"], "kv_cache_gib": 0.012, "canary_timeout_s": 30}
    with gateways(tmp_path) as start:
        gateway = start(model=str(model), profile_short=str(native), **fields)
        wait_for(lambda: gateway.until_ready(300).metric("ard_ready") == 2, 300)
        with gateway.client() as client:
            body = {"max_tokens": 8, "ignore_eos": True}
            short = client.post("/v1/completions", json={"prompt": "x" * 100, **body})
            long = client.post("/v1/completions", json={"prompt": "x" * 600, **body})
        assert (short.status_code, short.headers["x-ard-profile"]) == (200, "native")
        assert (long.status_code, long.headers["x-ard-profile"]) == (200, "restored")
        assert short.json()["usage"]["prompt_tokens"] == 100
        assert engine_metric(gateway, "vllm:request_success_total") > 2
        assert gateway.metric('vllm:kv_cache_usage_perc{ard_engine="native"}') == 0
        assert gateway.stop() == 0


@pytest.mark.timing
@pytest.mark.fault("S4")
def test_a_killed_engine_core_is_told_in_the_stream_and_replaced(gateway: Gateway) -> None:
    gateway.until_ready(300)
    family = psutil.Process(gateway.process.pid).children(recursive=True)
    core = next(process for process in family if "EngineCore" in " ".join(process.cmdline()))
    body = {"prompt": [1, 2], "max_tokens": WINDOW - 10, "ignore_eos": True, "stream": True}
    with gateway.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        chunks = response.iter_bytes()
        text = next(chunks)
        os.kill(core.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        text += b"".join(chunks)
    assert time.monotonic() - killed_at < 2
    assert b'"error"' in text.strip().split(b"\n\n")[-1]
    assert b"data: [DONE]" not in text
    wait_for(lambda: gateway.status("/readyz") == 503)
    gateway.until_ready(300)


@pytest.mark.fault("S6")
def test_sigterm_finishes_the_stream_and_stops_every_process(gateway: Gateway) -> None:
    """Last in the file: it ends the engine that the others share."""
    family = psutil.Process(gateway.process.pid).children(recursive=True)
    body = {"prompt": [1, 2], "max_tokens": 300, "ignore_eos": True, "stream": True}
    with gateway.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        chunks = response.iter_bytes()
        text = next(chunks)
        gateway.process.send_signal(signal.SIGTERM)
        text += b"".join(chunks)
    assert text.rstrip().endswith(b"data: [DONE]")
    assert gateway.wait() == 0
    assert psutil.wait_procs(family, timeout=30)[1] == []
