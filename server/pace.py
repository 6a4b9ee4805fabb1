"""How fast the engine has been: an estimate for a request that is asked about before it is sent."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

_WEIGHT = 0.1  # of the newest measurement in the running mean


@dataclass
class Pace:
    """Running means of what requests have measured; None before the first."""

    token_s: float | None = None
    # Prompt tokens and seconds to the first token, apart for each power of two. One rate for all lengths would be wrong for
    # most: every prompt waits for a step or two, which is all that a short one costs, and attention slows a long one.
    _prefills: dict[int, tuple[float, float]] = field(default_factory=dict)

    def saw_prefill(self, tokens: int, seconds: float) -> None:
        """A prompt of `tokens`, one at least, gave its first token `seconds` after it entered the engine."""
        before = self._prefills.get(tokens.bit_length(), (None, None))
        self._prefills[tokens.bit_length()] = _mean(before[0], tokens), _mean(before[1], seconds)

    def saw_gap(self, seconds: float) -> None:
        """Time between two events of a stream."""
        self.token_s = _mean(self.token_s, seconds)

    def estimate_s(self, prompt_tokens: int, max_tokens: int) -> tuple[float | None, float | None]:
        """Seconds to the first token and to the last, without the time in the queue."""
        if not self._prefills:
            return None, None
        first_s = self._first_s(prompt_tokens)
        return first_s, None if self.token_s is None else first_s + max_tokens * self.token_s

    def _first_s(self, tokens: int) -> float:
        """Between the nearest two lengths seen; below them what the shortest took, beyond them as they grew."""
        lengths, measured = zip(*sorted(self._prefills.values()), strict=True)
        seconds = tuple(accumulate(measured, max))  # a longer prompt was quicker by chance alone
        if tokens <= lengths[0]:
            return float(seconds[0])
        end = min(bisect_left(lengths, tokens), len(lengths) - 1)
        # Beyond the longest: along the line from one at most half as long, since two near ones would pass on their noise.
        start = end - 1 if tokens <= lengths[end] else bisect_right(lengths, lengths[end] / 2) - 1
        start_tokens, start_s = (lengths[start], seconds[start]) if start >= 0 else (0.0, 0.0)
        slope = (seconds[end] - start_s) / (lengths[end] - start_tokens)
        return float(start_s + slope * (tokens - start_tokens))


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
