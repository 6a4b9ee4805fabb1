"""What is wrong with the RoPE of a config.json: fields that engines misread, refuse, or read differently from one another.

Each rule was measured against transformers and vLLM (docs/rope.md). A rule looks at the RoPE as transformers 5 reads it, and
vLLM through it; where the right value follows from the others, it puts it into the draft that `ard doctor --fix` writes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from restore.rope import DEFAULT_THETA, sliding_window, write_rope

_KNOWN_TYPES = ("default", "linear", "yarn", "llama3", "longrope")
_TEMPERATURES = ("attention_factor", "short_mscale", "long_mscale")
_LISTS = ("short_factor", "long_factor")


@dataclass(frozen=True)
class Finding:
    """One problem: where it is, what goes wrong, what to do; `repairable` when `ard doctor --fix` does it."""

    where: str
    problem: str
    remedy: str
    repairable: bool = True


class Draft:
    """A config's RoPE while the rules look at it and correct it.

    `target_length` is the length the model was made for, where anything but config.json says so.
    """

    def __init__(self, config: dict[str, Any], target_length: int | None) -> None:
        self.config = config
        self.target_length = target_length
        self.scaling = _modern(config.get("rope_scaling"))
        self.parameters = _modern(config.get("rope_parameters"))
        self.rope = {"rope_type": "default", **(self.scaling or self.parameters)}
        self.max_positions: Any = config.get("max_position_embeddings")

    @property
    def rope_type(self) -> str:
        return str(self.rope["rope_type"])

    @property
    def original(self) -> Any:
        return self.rope.get("original_max_position_embeddings")

    @property
    def stretched(self) -> int:
        """Tokens that the factor reaches from the original window."""
        return round(float(self.original * self.rope["factor"]))


def diagnose(config: dict[str, Any], target_length: int | None = None) -> list[Finding]:
    """Every problem of a config.json's RoPE, in the order in which they should be solved.

    Args:
        config: the parsed config.json of any model.
        target_length: tokens the model was stretched to, if that is known from elsewhere.
    """
    return examine(config, target_length)[0]


def examine(config: dict[str, Any], target_length: int | None = None) -> tuple[list[Finding], dict[str, Any]]:
    """The problems of a config.json, and the config with every repairable one repaired."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(value := config.get(key) or {}, dict):
            return [_blocked(key, f"{value!r} is not a mapping", "copy the config again")], config
        if any(isinstance(inner, dict) for inner in value.values()):
            return [
                _blocked(key, "a RoPE of its own for each layer type", "not handled here: one RoPE for all layers is")
            ], config
    draft = Draft(config, target_length)
    findings = [finding for rule in (_legacy_type, _base, _agreement) for finding in rule(draft)]
    findings += (blocking := [*_numbers(draft), *_type(draft)])
    if not any(not finding.repairable for finding in blocking):
        findings += _RULES[draft.rope_type](draft)
    if any(not finding.repairable for finding in findings):
        return findings, config
    if not findings:
        return [], config
    # Transformers lets this one win over the RoPE keys, which now hold it.
    kept = {key: value for key, value in config.items() if key != "original_max_position_embeddings"}
    return findings, write_rope(kept, draft.rope, draft.max_positions)


def notes(config: dict[str, Any]) -> list[str]:
    """Facts that are no faults but surprise people."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    found = []
    window, declared = sliding_window(config), config.get("max_position_embeddings")
    if window and declared and window < declared:
        found.append(f"attends over a sliding window of {window} tokens, though it declares {declared} positions")
    if rope.get("rope_type", rope.get("type")) == "yarn":
        found.append("yarn with attention_factor needs transformers 4.57 or later")
    return found


def _legacy_type(draft: Draft) -> Iterator[Finding]:
    for key in ("rope_scaling", "rope_parameters"):
        values = draft.config.get(key) or {}
        if "type" in values:
            differ = ": they differ, which vLLM refuses" if values["type"] != values.get("rope_type", values["type"]) else ""
            yield Finding(key, f"'type' is the old name of 'rope_type'{differ}", "write rope_type only")


def _base(draft: Draft) -> Iterator[Finding]:
    """Settle rope_theta: the engines' reading, unless they fall back to a default that no key states."""
    top = draft.config.get("rope_theta")
    legacy = DEFAULT_THETA if top is None else top
    read = draft.rope.get("rope_theta", legacy)
    stated = [
        value for value in (top, draft.scaling.get("rope_theta"), draft.parameters.get("rope_theta")) if value is not None
    ]
    draft.rope["rope_theta"] = read if read in stated or not stated else stated[-1]
    if any(value != read for value in stated):
        problem = f"the config says {' and '.join(map(repr, stated))}; transformers 5 and vLLM read {read}"
    elif legacy != read:
        problem = f"missing at the top level: transformers 4 reads {legacy} instead of {read}"
    else:
        return
    yield Finding("rope_theta", problem, f"say {draft.rope['rope_theta']} in every key")


def _agreement(draft: Draft) -> Iterator[Finding]:
    if draft.scaling and draft.parameters:
        keys = (draft.scaling.keys() | draft.parameters.keys()) - {"rope_theta"}
        if differing := sorted(key for key in keys if draft.scaling.get(key) != draft.parameters.get(key)):
            problem = f"disagrees with rope_parameters on {', '.join(differing)}; transformers 5 and vLLM read rope_scaling"
            yield Finding("rope_scaling", problem, "make them identical")
    elif draft.parameters and draft.rope_type != "default":
        yield Finding("rope_scaling", f"missing: transformers 4 reads no {draft.rope_type} scaling", "write all three keys")


def _numbers(draft: Draft) -> Iterator[Finding]:
    """Impossible values, and numbers of a type that an engine refuses."""
    positions = draft.max_positions
    if isinstance(positions, float) and positions.is_integer():
        draft.max_positions = int(positions)
        yield Finding("max_position_embeddings", f"{positions} is a float, which transformers 5 refuses", "write an integer")
    elif isinstance(positions, bool) or not isinstance(positions, int) or positions < 1:
        yield _blocked("max_position_embeddings", f"{positions!r} is not a number of tokens", "write an integer of at least 1")
    for name in ("rope_theta", "factor", "original_max_position_embeddings"):
        value = draft.rope.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 1:
            yield _blocked(name, f"{value!r} is impossible", "must be a finite number of at least 1")
    if type(draft.rope.get("factor")) is int:
        yield Finding("factor", f"{draft.rope['factor']} is an integer, which crashes vLLM", "write a float")
        draft.rope["factor"] = float(draft.rope["factor"])


def _type(draft: Draft) -> Iterator[Finding]:
    kind = draft.rope_type
    if kind == "dynamic":
        yield _blocked("rope_type", "dynamic: vLLM's table holds only the native positions", "restore with yarn or linear")
    elif kind == "proportional" and "factor" in draft.rope:
        yield _blocked("rope_type", "proportional with a factor: vLLM ignores the factor", "restore with yarn or linear")
    elif kind not in _KNOWN_TYPES:
        yield _blocked("rope_type", f"'{kind}' is unknown here", f"known types: {', '.join(_KNOWN_TYPES)}")
    needed = {"linear": ("factor",), "yarn": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
              "longrope": _LISTS}  # fmt: skip
    for name in needed.get(kind, ()):
        if name not in draft.rope:
            yield _blocked(name, f"missing, {kind} needs it", "copy it from where the model was made")


def _check_default(draft: Draft) -> Iterator[Finding]:
    if (factor := draft.rope.pop("factor", None)) is not None:
        served = int(draft.max_positions * factor)
        yield Finding("factor", f"{factor} with rope_type default: vLLM would serve {served} tokens unscaled", "remove it")


def _check_linear(draft: Draft) -> Iterator[Finding]:
    factor = draft.rope["factor"]
    native = draft.rope.pop("original_max_position_embeddings", draft.config.get("original_max_position_embeddings"))
    if draft.target_length is not None:
        native = round(draft.target_length / factor)
    if native is not None and native != draft.max_positions:
        yield Finding(
            "max_position_embeddings",
            f"{draft.max_positions} with linear x {factor:g}: vLLM would serve {int(draft.max_positions * factor)} tokens",
            f"write the native {native}",
        )
        draft.max_positions = native


def _check_yarn(draft: Draft) -> Iterator[Finding]:
    if draft.original is None:
        problem = f"missing: engines silently take {draft.max_positions}"
        if draft.target_length is None:
            yield _blocked("original_max_position_embeddings", problem, "write the native window, in tokens")
            return
        yield Finding("original_max_position_embeddings", problem, "write the native window")
        draft.rope["original_max_position_embeddings"] = round(draft.target_length / draft.rope["factor"])
    served = draft.target_length or draft.stretched
    if served != draft.stretched:
        yield _blocked("factor", f"{draft.original} x {draft.rope['factor']:g} is not the target of {served}", "correct it")
    elif draft.max_positions < served:
        problem = f"{draft.max_positions}: engines stop there, yarn reaches {served}"
        yield Finding("max_position_embeddings", problem, f"write {served}")
    elif draft.max_positions > served:
        problem = f"{draft.max_positions}: vLLM's yarn table ends at {served}"
        yield Finding("max_position_embeddings", problem, f"write {served}")
    draft.max_positions = served


def _check_llama3(draft: Draft) -> Iterator[Finding]:
    if draft.original is None:
        problem = "missing: vLLM crashes, transformers takes max_position_embeddings"
        yield _blocked("original_max_position_embeddings", problem, "write the native window, in tokens")
        return
    # Llama 3.1 itself reaches further than original x factor, so only a length that scaling cannot explain is a fault.
    served = draft.target_length or (draft.stretched if draft.max_positions <= draft.original else draft.max_positions)
    if served != draft.max_positions:
        yield Finding("max_position_embeddings", f"{draft.max_positions}: engines stop there", f"write {served}")
        draft.max_positions = served


def _check_longrope(draft: Draft) -> Iterator[Finding]:
    if list(draft.rope["short_factor"]) != list(draft.rope["long_factor"]):
        yield _blocked("long_factor", "differs from short_factor: vLLM always uses the long list", "make one list serve both")
    if (outer := draft.config.get("original_max_position_embeddings")) is not None:
        problem = f"{outer} at the top level: vLLM would serve only that many tokens"
        yield Finding("original_max_position_embeddings", problem, "write it inside the RoPE keys")
        draft.rope["original_max_position_embeddings"] = outer
    if draft.original is None:
        yield _blocked("original_max_position_embeddings", "missing", "write the native window, in tokens")
    missing = [name for name in _TEMPERATURES if draft.rope.get(name) is None]
    stated = [draft.rope[name] for name in _TEMPERATURES if name not in missing]
    if len(set(stated)) > 1:
        yield _blocked("attention_factor", f"the temperatures differ: {stated}", f"{', '.join(_TEMPERATURES)} must be equal")
    elif stated and missing:
        # With none of them both engines compute the same temperature; with some, each its own.
        yield Finding(", ".join(missing), f"missing beside a temperature of {stated[0]}", "write the same for all three")
        draft.rope |= dict.fromkeys(_TEMPERATURES, stated[0])


def _modern(values: dict[str, Any] | None) -> dict[str, Any]:
    modern = dict(values or {})
    if "type" in modern:
        modern.setdefault("rope_type", modern.pop("type"))
        modern.pop("type", None)
    return modern


def _blocked(where: str, problem: str, remedy: str) -> Finding:
    return Finding(where, problem, remedy, repairable=False)


_RULES: dict[str, Callable[[Draft], Iterator[Finding]]] = {
    "default": _check_default,
    "linear": _check_linear,
    "yarn": _check_yarn,
    "llama3": _check_llama3,
    "longrope": _check_longrope,
}
