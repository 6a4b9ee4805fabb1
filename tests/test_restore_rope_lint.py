"""Every trap of docs/rope.md is found; what has one right answer is repaired, and the rest is left alone."""

import math
from typing import Any

import pytest

from restore.rope import RopeType, plan_rope
from restore.rope_lint import diagnose, examine, notes

NATIVE, TARGET = 4096, 32768
BASE: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": NATIVE, "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": NATIVE}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LISTS = {"short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0]}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": NATIVE, **LISTS}
TEMPERATURES = {"attention_factor": 1.0, "short_mscale": 1.0, "long_mscale": 1.0}


def scaled(scaling: dict[str, Any], positions: Any = TARGET, **fields: Any) -> dict[str, Any]:
    """A config that says its scaling as transformers 4 writes it."""
    return BASE | {"max_position_embeddings": positions, "rope_scaling": scaling} | fields


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(BASE, id="native"),
        pytest.param({"model_type": "llama", "max_position_embeddings": 4096}, id="Llama 2, which states no theta"),
        pytest.param(scaled({"rope_type": "linear", "factor": 8.0}, NATIVE), id="linear"),
        pytest.param(scaled(YARN), id="yarn"),
        pytest.param(scaled(LLAMA3), id="llama3"),
        pytest.param(scaled(LLAMA3 | {"original_max_position_embeddings": 8192}, 131072), id="Llama 3.1"),
        pytest.param(scaled(LONGROPE | TEMPERATURES), id="longrope"),
    ],
)
def test_sound_configs_are_clean(config: dict[str, Any]) -> None:
    assert diagnose(config) == []
    assert examine(config)[1] is config


@pytest.mark.parametrize("rope_type", ["yarn", "linear", "llama3", "theta"])
def test_what_we_export_is_clean(rope_type: RopeType) -> None:
    config = BASE | {"hidden_size": 64, "num_attention_heads": 4}
    assert diagnose(plan_rope(config, TARGET, rope_type).target_config(config)) == []


# Config, target length if known, field of the only finding, words of its problem, what the repair must contain.
REPAIRABLE: dict[str, tuple[dict[str, Any], int | None, str, str, dict[str, Any]]] = {
    "linear over target positions": (
        scaled({"rope_type": "linear", "factor": 8.0}), TARGET, "max_position_embeddings", "would serve 262144",
        {"max_position_embeddings": NATIVE},
    ),
    "linear over target positions, original stated": (
        scaled({"rope_type": "linear", "factor": 8.0, "original_max_position_embeddings": NATIVE}), None,
        "max_position_embeddings", "would serve 262144", {"max_position_embeddings": NATIVE},
    ),
    "yarn over native positions": (
        scaled(YARN, NATIVE), None, "max_position_embeddings", "4096: engines stop there", {"max_position_embeddings": TARGET},
    ),
    "yarn past its table": (
        scaled(YARN, 131072), None, "max_position_embeddings", "table ends at 32768", {"max_position_embeddings": TARGET},
    ),
    "yarn without original": (
        scaled({"rope_type": "yarn", "factor": 8.0}), TARGET, "original_max_position_embeddings", "engines silently take 32768",
        {"rope_scaling": YARN},
    ),
    "llama3 over native positions": (
        scaled(LLAMA3, NATIVE), None, "max_position_embeddings", "engines stop there", {"max_position_embeddings": TARGET},
    ),
    "factor without a type": (
        BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "factor": 8.0}}, None, "factor",
        "would serve 32768 tokens unscaled", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "integer factor": (scaled(YARN | {"factor": 8}), None, "factor", "crashes vLLM", {"rope_scaling": YARN}),
    "float positions": (
        scaled(YARN, 32768.0), None, "max_position_embeddings", "transformers 5 refuses", {"max_position_embeddings": TARGET},
    ),
    "old type key": (
        scaled({"type": "yarn", "factor": 8.0, "original_max_position_embeddings": NATIVE}), None, "rope_scaling", "old name",
        {"rope_scaling": YARN},
    ),
    "both type keys": (
        scaled(YARN | {"type": "linear"}), None, "rope_scaling", "they differ, which vLLM refuses", {"rope_scaling": YARN},
    ),
    "saved by transformers 5": (
        {"max_position_embeddings": NATIVE, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, None,
        "rope_theta", "transformers 4 reads 10000.0 instead of 500000.0", {"rope_theta": 500000.0},
    ),
    "scaling saved by transformers 5": (
        BASE | {"max_position_embeddings": TARGET, "rope_parameters": YARN | {"rope_theta": 500000.0}}, None,
        "rope_scaling", "transformers 4 reads no yarn scaling", {"rope_scaling": YARN},
    ),
    "theta lost by setting rope_scaling": (
        {"max_position_embeddings": TARGET, "rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 500000.0}}, None,
        "rope_theta", "transformers 5 and vLLM read 10000.0", {"rope_theta": 500000.0},
    ),
    "thetas differ": (
        scaled(YARN, rope_parameters=YARN | {"rope_theta": 1e6}), None, "rope_theta", "500000.0 and 1000000.0",
        {"rope_theta": 500000.0, "rope_parameters": YARN | {"rope_theta": 500000.0}},
    ),
    "keys differ": (
        scaled(YARN, rope_parameters=YARN | {"rope_theta": 500000.0, "factor": 4.0}), None, "rope_scaling", "on factor;",
        {"rope_parameters": YARN | {"rope_theta": 500000.0}},
    ),
    "longrope with one temperature": (
        scaled(LONGROPE | {"attention_factor": 1.0}), None, "short_mscale, long_mscale", "missing",
        {"rope_scaling": LONGROPE | TEMPERATURES},
    ),
    "longrope with an outer original": (
        scaled({"rope_type": "longrope", **LISTS, **TEMPERATURES}, original_max_position_embeddings=NATIVE), None,
        "original_max_position_embeddings", "would serve only", {"rope_scaling": LONGROPE | TEMPERATURES},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REPAIRABLE)
def test_each_trap_is_found_and_repaired(name: str) -> None:
    config, target, where, words, contains = REPAIRABLE[name]
    findings, repaired = examine(config, target)
    assert [finding.where for finding in findings] == [where]
    assert words in findings[0].problem
    assert findings[0].repairable
    assert contains.items() <= repaired.items()
    assert diagnose(repaired, target) == [], "the repair leaves nothing to find"
    assert repaired["rope_parameters"] == (repaired["rope_scaling"] or {"rope_type": "default"}) | {
        "rope_theta": repaired["rope_theta"]
    }
    assert isinstance(repaired["max_position_embeddings"], int)
    assert "original_max_position_embeddings" not in repaired


# Config, field, words: what no repair can know.
BLOCKED: dict[str, tuple[dict[str, Any], str, str]] = {
    "dynamic": (scaled({"rope_type": "dynamic", "factor": 8.0}, NATIVE), "rope_type", "only the native positions"),
    "proportional": (scaled({"rope_type": "proportional", "factor": 8.0}), "rope_type", "ignores the factor"),
    "unknown type": (scaled({"rope_type": "magic"}), "rope_type", "'magic' is unknown"),
    "yarn without original": (scaled({"rope_type": "yarn", "factor": 8.0}), "original_max_position_embeddings", "silently"),
    "yarn without factor": (scaled({"rope_type": "yarn"}), "factor", "yarn needs it"),
    "llama3 without original": (
        scaled({key: value for key, value in LLAMA3.items() if "original" not in key}),
        "original_max_position_embeddings",
        "vLLM crashes",
    ),
    "longrope, two lists": (
        scaled(LONGROPE | TEMPERATURES | {"long_factor": [3.0, 4.0]}), "long_factor", "always uses the long list",
    ),
    "longrope, two temperatures": (
        scaled(LONGROPE | TEMPERATURES | {"long_mscale": 1.2}), "attention_factor", "temperatures differ",
    ),
    "longrope without original": (
        scaled({"rope_type": "longrope", **LISTS, **TEMPERATURES}), "original_max_position_embeddings", "missing",
    ),
    "negative factor": (scaled(YARN | {"factor": -4}), "factor", "-4 is impossible"),
    "NaN factor": (scaled(YARN | {"factor": math.nan}), "factor", "nan is impossible"),
    "theta 0": (scaled(YARN, rope_theta=0), "rope_theta", "0 is impossible"),
    "no positions": (scaled(YARN, -1), "max_position_embeddings", "-1 is not a number of tokens"),
    "half a position": (scaled(YARN, 4096.5), "max_position_embeddings", "4096.5 is not a number of tokens"),
    "a RoPE for each layer type": (
        BASE | {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
        "rope_parameters",
        "each layer type",
    ),
    "no mapping": (scaled([1, 2]), "rope_scaling", "not a mapping"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKED)
def test_what_cannot_be_repaired_is_said_and_left_alone(name: str) -> None:
    config, where, words = BLOCKED[name]
    findings, repaired = examine(config)
    blocking = [finding for finding in findings if not finding.repairable]
    assert [finding.where for finding in blocking] == [where]
    assert words in blocking[0].problem
    assert blocking[0].remedy
    assert repaired is config


def test_yarn_that_misses_the_known_target_is_blocked() -> None:
    findings = diagnose(scaled(YARN), target_length=65536)
    assert [(finding.where, finding.repairable) for finding in findings] == [("factor", False)]


def test_notes_tell_of_sliding_windows_and_old_readers() -> None:
    mistral = {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}
    assert "sliding window of 4096 tokens, though it declares 32768" in notes(mistral)[0]
    assert "transformers 4.57" in notes(scaled(YARN))[0]
    assert notes(BASE) == []
