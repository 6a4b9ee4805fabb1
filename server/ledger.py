"""The books of one engine's KV memory and seats: what it has in all, and what is reserved of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Capacity:
    """What an engine holds: KV tokens in all, in blocks of `block_tokens`, and `seats`, the sequences that it computes at once.

    Seats are None where nobody knows them; they are no limit then.
    """

    kv_tokens: int
    block_tokens: int
    seats: int | None = None


@dataclass(frozen=True)
class Need:
    """What a request takes at its largest: n sequences of each prompt, lengths in tokens."""

    n: int
    prompt_tokens: tuple[int, ...]
    max_tokens: int

    @property
    def sequences(self) -> int:
        """Sequences in all."""
        return self.n * len(self.prompt_tokens)

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
        self.reserved_tokens = self.reserved_seats = 0
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

    @property
    def seats(self) -> int | None:
        """Seats for requests; None while unknown. One is left for the canary, which behind a flood would come too late."""
        total = self.capacity.seats if self.capacity else None
        return max(1, total - 1) if total else None

    def close(self) -> None:
        """Let nobody in; those who wait go on waiting."""
        self.is_open = self.is_ready = False

    def cost(self, need: Need) -> int:
        """KV tokens that `need` would take here; only once the capacity is known."""
        assert self.capacity is not None
        return need.kv_tokens(self.capacity)

    def seats_of(self, need: Need) -> int:
        """Seats that `need` would take here."""
        # One that wants more than there are takes them all: vLLM computes it in turns, and only the canary stands behind it.
        return min(need.sequences, self.seats or need.sequences)

    def fits(self, need: Need) -> bool:
        """Whether memory and seats for `need` are free."""
        if self.seats and self.reserved_seats + self.seats_of(need) > self.seats:
            return False
        return self.capacity is not None and self.cost(need) <= self.free_tokens
