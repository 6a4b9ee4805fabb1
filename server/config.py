"""The gateway's settings: what is served, to whom, within which limits, by which engine command."""

import sys
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from ard_serve.settings import Settings


def _with_port(url: str) -> str:
    _ = urlsplit(url).port  # raises ValueError, which says what a port is
    return url


class ServeConfig(Settings):
    """Everything `ard serve` can be told. Times are in seconds, lengths in tokens, sizes in the unit of the name."""

    model: Path = Field(description="folder of an exported or plain Hugging Face model, safetensors only")
    served_model_name: str | None = Field(None, description="name clients use; the folder's name when not given")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="second port with /metrics and the probes, without a key"
    )
    api_keys: Path | None = Field(None, description="TOML file of named, hashed keys (python -m server.auth NAME makes one)")
    traces: str | None = Field(
        None,
        pattern="^https?://",
        description="OTLP endpoint for OpenTelemetry traces, http://HOST:4318/v1/traces; off if not given",
    )
    allow_anonymous: bool = Field(False, description="serve without keys on an address that others can reach")

    max_model_len: int | None = Field(None, ge=16, description="window in tokens; the export's served limit when not given")
    attach: tuple[Annotated[str, Field(pattern=r"^https?://[^/@?#]+$"), AfterValidator(_with_port)], ...] = Field(
        (), description="URLs of vLLMs that already run MODEL; they are not started or stopped"
    )
    profile_short: Path | None = Field(
        None, description="folder of the native model: a second engine answers short prompts with it"
    )
    profile_short_tokens: int | None = Field(
        None, ge=16, description="prompt and answer up to so long go to --profile-short; its own window when not given"
    )
    profile_short_kv_gib: float | None = Field(
        None, gt=0, description="KV cache of --profile-short, GiB; a quarter of the other's when not given"
    )
    beyond_measured: Literal["refuse", "mark"] = Field(
        "refuse", description="a window longer than was measured: refuse or mark"
    )
    max_body_bytes: int | None = Field(
        None, ge=1024, description="largest request body; 32 bytes a token of window + 1 MiB if not given"
    )
    max_n: int = Field(8, ge=1, le=128, description="largest n and best_of of a request")
    max_prompts: int = Field(64, ge=1, le=4096, description="most prompts of one completion, each of them n sequences")
    max_generated_tokens: int | None = Field(
        None, ge=1, description="largest n x prompts x max_tokens; the window when not given"
    )
    default_max_tokens: int = Field(
        4096, ge=1, description="max_tokens of a chat that does not say (less where the window or --max-generated-tokens is)"
    )
    max_logprobs: int = Field(20, ge=0, le=100, description="largest logprobs and top_logprobs of a request")
    max_schema_bytes: int = Field(16384, ge=0, description="largest JSON schema, regex or grammar; 16 times that for all tools")

    header_timeout_s: float = Field(10, gt=0, description="time for a connection to send a request's headers")
    body_timeout_s: float = Field(30, gt=0, description="time for a request to send its body")
    idle_timeout_s: float = Field(75, gt=0, description="time an idle connection is kept open")
    request_timeout_s: float = Field(1800, gt=0, description="deadline of a request, waiting included")
    queue_size: int = Field(256, ge=0, description="requests that may wait for KV memory or a seat; more are refused with 429")
    queue_timeout_s: float = Field(120, gt=0, description="time a request may wait for KV memory or a seat")
    drain_s: float = Field(60, ge=0, description="time that requests in flight have to finish after SIGTERM")

    batch_tokens: int | None = Field(
        None, ge=64, description="tokens the engine computes in a step; 8192 on a GPU, 2048 on a CPU"
    )
    long_prompt_tokens: int | None = Field(
        None, ge=16, description="prompts longer than this take the long lane; a quarter of the batch"
    )
    seats: int | None = Field(
        None, ge=1, description="sequences an engine computes at once; vLLM's default, for --attach no limit, if not given"
    )
    kv_cache_gib: float | None = Field(
        None, gt=0, description="KV cache, GiB; on a CPU at most 4 when not given, on a GPU what vLLM finds free"
    )
    start_timeout_s: float = Field(1800, gt=0, description="time the engine has to load the model")
    canary_interval_s: float = Field(5, gt=0, description="time between one-token completions that prove the engine alive")
    canary_timeout_s: float = Field(15, gt=0, description="time a canary may take before the server is not ready")
    hang_timeout_s: float = Field(120, gt=0, description="silence after which a hung engine is killed and started again")
    max_restarts: int = Field(
        5, ge=0, description="engine restarts within ten minutes before the server gives up with exit code 70"
    )
    restart_backoff_s: float = Field(1, gt=0, description="wait before the first restart, doubled for each further one")

    engine_args: tuple[str, ...] = Field((), description="vLLM's own flags, as given after --")
    engine_command: tuple[str, ...] = Field(
        (sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        min_length=1,
        description="command that starts vLLM's server",
    )

    @property
    def model_name(self) -> str:
        """The name clients use."""
        return self.served_model_name or self.model.resolve().name
