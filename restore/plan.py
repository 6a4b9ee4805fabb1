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
# Hidden states of one pass, tokens times width, beyond which more of them at once make nothing faster.
_PASS_CHANNELS = 1 << 24
_SHORTEST_TOKENS = 4
# Lengths of what people ask in a sentence to a page; a native window has few places with as little in front of them.
_CUT_TOKENS = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Plan:
    """The shape of a run: windows of each kind in one optimizer step, and how many steps.

    Every step distils `short_windows`, of which at most `alike` are read in the same way: whole, cut into texts or with jumps.
    The first of every `long_every` steps reads `long_windows` as well, and their losses count `long_every` times there.
    """

    window: int
    short_windows: int
    long_window: int
    long_windows: int
    steps: int
    long_every: int = 1
    alike: int = 1

    def __str__(self) -> str:
        parts = [f"{self.short_windows} x {self.window:,} tokens to distil"] if self.short_windows else []
        if self.long_windows:
            when = f" in every {self.long_every} steps" if self.long_every > 1 else ""
            parts.append(f"{self.long_windows} x {self.long_window:,} tokens to read{when}")
        return f"{self.steps} steps of {' and '.join(parts)}"

    def long_in(self, step: int) -> int:
        """Long windows of step number `step`, counted from 0."""
        return 0 if step % self.long_every else self.long_windows

    def tokens_in(self, step: int) -> int:
        """Tokens that step number `step` reads."""
        return self.window * self.short_windows + self.long_window * self.long_in(step)

    @property
    def round_tokens(self) -> int:
        """Tokens of `long_every` steps."""
        return self.window * self.short_windows * self.long_every + self.long_window * self.long_windows

    def steps_within(self, tokens: int) -> int:
        """Most steps that read no more than `tokens`, but at least one."""
        rounds, left = divmod(tokens, self.round_tokens)
        more = 0
        while left >= self.tokens_in(more):
            left -= self.tokens_in(more)
            more += 1
        return max(1, rounds * self.long_every + more)

    def windows_at_once(self, hidden_size: int) -> int:
        """Distillation windows of one pass over a model so wide.

        A small model in short windows spends most of its time between kernels; fewer, larger passes spare that, up to a size
        that keeps any GPU busy. What stays of a pass until backward grows with its windows, and stays small by the same bound.
        """
        return max(1, min(_PASS_CHANNELS // (self.window * hidden_size), self.alike))


def plan_steps(config: RestoreConfig, rope: RopePlan) -> Plan:
    """Fill an optimizer step with distillation and language-model windows.

    Where one long window is more than its share of a step, not every step has one: many small steps teach more than few large
    ones (docs/decisions/0001-default-recipe.md).

    Raises:
        UsageError: a window longer than the teacher or the target reads, or too short to predict anything in.
    """
    window = config.window or rope.native_window
    long_window = config.long_window or min(rope.target_length, _LONG_WINDOW_FACTOR * rope.native_window)
    if (least := min(window, long_window)) < _SHORTEST_TOKENS:
        name = "window" if least == window else "long_window"
        raise UsageError(f"{name} = {least}: at least {_SHORTEST_TOKENS} tokens, or half a window has none to predict")
    if window > rope.native_window:
        raise UsageError(f"window = {window}: the teacher reads at most its native window of {rope.native_window} tokens")
    if long_window > rope.target_length:
        raise UsageError(f"long_window = {long_window}: at most the target length of {rope.target_length} tokens")
    reads_long = config.reads_long and config.long_share > 0
    if not config.distils and not reads_long:
        raise UsageError("long_share = 0 leaves nothing to train: every objective needs long windows")
    long_windows, long_every, short_windows = 0, 1, 0
    if not config.distils:
        long_windows = max(1, round(config.batch_tokens / long_window))
    else:
        distilled: float = config.batch_tokens
        if reads_long:
            share = config.long_share
            long_windows = max(1, round(config.batch_tokens * share / long_window))
            long_every = max(1, round(long_window / (config.batch_tokens * share)))
            distilled = long_windows * long_window / long_every * (1 / share - 1)
        short_windows = max(1, round(distilled / window))
    alike = math.ceil(short_windows * max(config.cut, config.jump_share, 1 - config.cut - config.jump_share))
    plan = Plan(window, short_windows, long_window, long_windows, 1, long_every, alike)
    return replace(plan, steps=config.steps or plan.steps_within(config.tokens))


def cut_lengths(window: int) -> list[int]:
    """Tokens of the short texts that a window may be cut into; all texts of one window are alike."""
    return [length for length in _CUT_TOKENS if length < window] or [max(1, window // 2)]


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
