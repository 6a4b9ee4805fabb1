"""The books of one engine's KV memory: what it holds in all, and what is reserved of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Capacity:
    """What an engine holds: KV tokens in all, in blocks of `block_tokens`."""

    kv_tokens: int
    block_tokens: int


@dataclass(frozen=True)
class Need:
    """What a request takes at its largest: n sequences of each prompt, lengths in tokens."""

    n: int
    prompt_tokens: tuple[int, ...]
    max_tokens: int

    def kv_tokens(self, capacity: Capacity) -> int:
        """KV tokens in whole blocks of that engine."""
        block = capacity.block_tokens
        return self.n * sum(-(-(length + self.max_tokens) // block) * block for length in self.prompt_tokens)


class Ledger:
    """One engine's reservations. `capacity` is None until the engine has first been ready."""

    def __init__(self) -> None:
        self.capacity: Capacity | None = None
        self.is_open = False
        self.is_ready = False
        self.reserved_tokens = 0
        self.long_prefills = 0
        self.running = 0

    @property
    def kv_tokens(self) -> int:
        """KV tokens in all; 0 while unknown."""
        return self.capacity.kv_tokens if self.capacity else 0

    @property
    def free_tokens(self) -> int:
        """KV tokens that nobody has reserved."""
        return self.kv_tokens - self.reserved_tokens

    def close(self) -> None:
        """Let nobody in; those who wait go on waiting."""
        self.is_open = self.is_ready = False

    def cost(self, need: Need) -> int:
        """KV tokens that `need` would take here; only once the capacity is known."""
        assert self.capacity is not None
        return need.kv_tokens(self.capacity)
