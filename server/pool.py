"""The engines that serve one model: each with its own watch and ledger, all behind one queue."""

from collections.abc import Sequence
from typing import Any

from server.admission import Admission, Ticket
from server.connection import UpstreamError
from server.health import Health, Phase
from server.watch import Watch

# Of several engines the best one says whether requests may come in.
_BETTER = (Phase.DOWN, Phase.LOADING, Phase.CORRUPT, Phase.UNREADY, Phase.READY, Phase.DRAINING)


class Pool:
    """Engines that are interchangeable; `profile` is what metrics and clients call them."""

    def __init__(self, profile: str, watches: Sequence[Watch], admission: Admission) -> None:
        self.profile, self.watches, self.admission = profile, tuple(watches), admission
        self._by_ledger = {watch.ledger: watch for watch in watches}

    @property
    def health(self) -> Health:
        """The health of the engine that is best off."""
        return max((watch.health for watch in self.watches), key=lambda health: _BETTER.index(health.phase))

    @property
    def parameters(self) -> dict[str, frozenset[str]]:
        """The engines' request fields by schema name; empty before one has loaded."""
        return next((watch.parameters for watch in self.watches if watch.parameters), {})

    def engine_of(self, ticket: Ticket) -> Watch:
        """The engine that a granted ticket is for."""
        assert ticket.ledger is not None
        return self._by_ledger[ticket.ledger]

    def drain(self) -> None:
        """Let nobody in any more."""
        for watch in self.watches:
            watch.health.drain()

    async def call(self, method: str, path: str, payload: Any, request_id: str) -> tuple[int, Any]:
        """Status and content of a short request, answered by any of the engines, those that are ready first.

        Raises:
            UpstreamError: none of them answered.
        """
        problem = UpstreamError("no engine")
        for watch in sorted(self.watches, key=lambda watch: not watch.health.is_ready):
            try:
                return await watch.upstream.call(method, path, payload, request_id)
            except UpstreamError as error:
                problem = error
                watch.suspect()
        raise problem
