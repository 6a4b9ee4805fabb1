"""Which model answers: the restored one, or beside it the native one for what is short."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.auth import Caller
from server.call import COMPLETION, Call, CallLimits
from server.conversations import Conversations
from server.pool import Pool
from server.sizing import Sized, count, fit

RESTORED, NATIVE = "restored", "native"


@dataclass(frozen=True)
class Short:
    """The native model, and the length in tokens, of prompt and answer together, up to which it is asked."""

    pool: Pool
    limit: int


class Profiles:
    """Places each call at a model. Without `short` there is only the one."""

    def __init__(self, main: Pool, limits: CallLimits, short: Short | None) -> None:
        self.main, self.limits, self.short = main, limits, short
        self.pools = (main, short.pool) if short else (main,)
        self._conversations = Conversations()

    async def place(self, call: Call, caller: Caller, request_id: str, remember: bool = True) -> tuple[Pool, Sized]:
        """The model for a call, and its lengths there.

        A conversation that was once too long stays with the restored model. While the native model is away, the restored
        one answers what is short, too.

        Raises:
            ApiError: 400, it is too long for the window.
            UpstreamError: no engine counted its tokens.
        """
        short = self.short
        exact_from = min(self.limits.measured_window, short.limit) if short else self.limits.measured_window
        lengths = await count(call, self.limits, exact_from, self.main.call, request_id)
        if short:
            messages = _messages(call)
            if not self._is_short(call, max(lengths), short.limit) or self._conversations.has_grown(caller.name, messages):
                sized = fit(call, self.limits, lengths, caller.cache_salt)
                if messages and remember:
                    self._conversations.grew(caller.name, messages)
                return self.main, sized
            if short.pool.health.refusal(0) is None:
                return short.pool, fit(
                    call, replace(self.limits, window=short.limit, measured=None), lengths, caller.cache_salt
                )
        return self.main, fit(call, self.limits, lengths, caller.cache_salt)

    @staticmethod
    def _is_short(call: Call, prompt_tokens: int, limit: int) -> bool:
        """A call that does not say how long its answer may be is short if it leaves half of the limit to it."""
        return prompt_tokens + call.max_tokens <= limit if call.max_tokens else 2 * prompt_tokens <= limit


def _messages(call: Call) -> Sequence[Any]:
    """The turns of a conversation; a raw completion or a single text is none."""
    prompt = call.fields[call.kind.prompt]
    return prompt if call.kind is not COMPLETION and isinstance(prompt, list) else ()
