"""`--profile-short`: what is short goes to the native model, the rest to the restored, and a conversation never back."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_server import PROMPT, Gateway, StartGateway, complete, gateways, wait_for, write_export, write_model

from ard_serve import artifact
from ard_serve.artifact import Manifest, Quality, Scores
from server import capacity
from server.config import ServeConfig
from server.conversations import Conversations
from server.engine import engine_spec
from server.preflight import check_model
from server.shortmodel import short_config, short_text_loss

LIMIT = 128


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    with gateways(tmp_path_factory.mktemp("gateway")) as start:
        yield start


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A restored model of 512 tokens, and the native one of 128 that it was made from."""
    folder = tmp_path_factory.mktemp("models")
    restored = write_export(folder / "restored", served_limit=512)
    native = write_model(folder / "native", max_position_embeddings=LIMIT)
    return {"model": str(restored), "profile_short": str(native)}


@pytest.fixture(scope="module")
def gateway(start: StartGateway, models: dict[str, str]) -> Gateway:
    return both_ready(start(**models))


def both_ready(gateway: Gateway) -> Gateway:
    wait_for(lambda: gateway.until_ready().metric("ard_ready") == 2, 20)
    return gateway


def chat(gateway: Gateway, *turns: str, **fields: Any) -> httpx.Response:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
    with gateway.client() as client:
        return client.post("/v1/chat/completions", json={"messages": messages, **fields})


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "profile"), [(100, 28, "native"), (100, 29, "restored"), (300, 8, "restored")]
)
def test_prompt_and_answer_together_decide(gateway: Gateway, prompt_tokens: int, max_tokens: int, profile: str) -> None:
    for prompt in ([1] * prompt_tokens, "x" * prompt_tokens):
        response = complete(gateway, prompt=prompt, max_tokens=max_tokens)
        assert response.status_code == 200
        assert response.headers["x-ard-profile"] == profile


def test_each_profile_is_an_engine_with_its_own_model_and_window(gateway: Gateway, models: dict[str, str]) -> None:
    flags = [" ".join(event["arguments"]) for event in gateway.engine_events("engine")]
    assert f"--model {models['model']} --served-model-name restored" in flags[0]
    assert f"--model {models['profile_short']} --served-model-name restored" in flags[1]
    assert "--max-model-len 512" in flags[0]
    assert f"--max-model-len {LIMIT}" in flags[1]


def test_a_chat_that_does_not_say_its_length_leaves_half_to_the_answer(gateway: Gateway) -> None:
    assert chat(gateway, "x" * 64).headers["x-ard-profile"] == "native"
    assert json.loads(gateway.engine_events("start")[-1]["body"])["max_completion_tokens"] == LIMIT - 64
    assert chat(gateway, "y" * 65).headers["x-ard-profile"] == "restored"


def test_a_conversation_that_has_grown_never_goes_back(gateway: Gateway) -> None:
    first = ("what is a harbour?", "a place for ships")
    assert chat(gateway, first[0], max_tokens=50).headers["x-ard-profile"] == "native"
    assert chat(gateway, *first, "tell me all of it", max_tokens=400).headers["x-ard-profile"] == "restored"
    later = (*first, "tell me all of it", "it is", "thanks")
    assert chat(gateway, *later, max_tokens=8).headers["x-ard-profile"] == "restored"
    assert chat(gateway, "thanks", max_tokens=8).headers["x-ard-profile"] == "native"
    assert chat(gateway, *first, "and where?", max_tokens=8).headers["x-ard-profile"] == "native", "another branch of it"


def test_a_plan_names_the_profile_and_is_no_turn(gateway: Gateway) -> None:
    body = {"messages": [{"role": "user", "content": "planned"}], "max_tokens": 400}
    with gateway.client() as client:
        assert client.post("/v1/plan", json=body).json()["profile"] == "restored"
        assert client.post("/v1/plan", json={**body, "max_tokens": 8}).json()["profile"] == "native"


def test_both_are_counted_and_introduced(gateway: Gateway) -> None:
    assert complete(gateway, prompt=PROMPT).status_code == 200
    for name in ('ard_requests_total{profile="native"}', 'ard_ttft_seconds_count{profile="native",lane="short"}'):
        assert gateway.metric(name) > 0
    assert gateway.metric('ard_kv_capacity_tokens{engine="native"}') == gateway.metric('ard_kv_capacity_tokens{engine="0"}')
    with gateway.client() as client:
        (card,) = client.get("/v1/models").json()["data"]
    assert card["profile_short"]["limit_tokens"] == LIMIT
    assert "memory for nothing" in gateway.stderr


@pytest.mark.fault("S4")
def test_while_the_native_engine_is_away_the_restored_answers_and_it_comes_back(
    start: StartGateway, models: dict[str, str]
) -> None:
    gateway = both_ready(start(**models, restart_backoff_s=2))
    os.kill(int(gateway.engine_events("engine")[1]["pid"]), signal.SIGKILL)
    wait_for(lambda: gateway.metric('ard_ready{engine="native"}') == 0, 5)
    assert gateway.status("/readyz") == 200

    def answered() -> tuple[int, str]:
        response = complete(gateway)
        return response.status_code, response.headers["x-ard-profile"]

    wait_for(lambda: answered() == (200, "restored"), 2)  # what comes in the instant of its death may still meet it: 503
    both_ready(gateway)
    assert complete(gateway).headers["x-ard-profile"] == "native"
    assert gateway.metric('ard_engine_restarts_total{engine="native"}') == 1
    assert gateway.stop() == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"profile_short_tokens": 512}, "use --profile-short-tokens less"),
        ({"attach": ["http://127.0.0.1:9"]}, "does not go together with --attach"),
        ({"kv_cache_gib": 9000.0}, "lower --kv-cache-gib or --profile-short-kv-gib"),
    ],
)
def test_what_cannot_work_is_refused(
    start: StartGateway, models: dict[str, str], tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    wide = {**models, "profile_short": str(write_model(tmp_path / "wide"))}
    gateway = start(**(wide if "profile_short_tokens" in fields else models), **fields)
    assert gateway.wait() in (2, 5)
    assert says in gateway.stderr.splitlines()[-1]


def test_another_tokenizer_is_refused(start: StartGateway, models: dict[str, str], tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", max_position_embeddings=LIMIT)
    (other / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    gateway = start(**{**models, "profile_short": str(other)})
    assert gateway.wait() == 2
    assert "its tokenizer is not that of" in gateway.stderr.splitlines()[-1]


def test_two_models_share_a_gpu_by_arithmetic(models: dict[str, str]) -> None:
    """Weights, overhead and KV of both fill what --gpu-memory-utilization allows, a fifth of the KV for the native one."""
    gpu = 40 << 30
    config = ServeConfig(model=Path(models["model"]), profile_short=Path(models["profile_short"]))
    short = short_config(config)
    checkpoints = check_model(config), check_model(short)
    main, native = capacity.split(config, short, *checkpoints, (gpu,))
    assert main.kv_cache_gib is not None
    assert native.kv_cache_gib is not None
    assert native.kv_cache_gib == pytest.approx(main.kv_cache_gib / 4, rel=1e-3)
    shares = [float(one.engine_args[one.engine_args.index("--gpu-memory-utilization") + 1]) for one in (main, native)]
    assert sum(shares) == pytest.approx(0.92, abs=0.002)
    assert main.kv_cache_gib + native.kv_cache_gib == pytest.approx(0.92 * 40 - 4, abs=0.1)


def test_the_report_tells_whether_short_texts_lost(models: dict[str, str]) -> None:
    manifest = artifact.read_manifest(Path(models["model"]))
    assert manifest is not None
    native = Scores(perplexity={64: 30.0, 128: 31.0}, tasks={"piqa": 0.64, "lambada_perplexity": 54.0})
    restored = Scores(perplexity={64: 31.5, 128: 30.0, 512: 40.0}, tasks={"piqa": 0.62, "lambada_perplexity": 73.0})
    report: Manifest = manifest.model_copy(update={"quality": Quality(native=native, restored=restored)})
    assert short_text_loss(report, LIMIT) == ["perplexity at 64 tokens 30.0 -> 31.5", "piqa 0.640 -> 0.620"]
    assert short_text_loss(None, LIMIT) == []


def test_the_memory_of_conversations_is_bounded_and_one_owners() -> None:
    known = Conversations(limit=2)
    for text in "abc":
        known.grew("alice", [text])
    assert [known.has_grown("alice", [text, "more"]) for text in "abc"] == [False, True, True]
    assert not known.has_grown("bob", ["c"])
    assert not known.has_grown("alice", [])


def test_two_engines_on_a_cpu_are_not_bound_to_the_same_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "VLLM_CPU_OMP_THREADS_BIND"
    monkeypatch.delenv(name, raising=False)
    alone = ServeConfig(model=tmp_path)
    beside = ServeConfig(model=tmp_path, profile_short=tmp_path)
    specs = [engine_spec(config, tmp_path / "socket", "key", 512, ()) for config in (alone, beside)]
    assert [spec.environment.get(name) for spec in specs] == [None, "nobind"]
    monkeypatch.setenv(name, "0-3")
    assert engine_spec(beside, tmp_path / "socket", "key", 512, ()).environment[name] == "0-3", "the operator's word stands"
