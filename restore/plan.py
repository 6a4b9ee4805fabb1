"""The shape of a run: which windows make up an optimizer step, how many steps there are, and how fast each one learns."""

import math
from dataclasses import dataclass, replace

from ard_serve.errors import UsageError
from restore.config import RestoreConfig
from restore.rope import RopePlan

# A default long window of the target length, for what is asked for there is learnt there; beyond eight native ones, attention
# would cost several times what the distillation does.
_LONG_WINDOW_FACTOR = 8
# The rate and the width it was found at (SmolLM2-135M), and how the best rate of LoRA falls with the width of Llama models, by
# Schulman et al., "LoRA Without Regret" (2025). Full-rank deltas want less.
_RATE, _RATE_WIDTH, _RATE_POWER, _FULL_RATE = 1e-3, 576, 0.781, 0.3


@dataclass(frozen=True)
class Plan:
    """The shape of a run: windows of each kind in one optimizer step, and how many steps."""

    window: int
    short_windows: int
    long_window: int
    long_windows: int
    steps: int

    @property
    def step_tokens(self) -> int:
        return self.window * self.short_windows + self.long_window * self.long_windows

    @property
    def windows_at_once(self) -> int:
        """Distillation windows of one pass: as many as take the memory that a long window takes anyway.

        A distillation keeps two hidden states a layer, of teacher and student. A small model in short windows spends most of
        its time between kernels; fewer, larger passes spare that.
        """
        fit = self.long_window // (2 * self.window) if self.long_windows else 1
        return max(1, min(fit, self.short_windows))


def plan_steps(config: RestoreConfig, rope: RopePlan) -> Plan:
    """Fill an optimizer step with distillation and language-model windows.

    Raises:
        UsageError: a window longer than the teacher or the target reads.
    """
    window = config.window or rope.native_window
    long_window = config.long_window or min(rope.target_length, _LONG_WINDOW_FACTOR * rope.native_window)
    if window > rope.native_window:
        raise UsageError(f"window = {window}: the teacher reads at most its native window of {rope.native_window} tokens")
    if long_window > rope.target_length:
        raise UsageError(f"long_window = {long_window}: at most the target length of {rope.target_length} tokens")
    reads_long = config.reads_long and config.long_share > 0
    if not config.distils and not reads_long:
        raise UsageError("long_share = 0 leaves nothing to train: every objective needs long windows")
    if not config.distils:
        short_windows, long_windows = 0, max(1, round(config.batch_tokens / long_window))
    else:
        long_windows = max(1, round(config.batch_tokens * config.long_share / long_window)) if reads_long else 0
        # One long window can be more than its share of a step: the distillation windows keep the proportion.
        distilled = long_windows * long_window * (1 / config.long_share - 1) if long_windows else config.batch_tokens
        short_windows = max(1, round(distilled / window))
    plan = Plan(window, short_windows, long_window, long_windows, steps=1)
    return replace(plan, steps=config.steps or max(1, config.tokens // plan.step_tokens))


def peak_rate(config: RestoreConfig, hidden_size: int) -> float:
    """The peak learning rate: as it is set, or what suits a model so wide, to three digits."""
    if config.learning_rate is not None:
        return config.learning_rate
    rate = _RATE * (_RATE_WIDTH / hidden_size) ** _RATE_POWER * (1.0 if config.trainable == "lora" else _FULL_RATE)
    return float(f"{min(rate, _RATE):.3g}")


def learning_rate(config: RestoreConfig, peak: float, step: int, steps: int) -> float:
    """Linear warm-up that starts above 0, then a cosine to `min_learning_rate_ratio` of the peak at the last step."""
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    floor = config.min_learning_rate_ratio
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
