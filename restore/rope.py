"""Which RoPE a checkpoint has, which one the restored model gets, and how config.json must say so.

Rotary position embeddings (RoPE, arXiv 2104.09864) turn each pair of channels by position x frequency. Stretching a native
window L0 to a target length L1 changes the frequencies: `linear` divides them all by L1/L0 (arXiv 2306.15595), `yarn`
divides only the slow ones and sharpens attention (arXiv 2309.00071), `llama3` is Llama 3.1's smooth variant of the same
idea, `theta` raises the base (NTK-aware scaling, or ABF of arXiv 2309.16039), `longrope` divides each frequency by a factor
of its own (arXiv 2402.13753), `none` changes nothing: the control that only learns the text. Everything here works on plain
config dictionaries; the tables themselves are computed by transformers and vLLM.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ard_serve.errors import ModelError, UsageError

RopeType = Literal["yarn", "linear", "llama3", "theta", "longrope", "none"]

SUPPORTED_MODELS = ("llama", "mistral", "qwen2", "qwen3")
DEFAULT_THETA = 10000.0
_MAX_TARGET_TOKENS = 1 << 24
# `default` needs the first, `llama3` all of them.
_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class RopePlan:
    """A stretch from one RoPE to another.

    `native_parameters` and `parameters` are transformers' `rope_parameters`, `rope_theta` included;
    `max_position_embeddings` is what config.json must hold for transformers and vLLM to serve `target_length` tokens.
    """

    rope_type: RopeType
    native_window: int
    target_length: int
    native_parameters: dict[str, Any]
    parameters: dict[str, Any]
    max_position_embeddings: int

    @property
    def factor(self) -> float:
        """How many times longer the target length is than the native window."""
        return self.target_length / self.native_window

    def native_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint's config with its native RoPE written unambiguously and no sliding window."""
        return _write(config, self.native_parameters, max(self.native_window, config["max_position_embeddings"]))

    def target_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint's config with the target RoPE, as export must write it."""
        return _write(config, self.parameters, self.max_position_embeddings)


def plan_rope(
    config: dict[str, Any],
    target_length: int,
    rope_type: RopeType = "yarn",
    native_window: int | None = None,
    rope_theta: float | None = None,
    rope_factors: Sequence[float] | None = None,
    rope_attention_factor: float | None = None,
) -> RopePlan:
    """Plan the stretch of a checkpoint to `target_length` tokens.

    Args:
        config: the checkpoint's config.json.
        target_length: tokens the restored model must serve; greater than the native window, and equal to it for `none`.
        rope_type: how the frequencies change.
        native_window: tokens the checkpoint was trained on; found in the config unless a sliding window hides it.
        rope_theta: the raised base, for `theta` only; NTK-aware scaling by default.
        rope_factors: for `longrope` only, what each of the D / 2 frequencies of a head is divided by, the fastest first.
        rope_attention_factor: for `longrope` only, the factor on queries and keys; YaRN's 0.1 ln(factor) + 1 by default.

    Raises:
        ModelError: an unsupported architecture or RoPE, or RoPE fields no model can have.
        UsageError: a target length or native window that cannot work.
    """
    native_parameters = read_rope(config)
    native_window = _native_window(config, native_window)
    if rope_type == "none" and target_length != native_window:
        raise UsageError(
            f"target_length = {target_length}: rope_type 'none' stretches nothing, so it must be the native {native_window}"
        )
    if rope_type != "none" and not native_window < target_length <= _MAX_TARGET_TOKENS:
        raise UsageError(
            f"target_length = {target_length}: must be greater than the native window of {native_window} tokens "
            f"and at most {_MAX_TARGET_TOKENS}"
        )
    if rope_theta is not None and rope_type != "theta":
        raise UsageError(f"rope_theta = {rope_theta}: only rope_type 'theta' takes it, this run uses '{rope_type}'")
    if (rope_factors is None) != (rope_type != "longrope"):
        raise UsageError(
            f"rope_type '{rope_type}' with{'out' if rope_factors is None else ''} rope_factors: 'longrope' needs them, no "
            f"other type takes them; `python -m restore.rope_search` finds some"
        )
    if (native_type := native_parameters["rope_type"]) != "default" and rope_type not in ("theta", "none"):
        raise ModelError(
            f"the checkpoint's RoPE is already scaled ({native_type}); only rope_type 'theta' can stretch it further"
        )
    if rope_factors is not None:
        factors = _check_factors(rope_factors, head_dim(config) // 2)
        stretched = target_length / native_window
        parameters = _longrope(native_parameters, native_window, stretched, factors, rope_attention_factor)
        return RopePlan(rope_type, native_window, target_length, native_parameters, parameters, target_length)
    parameters, max_positions = _stretch(
        native_parameters, rope_type, native_window, target_length, rope_theta, head_dim(config)
    )
    return RopePlan(rope_type, native_window, target_length, native_parameters, parameters, max_positions)


def read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The RoPE a config.json describes, in transformers 5's form, whichever keys hold it.

    Raises:
        ModelError: the architecture or RoPE type is not supported, or a field is impossible.
    """
    check_architecture(config)
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    # The precedence of transformers 5, which vLLM reads through.
    rope = dict(scaling or parameters or {})
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    if rope["rope_type"] not in ("default", "llama3"):
        raise ModelError(f"rope_type '{rope['rope_type']}' in config.json: a restoration starts from 'default' or 'llama3'")
    for name in _NUMBERS if rope["rope_type"] == "llama3" else _NUMBERS[:1]:
        value = rope.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 1.0:
            raise ModelError(f"{name} = {value!r} in config.json: must be a finite number, at least 1")
    others = {key: value for key, value in (parameters or {}).items() if key != "type"}
    others |= {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    if differing := sorted(key for key, value in others.items() if rope.get(key) != value):
        raise ModelError(f"config.json: its RoPE keys disagree on {', '.join(differing)}; `ard doctor` shows and repairs it")
    return rope


def check_architecture(config: dict[str, Any]) -> None:
    """Refuse what is not a dense decoder of the Llama family, with the list of those supported."""
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODELS:
        raise ModelError(f"architecture '{model_type}' is not supported; supported: {', '.join(SUPPORTED_MODELS)}")
    if config.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ModelError(
            f"partial_rotary_factor = {config['partial_rotary_factor']} is not supported; only full rotary heads are"
        )


def head_dim(config: dict[str, Any]) -> int:
    """Channels of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def served_length(config: dict[str, Any]) -> int:
    """Tokens vLLM serves: linear scaling multiplies what config.json declares, every other RoPE declares the whole."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = rope["factor"] if rope.get("rope_type", rope.get("type")) == "linear" else 1.0
    return int(_declared(config) * factor)


def sliding_window(config: dict[str, Any]) -> int | None:
    """The sliding attention window in tokens, or None where every layer attends to everything."""
    if config.get("use_sliding_window") is False:
        return None
    if "layer_types" in config and "sliding_attention" not in config["layer_types"]:
        return None
    return config.get("sliding_window")


def _declared(config: dict[str, Any]) -> int:
    declared = config.get("max_position_embeddings")
    if isinstance(declared, bool) or not isinstance(declared, int) or declared < 1:
        raise ModelError(f"max_position_embeddings = {declared!r} in config.json: must be a whole number of tokens, at least 1")
    return declared


def _native_window(config: dict[str, Any], stated: int | None) -> int:
    declared = _declared(config)
    sliding = sliding_window(config)
    full = min(declared, sliding or declared)
    if stated is None and full < declared:
        raise UsageError(
            f"config.json declares {declared} positions but attends over a sliding window of {sliding}: "
            f"state the native window, at most --native-window {sliding}"
        )
    if stated is not None and not 1 <= stated <= full:
        raise UsageError(f"native_window = {stated}: must be between 1 and the {full} tokens the checkpoint attends over")
    return stated or full


def _stretch(
    native: dict[str, Any], rope_type: RopeType, window: int, target: int, rope_theta: float | None, dim: int
) -> tuple[dict[str, Any], int]:
    """Target `rope_parameters` and `max_position_embeddings`: which pairs work is measured in docs/rope.md."""
    factor, theta = target / window, float(native["rope_theta"])
    if rope_type == "none":
        return dict(native), window
    if rope_type == "linear":
        # vLLM multiplies max_position_embeddings by the factor and cuts the fraction off; never let it land below target.
        while int(window * factor) < target:
            factor = math.nextafter(factor, math.inf)
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}, window
    original = {"rope_theta": theta, "factor": factor, "original_max_position_embeddings": window}
    if rope_type == "yarn":
        return {
            "rope_type": "yarn",
            **original,
            "attention_factor": _temperature(factor),
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        }, target
    if rope_type == "llama3":
        return {"rope_type": "llama3", **original, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, target
    assert rope_type == "theta", f"one of {get_args(RopeType)}"
    # NTK-aware: the slowest pair turns as it would under linear scaling, the fastest not at all slower.
    raised = rope_theta if rope_theta is not None else theta * factor ** (dim / (dim - 2))
    if not math.isfinite(raised) or raised <= theta:
        raise UsageError(f"rope_theta = {raised}: must be finite and above the checkpoint's {theta}")
    return {**native, "rope_theta": raised}, target


def _temperature(factor: float) -> float:
    """YaRN's factor on queries and keys (arXiv 2309.00071)."""
    return 0.1 * math.log(factor) + 1.0


def _check_factors(factors: Sequence[float], count: int) -> list[float]:
    if len(factors) != count:
        raise UsageError(f"rope_factors: {len(factors)} of them, a head of this model turns {count} pairs of channels")
    if bad := [factor for factor in factors if not (math.isfinite(factor) and factor > 0)]:
        raise UsageError(f"rope_factors: {bad[0]} must be finite and above 0")
    return [float(factor) for factor in factors]


def _longrope(
    native: dict[str, Any], window: int, stretched: float, factors: list[float], attention_factor: float | None
) -> dict[str, Any]:
    """`longrope` parameters that both engines read alike (docs/rope.md): one list for short and long, one temperature."""
    temperature = _temperature(stretched) if attention_factor is None else attention_factor
    return {
        "rope_type": "longrope",
        "rope_theta": float(native["rope_theta"]),
        "factor": stretched,
        "original_max_position_embeddings": window,
        "short_factor": factors,
        "long_factor": factors,
        **dict.fromkeys(("attention_factor", "short_mscale", "long_mscale"), temperature),
    }


def write_rope(config: dict[str, Any], parameters: dict[str, Any], max_positions: int) -> dict[str, Any]:
    """Say the same RoPE in all three keys, so that transformers 4 and 5 and vLLM read one and the same."""
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    written = dict(config)
    written["max_position_embeddings"] = max_positions
    written["rope_theta"] = parameters["rope_theta"]
    written["rope_scaling"] = None if parameters["rope_type"] == "default" else scaling
    written["rope_parameters"] = dict(parameters)
    return written


def _write(config: dict[str, Any], parameters: dict[str, Any], max_positions: int) -> dict[str, Any]:
    written = write_rope(config, parameters, max_positions)
    if written.get("sliding_window") is not None:
        # The native window lies inside the sliding one, so full attention is what the checkpoint did there.
        written |= {"sliding_window": None, "use_sliding_window": False}
        if "layer_types" in written:
            written["layer_types"] = ["full_attention"] * len(written["layer_types"])
    return written
