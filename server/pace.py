"""How fast the engine has been: an estimate for a request that is asked about before it is sent."""

from dataclasses import dataclass

_WEIGHT = 0.1  # of the newest measurement in the running mean


@dataclass
class Pace:
    """Running means of what requests have measured; None before the first."""

    prefill_tokens_per_s: float | None = None
    token_s: float | None = None

    def saw_prefill(self, tokens: int, seconds: float) -> None:
        """A prompt of `tokens` gave its first token `seconds` after it entered the engine."""
        self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, tokens / max(seconds, 1e-6))

    def saw_gap(self, seconds: float) -> None:
        """Time between two events of a stream."""
        self.token_s = _mean(self.token_s, seconds)

    def estimate_s(self, prompt_tokens: int, max_tokens: int) -> tuple[float | None, float | None]:
        """Seconds to the first token and to the last, without the time in the queue."""
        if self.prefill_tokens_per_s is None:
            return None, None
        first_s = prompt_tokens / self.prefill_tokens_per_s
        return first_s, None if self.token_s is None else first_s + max_tokens * self.token_s


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
