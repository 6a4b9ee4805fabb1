"""KV arithmetic against published shapes, and `--predict` against what vLLM 0.32 reported on this project's machine."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ard_serve.errors import ModelError, ResourceError
from loadtests.config import PredictConfig
from loadtests.memory import fitting_concurrency, kv_shape, peak_use
from loadtests.predict import predict
from loadtests.predict import run as run_predict
from loadtests.records import RequestRecord
from loadtests.units import parse_bytes

LLAMA3_8B = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
             "torch_dtype": "bfloat16", "max_position_embeddings": 8192}  # fmt: skip
DEEPSEEK_V3 = {"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "hidden_size": 7168,
               "kv_lora_rank": 512, "qk_rope_head_dim": 64, "dtype": "bfloat16"}  # fmt: skip
GPT_OSS_20B = {"num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
               "hidden_size": 2880, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12,
               "dtype": "bfloat16"}  # fmt: skip
QWEN3_NEXT = {"num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
              "hidden_size": 2048, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12,
              "dtype": "bfloat16"}  # fmt: skip
NEMOTRON_H_8B = {"num_hidden_layers": 52, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                 "hidden_size": 4096, "torch_dtype": "bfloat16",
                 "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"}  # fmt: skip
JAMBA = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
         "torch_dtype": "bfloat16", "attn_layer_period": 8, "attn_layer_offset": 4}  # fmt: skip
GEMMA3_1B = {"num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
             "hidden_size": 1152, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16"}  # fmt: skip
SMOLLM2 = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "hidden_size": 576,
           "dtype": "bfloat16", "max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "kind", "bytes_per_token"),
    [(LLAMA3_8B, "grouped-query", 131_072), (DEEPSEEK_V3, "latent", 70_272), (GPT_OSS_20B, "grouped-query", 49_152),
     (QWEN3_NEXT, "hybrid", 24_576), (SMOLLM2, "grouped-query", 23_040), (NEMOTRON_H_8B, "hybrid", 16_384),
     (JAMBA, "hybrid", 16_384), (GEMMA3_1B, "grouped-query", 26_624)],
    ids=["llama-3-8b", "deepseek-v3", "gpt-oss-20b", "qwen3-next", "smollm2-135m", "nemotron-h-8b", "jamba", "gemma-3-1b"],
)  # fmt: skip
def test_bytes_per_token(config: dict[str, Any], kind: str, bytes_per_token: int) -> None:
    shape = kv_shape(config)
    assert (shape.kind, shape.bytes_per_token) == (kind, bytes_per_token)


def test_sliding_windows_stop_growing() -> None:
    shape = kv_shape(GPT_OSS_20B)
    assert shape.bytes_for(100) == 100 * 49_152
    assert shape.bytes_for(10_000) == (10_000 + 128) * 24_576


def test_mistral_7b_with_a_window_on_every_layer() -> None:
    shape = kv_shape(LLAMA3_8B | {"sliding_window": 4096})
    assert shape.bytes_for(32_768) == 4096 * 131_072
    assert kv_shape(LLAMA3_8B | {"sliding_window": 4096, "use_sliding_window": False}).bytes_for(32_768) == 32_768 * 131_072


def test_windows_that_a_pattern_places() -> None:
    assert kv_shape(GEMMA3_1B).bytes_for(10_000) == 4 * 1024 * 10_000 + 22 * 1024 * 512
    gemma2 = {key: value for key, value in GEMMA3_1B.items() if key != "sliding_window_pattern"} | {"model_type": "gemma2"}
    assert kv_shape(gemma2).bytes_for(10_000) == 13 * 1024 * (10_000 + 512)


def test_chunked_attention_holds_its_chunk_and_shared_layers_nothing() -> None:
    chunked = LLAMA3_8B | {"layer_types": ["chunked_attention"] * 24 + ["full_attention"] * 8, "attention_chunk_size": 8192}
    assert kv_shape(chunked).bytes_for(100_000) == 4096 * (24 * 8192 + 8 * 100_000)
    assert kv_shape(LLAMA3_8B | {"num_kv_shared_layers": 12}).bytes_per_token == 20 * 4096


def test_quantised_checkpoint_states_its_cache() -> None:
    quantised = LLAMA3_8B | {"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}}
    assert kv_shape(quantised).bytes_per_token == 65_536
    assert kv_shape(quantised, "bfloat16").bytes_per_token == 131_072


def test_fp8_halves_and_tensor_parallel_splits_heads_down_to_one() -> None:
    assert kv_shape(LLAMA3_8B, "fp8").bytes_per_token == 65_536
    assert kv_shape(LLAMA3_8B, tensor_parallel=4).bytes_per_token == 32_768
    assert kv_shape(LLAMA3_8B, tensor_parallel=16).bytes_per_token == 16_384
    assert kv_shape(DEEPSEEK_V3, tensor_parallel=8).bytes_per_token == 70_272
    assert kv_shape(QWEN3_NEXT).state_layers == 36


@pytest.mark.parametrize("missing", ["num_hidden_layers", "num_attention_heads"])
def test_missing_field_is_named(missing: str) -> None:
    with pytest.raises(ModelError, match=missing):
        kv_shape({key: value for key, value in LLAMA3_8B.items() if key != missing})


def test_fitting_concurrency_counts_whole_blocks() -> None:
    # The pool that vLLM 0.32 made of 2 GiB for SmolLM2: 727 usable blocks of 128 tokens.
    assert fitting_concurrency(1040, 727 * 128, 128) == 80
    assert fitting_concurrency(8192, 727 * 128, 128) == 11


def test_peak_use_adds_requests_that_overlap() -> None:
    def record(sent_s: float, prompt_tokens: int) -> RequestRecord:
        return RequestRecord(cell="c", repeat=0, index=0, role="measured", outcome="ok", prompt_tokens=prompt_tokens,
                             output_tokens=16, planned_s=sent_s, sent_s=sent_s, ttft_ms=100, e2e_ms=1100)  # fmt: skip

    pool = 100 * 16
    assert peak_use([], pool, 16) is None
    # A prompt of 160 tokens and the 15 of 16 outputs that are cached: 11 blocks.
    assert peak_use([record(0, 160)], pool, 16) == pytest.approx(0.11)
    assert peak_use([record(0, 160), record(5, 160)], pool, 16) == pytest.approx(0.11)
    assert peak_use([record(0, 160), record(0, 320)], pool, 16) == pytest.approx(0.32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2), encoding="utf-8")
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1024, 512], "data_offsets": [0, 1 << 20]}}).encode()
    body = np.zeros(1 << 20, dtype=np.uint8).tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)
    return tmp_path


def test_predict_needs_no_server(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = PredictConfig(model=model, gpu_memory="2GiB", overhead="1MiB", gpu_memory_utilization=1, output_tokens=16)
    found = predict(config)
    assert found.weights_bytes == 1 << 20
    assert found.pool_bytes == (2 << 30) - (2 << 20)
    assert list(found.fits) == [1024, 2048, 4096, 8176]
    assert found.fits[8176] == found.pool_bytes // (8192 * 23_040) == 11
    assert found.longest_tokens // 16 == found.pool_bytes // 23_040 // 16
    assert run_predict(config) == 0
    assert "23,040 bytes of KV per token" in " ".join(capsys.readouterr().out.split())


def test_predict_follows_a_linear_stretch(model: Path) -> None:
    stretched = SMOLLM2 | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    (model / "config.json").write_text(json.dumps(stretched), encoding="utf-8")
    found = predict(PredictConfig(model=model, gpu_memory="4GiB", output_tokens=16))
    assert max(found.fits) == 32_768 - 16


def test_predict_says_what_would_be_enough(model: Path) -> None:
    with pytest.raises(ResourceError, match=r"use more than 2\.17 GiB a GPU") as raised:
        predict(PredictConfig(model=model, gpu_memory="1GiB"))
    assert raised.value.exit_code == 5


def test_predict_without_weights_asks_for_their_size(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="--weights-memory"):
        predict(PredictConfig(model=model))
    assert predict(PredictConfig(model=model, weights_memory="16GB", tensor_parallel=2)).weights_bytes == 8 * 10**9


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 << 30), ("24 GB", 24 * 10**9), ("1.5KiB", 1536), ("77", 77)])
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80 boxes", "GiB", "4GB0", ""])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size in bytes"):
        parse_bytes(text)
