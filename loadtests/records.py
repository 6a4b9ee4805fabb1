"""The result of a load test as it is written to disk: one record per request, one summary per cell, one run."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from loadtests.client import Outcome

Role = Literal["warm_up", "ramp", "measured", "fill"]
Status = Literal["running", "complete", "time_limit", "interrupted", "terminated", "server_died", "failed"]


class Record(BaseModel):
    """Base of what is written."""

    model_config = ConfigDict(extra="forbid")


class RequestRecord(Record):
    """One request. Times `_s` count from the start of the run; `ttft_ms`, `e2e_ms` from the request's writing.

    `late_ms` is how long after its planned arrival the request was written; `events` are token-bearing.
    """

    cell: str
    repeat: int
    index: int
    role: Role
    outcome: Outcome
    status: int = 0
    detail: str = ""
    prompt_tokens: int
    reported_prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    events: int = 0
    planned_s: float
    sent_s: float
    late_ms: float = 0
    connect_ms: float = 0
    ttft_ms: float | None = None
    e2e_ms: float | None = None
    gaps_ms: list[float] = []
    longest_gap_ms: float | None = None
    depth: float | None = None
    expected: str = ""
    answer: str = ""
    correct: bool | None = None

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per output token after the first, or None for fewer than two tokens."""
        if self.ttft_ms is None or self.e2e_ms is None or self.output_tokens < 2:
            return None
        return (self.e2e_ms - self.ttft_ms) / (self.output_tokens - 1)

    @property
    def end_s(self) -> float:
        """When its last token came, or when it was sent if none did."""
        return self.sent_s + (self.e2e_ms or 0) / 1000


class Distribution(Record):
    """Percentiles pooled over requests (or gaps), with their number."""

    n: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Accuracy(Record):
    """Right answers of `n` graded, with the Wilson 95% interval."""

    n: int
    right: int
    rate: float
    low: float
    high: float


class CellMemory(Record):
    """KV use as fractions of the pool, and peaks of the server's process tree and of the GPU.

    `predicted_kv` is what the requests needed together and passes 1 where the pool could not hold them; `waiting` is the
    engine's longest queue.
    """

    predicted_kv: float | None = None
    observed_kv: float | None = None
    preemptions: int | None = None
    waiting: int | None = None
    server_rss_bytes: int | None = None
    gpu_bytes: int | None = None


class CellResult(Record):
    """What one cell of the grid measured, all repeats pooled. Latencies in ms, throughput in tokens per second.

    Rates are those of the whole window; the distributions named `each_s` are over its whole seconds, of which there are `n`.
    `client_lag_ms` is the longest time for which this client itself was kept from running.
    """

    cell: str
    length: int
    concurrency: int | None = None
    rate: float | None = None
    requests: int
    outcomes: dict[str, int]
    refused: str = ""
    flags: list[str] = []
    window_s: float = 0
    ttft_ms: Distribution | None = None
    itl_ms: Distribution | None = None
    tpot_ms: Distribution | None = None
    e2e_ms: Distribution | None = None
    scheduled_ms: Distribution | None = None
    late_ms: Distribution | None = None
    tokens_per_event: float | None = None
    prompt_tokens_per_s: float | None = None
    output_tokens_per_s: float | None = None
    requests_per_s: float | None = None
    goodput_per_s: float | None = None
    output_tokens_each_s: Distribution | None = None
    good_requests_each_s: Distribution | None = None
    accuracy: Accuracy | None = None
    accuracy_by_depth: list[Accuracy | None] = []
    memory: CellMemory = CellMemory()
    load_average: float = 0
    client_lag_ms: float = 0


class RunResult(Record):
    """`result.json`: everything the report shows."""

    schema_version: Literal[1] = 1
    status: Status = "running"
    detail: str = ""
    started_at: str
    duration_s: float = 0
    command: str
    commit: str = ""
    settings: dict[str, Any]
    server: dict[str, Any]
    machine: dict[str, Any]
    client: dict[str, Any] = {}
    kv: dict[str, Any] = {}
    cells: list[CellResult] = []
    not_run: list[str] = []
    fits: dict[str, Any] = {}
    alarms: list[str] = []
    requests: list[RequestRecord] = []
