"""What engines print on /metrics, as captured from a running vLLM 0.32 and as SGLang and llama.cpp document theirs."""

import json
from pathlib import Path

from loadtests.address import Address
from loadtests.engine import parse
from loadtests.kv_report import describe_kv
from loadtests.prompts import Words
from loadtests.records import RunResult
from loadtests.target import Target

VLLM = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 16.0
vllm:prefix_cache_hits_created{engine="0",model_name="m"} 1.7954920865360727e+09
vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 99.0
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
vllm:num_preemptions_total{engine="1",model_name="m"} 3.0
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7954920865361342e+09
vllm:cache_config_info{block_size="128",engine="0",kv_cache_memory_bytes="2147483648",num_gpu_blocks="728",num_gpu_blocks_override="None"} 1.0
"""  # noqa: E501 - a line of vLLM's
SGLANG = """# TYPE sglang:token_usage gauge
sglang:token_usage{model_name="m",tp_rank="0"} 0.28
sglang:num_running_reqs{model_name="m",tp_rank="0"} 4.0
sglang:max_total_num_tokens{model_name="m",tp_rank="0"} 40960.0
sglang:max_total_num_tokens_swa{model_name="m",tp_rank="0"} 1.0
sglang:page_size{model_name="m",tp_rank="0"} 64.0
"""
SGLANG_LATER = (
    SGLANG
    + """sglang:cached_tokens_total{model_name="m",cache_source="device"} 30.0
sglang:cached_tokens_total{model_name="m",cache_source="host"} 2.0
sglang:num_retracted_requests_total{model_name="m",tp_rank="0"} 3.0
"""
)
LLAMA_CPP = "llamacpp:kv_cache_usage_ratio 0.5\nllamacpp:requests_processing 1\nllamacpp:prompt_tokens_total 512\n"
LLAMA_CPP += "llamacpp:prompt_tokens_cached_total 8\n"


def test_vllm_counters_add_up_over_engines_and_the_fullest_cache_counts() -> None:
    snapshot = parse(VLLM)
    assert snapshot.values == {"running": 3, "waiting": 1, "kv_use": 0.75, "cached_tokens": 16, "preemptions": 5}
    assert snapshot.labels["num_gpu_blocks"] == "728"


def test_rise_of_a_counter() -> None:
    before, after = (
        parse(VLLM),
        parse(VLLM.replace('total{engine="1",model_name="m"} 3.0', 'total{engine="1",model_name="m"} 7.0')),
    )
    assert after.rise(before, "preemptions") == 4
    assert after.rise(before, "output_tokens") is None
    assert after.rise(parse(""), "preemptions") is None


def test_a_counter_that_appears_with_its_first_event_rose_from_nothing() -> None:
    before, after = parse(SGLANG), parse(SGLANG_LATER)
    assert (after.rise(before, "cached_tokens"), after.rise(before, "preemptions")) == (32, 3)


def test_other_engines_report_what_they_have() -> None:
    assert parse(SGLANG).values == {"kv_use": 0.28, "running": 4, "kv_tokens": 40960, "block_tokens": 64}
    assert parse(LLAMA_CPP).values == {"kv_use": 0.5, "running": 1, "prompt_tokens": 512, "cached_tokens": 8}
    assert parse("<html>not found</html>").values == {}


def result_of(labels: dict[str, str]) -> RunResult:
    return RunResult(started_at="", command="", settings={"output_tokens": 1}, server={"cache": labels}, machine={})


def test_prediction_follows_the_dtype_that_the_engine_keeps_its_cache_in(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    target = Target(Address("http", "127.0.0.1", 1, ""), "m", "/v1/completions", Words(), {}, model_dir=tmp_path)
    for dtype, size in (("auto", 23_040), ("fp8_e4m3", 11_520)):
        assert describe_kv(result_of({"cache_dtype": dtype}), target)["bytes_per_token"] == size
    assert "KV dtype 'odd'" in describe_kv(result_of({"cache_dtype": "odd"}), target)["unknown"]


def test_reported_bytes_per_token_are_left_out_after_a_block_override() -> None:
    target = Target(
        Address("http", "127.0.0.1", 1, ""), "m", "/v1/completions", Words(), {}, kv_tokens=727 * 128, block_tokens=128
    )

    def reported(labels: dict[str, str]) -> object:
        return describe_kv(result_of(labels), target).get("reported_bytes_per_token")

    labels = parse(VLLM).labels
    assert round(float(str(reported(labels))), 1) == 23_045.6
    assert reported(labels | {"num_gpu_blocks_override": "728"}) is None
