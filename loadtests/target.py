"""What the server is and what it accepts, found by asking: its model and window, token ids or text, which parameters."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ard_serve.errors import ModelError, UsageError
from loadtests.address import Address
from loadtests.client import Exchange, stream
from loadtests.config import LoadConfig
from loadtests.engine import Snapshot
from loadtests.listing import engine_version, list_models, window
from loadtests.prompts import Words
from loadtests.tokens import TokenSource, find_source

_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_IGNORE_EOS = {"ignore_eos": True}
_USAGE = {"stream_options": {"include_usage": True}}
# From what vLLM takes down to the barest hosted API; the first that is answered with 200 is used.
_EXTRAS: tuple[dict[str, Any], ...] = ({**_IGNORE_EOS, **_USAGE}, _USAGE, {})
_CALIBRATION_WORDS = (64, 512)


@dataclass
class Target:
    """One server as a load test uses it. `served_limit` and `kv_tokens` are None where the server does not tell."""

    address: Address
    model: str
    path: str
    source: TokenSource
    extras: dict[str, Any]
    length_field: str = "max_tokens"
    served_limit: int | None = None
    kv_tokens: int | None = None
    block_tokens: int = 16
    model_dir: Path | None = None
    engine: str = ""

    @property
    def exact(self) -> bool:
        """Whether prompts are token ids, so that their length is exact."""
        return not isinstance(self.source, Words)

    def body(self, tokens: list[int], output_tokens: int) -> bytes:
        """The JSON of one streamed request."""
        content: Any = self.source.decode(tokens) if isinstance(self.source, Words) else tokens
        prompt = {"messages": [{"role": "user", "content": content}]} if self.path == _CHAT else {"prompt": content}
        request = {"model": self.model, **prompt, self.length_field: output_tokens, "stream": True, "temperature": 0}
        return json.dumps(request | self.extras, separators=(",", ":")).encode()

    def describe(self) -> dict[str, Any]:
        """What the report says of the server."""
        return {
            "url": self.address.base,
            "engine": self.engine,
            "model": self.model,
            "endpoint": self.path,
            "token_ids": self.source.name,
            "exact_lengths": self.exact,
            "parameters": sorted(self.extras),
            "served_limit": self.served_limit,
            "kv_tokens": self.kv_tokens,
            "block_tokens": self.block_tokens,
            "model_dir": str(self.model_dir or ""),
        }


async def discover(config: LoadConfig, address: Address, engine: Snapshot, behind: Address | None = None) -> Target:
    """Find out how to talk to the server; costs a few requests of one token. `behind` is where the engine's metrics are.

    Raises:
        UsageError: no way of asking for a completion is accepted; says the last refusal.
        ModelError: the model folder that was named is none.
    """
    if config.model_dir is not None and not (config.model_dir / "config.json").is_file():
        raise ModelError(f"{config.model_dir}: holds no config.json; name the folder of the served model with --model-dir")
    listing = list_models(address, config)
    root = Path(str(listing.get("root") or ""))
    folder = config.model_dir or (root if (root / "config.json").is_file() else None)
    source = None if config.endpoint == "chat" else find_source(address, listing["id"], folder)
    target = await _accepted(config, address, listing["id"], source)
    if isinstance(target.source, Words):
        await _calibrate(target, target.source)
    target.engine, target.model_dir = engine_version(address, listing, behind), folder
    target.served_limit = config.served_limit or window(listing)
    target.block_tokens = int(engine.labels.get("block_size") or engine.values.get("block_tokens") or 16)
    # Block 0 is vLLM's null block and never holds a request's tokens.
    blocks = max(0, int(engine.labels.get("num_gpu_blocks") or 0) - 1)
    reported = blocks * target.block_tokens or int(engine.values.get("kv_tokens", 0))
    target.kv_tokens = config.kv_tokens or reported or None
    return target


async def _accepted(config: LoadConfig, address: Address, model: str, source: TokenSource | None) -> Target:
    ways: list[Target] = []
    for extras in _EXTRAS:
        if config.endpoint != "chat":
            ways += [Target(address, model, _COMPLETIONS, source, extras)] if source else []
    for extras in _EXTRAS:
        if config.endpoint != "chat":
            ways.append(Target(address, model, _COMPLETIONS, Words(), extras))
    if config.endpoint != "completions":
        ways += [Target(address, model, _CHAT, Words(), extras) for extras in _EXTRAS]
        ways += [Target(address, model, _CHAT, Words(), _USAGE, "max_completion_tokens")]
    seen = Exchange()
    for way in ways:
        seen = await _probe(way, 16, config.request_timeout_s)
        if seen.outcome in ("ok", "no_done") and seen.token_times_s:
            return way
        if seen.outcome != "client_error":
            break
    raise UsageError(f"{address.base}: a one-token completion fails: {seen.outcome} {seen.status or ''} {seen.detail[:200]}")


async def _probe(target: Target, words: int, timeout_s: float) -> Exchange:
    text = " ".join(["so", "they", "went", "on", "and", "on", "for", "days"] * (words // 8))
    return await stream(target.address, target.path, target.body(target.source.encode(text), 1), timeout_s)


async def _calibrate(target: Target, words: Words) -> None:
    counted = [(await _probe(target, count, 120)).usage.get("prompt_tokens") for count in _CALIBRATION_WORDS]
    if counted[0] and counted[1]:
        words.calibrate((_CALIBRATION_WORDS[0], counted[0]), (_CALIBRATION_WORDS[1], counted[1]))
