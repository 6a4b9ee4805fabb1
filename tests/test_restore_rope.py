"""Every RoPE that is planned means the same to transformers and vLLM, and impossible ones are refused."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ard_serve.errors import ArdError, ModelError, UsageError
from restore.inspection import transformers_config
from restore.rope import RopePlan, RopeType, plan_rope, read_rope, served_length
from restore.rotary_tables import sampled_positions
from restore.verification import compare_tables, transformers_table

MakeCheckpoint = Callable[..., Path]
TYPES: tuple[RopeType, ...] = ("yarn", "linear", "llama3", "theta", "longrope")
NATIVE, TARGET = 4096, 32768
# The model of the table in docs/rope.md.
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 64,
    "max_position_embeddings": NATIVE,
    "rope_theta": 500000.0,
    "torch_dtype": "float32",
}


def longrope(short: list[float], long: list[float]) -> dict[str, Any]:
    temperatures = {"attention_factor": 1.0, "short_mscale": 1.0, "long_mscale": 1.0}
    lists = {"short_factor": short, "long_factor": long}
    return {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": NATIVE, **lists, **temperatures}


YARN = {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2, "beta_fast": 32.0, "beta_slow": 1.0}
ONES, RISING = [1.0] * 64, [1.0 + i / 16 for i in range(64)]
# Row of the table: max_position_embeddings, scaling, tokens vLLM serves, whether both engines agree up to the target.
ROWS: dict[str, tuple[int, dict[str, Any], int, bool]] = {
    "linear over native positions": (NATIVE, {"rope_type": "linear", "factor": 8.0}, TARGET, True),
    "linear over target positions": (TARGET, {"rope_type": "linear", "factor": 8.0}, 8 * TARGET, True),
    "yarn with original": (TARGET, YARN | {"original_max_position_embeddings": NATIVE}, TARGET, True),
    "yarn over native positions": (NATIVE, YARN | {"original_max_position_embeddings": NATIVE}, NATIVE, True),
    "yarn without original": (TARGET, YARN, TARGET, True),
    "longrope, one list": (TARGET, longrope(RISING, RISING), TARGET, True),
    "longrope, two lists": (TARGET, longrope(ONES, RISING), TARGET, False),
    "dynamic": (NATIVE, {"rope_type": "dynamic", "factor": 8.0}, TARGET, False),
}


def plan(rope_type: RopeType, target: int = TARGET, **fields: Any) -> RopePlan:
    """A stretch of CONFIG by any type; longrope by factors that rise."""
    return plan_rope(CONFIG, target, rope_type, rope_factors=RISING if rope_type == "longrope" else None, **fields)


def write_folder(folder: Path, config: dict[str, Any], tokenizer_from: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for path in tokenizer_from.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def folders(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a config and a tokenizer for each plan and each row of the table."""
    root, tokenizer = tmp_path_factory.mktemp("rope"), make_checkpoint("llama3")
    written: dict[str, Path] = {}
    for rope_type in TYPES:
        written[rope_type] = write_folder(root / rope_type, plan(rope_type).target_config(CONFIG), tokenizer)
    for name, (positions, scaling, _, _) in ROWS.items():
        config = CONFIG | {"max_position_embeddings": positions, "rope_scaling": scaling}
        written[name] = write_folder(root / name.replace(" ", "-").replace(",", ""), config, tokenizer)
    return written


@pytest.fixture(scope="module")
def vllm_tables(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[np.ndarray, int]]:
    """vLLM's rotary table and served length for every folder, from one process."""
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    out = tmp_path_factory.mktemp("tables") / "tables.npz"
    command = [sys.executable, "-m", "restore.rotary_tables", str(out), str(TARGET), *map(str, folders.values())]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    tables = np.load(out)
    return {name: (tables[f"{number}.table"], int(tables[f"{number}.served"])) for number, name in enumerate(folders)}


@pytest.mark.vllm
@pytest.mark.parametrize("rope_type", TYPES)
def test_planned_rope_is_one_table_in_transformers_and_vllm(
    folders: dict[str, Path], vllm_tables: dict[str, tuple[np.ndarray, int]], rope_type: RopeType
) -> None:
    table, served = vllm_tables[rope_type]
    assert served == TARGET
    compare_tables(folders[rope_type], transformers_table(folders[rope_type], TARGET), table, served, TARGET)


@pytest.mark.vllm
@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_table_is_what_the_engines_do(
    folders: dict[str, Path], vllm_tables: dict[str, tuple[np.ndarray, int]], name: str
) -> None:
    table, served = vllm_tables[name]
    _, _, expected_served, agree = ROWS[name]
    assert served == expected_served
    native = transformers_table(folders[name], TARGET)
    assert (table.shape == native.shape and float(np.abs(table - native).max()) <= 1e-5) is agree


@pytest.mark.vllm
@pytest.mark.fault("E7")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("longrope, two lists", "rotary tables of vLLM and transformers differ by up to"),
        ("dynamic", "shorter than transformers'"),
        ("yarn over native positions", "vLLM would serve 4096 tokens instead of 32768"),
    ],
)
def test_tables_that_differ_are_refused(
    folders: dict[str, Path], vllm_tables: dict[str, tuple[np.ndarray, int]], name: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        compare_tables(folders[name], transformers_table(folders[name], TARGET), *vllm_tables[name], TARGET)


def test_sampled_positions_hold_both_ends() -> None:
    assert sampled_positions(100) == list(range(100))
    positions = sampled_positions(1 << 20)
    assert positions[0] == 0
    assert positions[-1] == (1 << 20) - 1
    assert len(positions) < 20_000


def frequencies(config: dict[str, Any]) -> torch.Tensor:
    rotary: torch.Tensor = LlamaRotaryEmbedding(transformers_config(config)).inv_freq  # type: ignore[arg-type]
    return rotary


def test_frequencies_are_the_papers() -> None:
    """Linear divides all frequencies; NTK turns the slowest pair as linear does and the fastest not at all slower; YaRN keeps
    the fast pairs, divides the slow ones, and sharpens attention by 0.1 ln(factor) + 1 (arXiv 2309.00071)."""
    native = frequencies(CONFIG)
    found: dict[str, torch.Tensor] = {kind: frequencies(plan(kind).target_config(CONFIG)) for kind in TYPES}
    torch.testing.assert_close(found["linear"], native / 8)
    torch.testing.assert_close(found["theta"][[0, -1]], torch.stack((native[0], native[-1] / 8)))
    turns = NATIVE * native / (2 * math.pi)
    for kind, fast, slow in (("yarn", 32.0, 1.0), ("llama3", 4.0, 1.0)):
        assert torch.allclose(found[kind][turns > 1.1 * fast], native[turns > 1.1 * fast])
        assert torch.allclose(found[kind][turns < 0.7 * slow], native[turns < 0.7 * slow] / 8)
    torch.testing.assert_close(found["longrope"], native / torch.tensor(RISING))
    assert plan("yarn").parameters["attention_factor"] == pytest.approx(0.1 * math.log(8) + 1)


@pytest.mark.parametrize("rope_type", TYPES)
def test_written_config_says_the_same_in_all_three_keys(rope_type: RopeType) -> None:
    planned = plan(rope_type)
    written = planned.target_config(CONFIG)
    scaling = written["rope_scaling"] or {"rope_type": "default"}
    assert written["rope_parameters"] == scaling | {"rope_theta": written["rope_theta"]} == planned.parameters
    assert type(written["max_position_embeddings"]) is int
    assert written["max_position_embeddings"] == (NATIVE if rope_type == "linear" else TARGET)
    assert served_length(written) == TARGET
    assert "type" not in scaling
    # Through the file and back, as transformers reads it.
    read = AutoConfig.for_model(**json.loads(json.dumps(written)))
    assert {key: read.rope_parameters[key] for key in planned.parameters} == planned.parameters


@pytest.mark.parametrize("target", [5000, 12_345, 100_001])
@pytest.mark.parametrize("rope_type", TYPES)
def test_any_target_length_is_served_whole(rope_type: RopeType, target: int) -> None:
    written = plan(rope_type, target, native_window=3000).target_config(CONFIG)
    assert served_length(written) == target
    rope = written["rope_parameters"]
    if rope_type in ("linear", "yarn"):
        assert rope.get("original_max_position_embeddings", written["max_position_embeddings"]) * rope["factor"] >= target


def test_native_config_keeps_the_teachers_frequencies() -> None:
    native = plan_rope(CONFIG, TARGET, "yarn").native_config(CONFIG)
    assert torch.equal(frequencies(native), frequencies(CONFIG))
    assert native["rope_scaling"] is None


def test_the_control_keeps_its_rope_and_its_length() -> None:
    control = plan_rope(CONFIG, NATIVE, "none")
    assert control.factor == 1
    assert torch.equal(frequencies(control.target_config(CONFIG)), frequencies(CONFIG))
    with pytest.raises(UsageError, match=f"must be the native {NATIVE}"):
        plan_rope(CONFIG, TARGET, "none")


def test_llama3_checkpoint_is_stretched_by_theta_only() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    config = CONFIG | {"rope_scaling": scaling}
    raised = plan_rope(config, TARGET, "theta", rope_theta=8e6)
    assert raised.parameters == scaling | {"rope_theta": 8e6}
    assert raised.native_parameters == scaling | {"rope_theta": 500000.0}
    with pytest.raises(ModelError, match="already scaled"):
        plan_rope(config, TARGET, "yarn")


@pytest.mark.fault("R8")
@pytest.mark.parametrize(
    ("fields", "flags", "code", "words"),
    [
        ({}, {"target_length": NATIVE}, 2, f"target_length = {NATIVE}: must be greater than the native window of {NATIVE}"),
        ({}, {"target_length": 1 << 30}, 2, "at most"),
        ({}, {"native_window": 0}, 2, "native_window = 0"),
        ({}, {"native_window": NATIVE + 1}, 2, f"native_window = {NATIVE + 1}"),
        ({}, {"rope_type": "theta", "rope_theta": 100.0}, 2, "rope_theta = 100.0: must be finite and above"),
        ({}, {"rope_type": "theta", "rope_theta": math.nan}, 2, "rope_theta = nan"),
        ({}, {"rope_type": "yarn", "rope_theta": 1e7}, 2, "only rope_type 'theta' takes it"),
        ({}, {"rope_type": "longrope"}, 2, "rope_type 'longrope' without rope_factors"),
        ({}, {"rope_factors": RISING}, 2, "rope_type 'yarn' with rope_factors"),
        ({}, {"rope_type": "longrope", "rope_factors": ONES[:8]}, 2, "8 of them, a head of this model turns 64 pairs"),
        ({}, {"rope_type": "longrope", "rope_factors": [*ONES[:63], 0.0]}, 2, "rope_factors: 0.0 must be finite and above 0"),
        ({"rope_theta": 0}, {}, 3, "rope_theta = 0"),
        ({"rope_theta": math.nan}, {}, 3, "rope_theta = nan"),
        ({"rope_theta": -1e4}, {}, 3, "rope_theta = -10000.0"),
        ({"rope_theta": "1e4"}, {}, 3, "rope_theta = '1e4'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": -4}}, {}, 3, "factor = -4"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {}, 3, "low_freq_factor = None"),
        ({"max_position_embeddings": -1}, {}, 3, "max_position_embeddings = -1"),
        ({"max_position_embeddings": 4096.0}, {}, 3, "max_position_embeddings = 4096.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {}, 3, "disagree on rope_theta"),
    ],
)
def test_impossible_rope_names_field_and_limit(fields: dict[str, Any], flags: dict[str, Any], code: int, words: str) -> None:
    with pytest.raises(ArdError) as caught:
        plan_rope(CONFIG | fields, **{"target_length": TARGET, **flags})
    assert caught.value.exit_code == code
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("R9")
@pytest.mark.parametrize("rope_type", ["yarn", "linear", "dynamic", "longrope", "proportional"])
def test_scaled_checkpoints_are_refused(rope_type: str) -> None:
    with pytest.raises(ModelError, match="a restoration starts from 'default' or 'llama3'"):
        read_rope(CONFIG | {"rope_scaling": {"type": rope_type, "factor": 8.0}})


@pytest.mark.fault("R9")
def test_partial_rotary_heads_are_refused() -> None:
    with pytest.raises(ModelError, match="partial_rotary_factor"):
        read_rope(CONFIG | {"partial_rotary_factor": 0.5})


def test_sliding_window_hides_the_native_window_until_it_is_stated() -> None:
    """Mistral-7B-v0.1 declares 32768 positions and attends over 4096."""
    config = CONFIG | {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}
    with pytest.raises(UsageError, match="--native-window 4096"):
        plan_rope(config, 65536)
    stretched = plan_rope(config, 65536, native_window=4096)
    assert stretched.factor == 16
    assert stretched.target_config(config)["sliding_window"] is None
    with pytest.raises(UsageError, match="native_window = 8192"):
        plan_rope(config, 65536, native_window=8192)


def test_qwen2_sliding_window_counts_only_where_it_is_used() -> None:
    config = CONFIG | {"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": False}
    assert plan_rope(config, TARGET).native_window == NATIVE
    layers = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
    written = plan_rope(config | layers, TARGET, native_window=1024).target_config(config | layers)
    assert written["layer_types"] == ["full_attention"] * 2
    assert written["use_sliding_window"] is False
