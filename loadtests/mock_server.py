"""An OpenAI-compatible server whose latencies are known, so that a client can be held to the truth.

It streams completions with a stated TTFT and gap, answers needles it finds in the prompt, reports vLLM's metrics, and
breaks on demand. `python -m loadtests.mock_server --ttft-ms 200` prints its port on stdout once it listens.
"""

import argparse
import asyncio
import functools
import itertools
import json
import math
import os
import re
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import uvloop
from pydantic import Field

from ard_serve.settings import Settings, add_flags
from loadtests.mock_http import Call

Fault = Literal["none", "stall", "drop", "error_event", "429", "500", "die", "short_usage", "wrong_under_load", "mixed"]

_MIXED = ("429", "500", "stall", "drop", "error_event")

_NEEDLE = re.compile(r"number for ([\w-]+) is: (\d+)")
_ASKED = re.compile(r".*number for ([\w-]+)\?", re.DOTALL)
_WORD = re.compile(r"\s*\w+|\s*[^\w\s]")
_QUESTION_TOKENS = 64
_BACKLOG = 4096
# Share of its wait for the first token after which a completion is looked at.
_PATIENCE = 0.25


class MockConfig(Settings):
    """How the mock server behaves."""

    port: int = Field(0, ge=0, le=65535, description="port on 127.0.0.1; 0 takes a free one")
    ttft_ms: float = Field(200, ge=0, description="time from a request's arrival to its first token")
    ttft_ms_per_token: float = Field(0, ge=0, description="added to the TTFT for each prompt token")
    itl_ms: float = Field(20, ge=0, description="gap between tokens")
    tokens_per_event: int = Field(1, ge=1, description="tokens that one streamed event carries")
    max_model_len: int = Field(131072, ge=16, description="the window it claims")
    kv_blocks: int = Field(4096, ge=2, description="KV blocks of 16 tokens it claims; more than fit raises preemptions")
    prefix_cache: bool = Field(False, description="count every prompt token as a prefix cache hit")
    engine_metrics: bool = Field(True, description="answer on /metrics and /tokenize as vLLM does")
    strict: bool = Field(False, description="refuse token ids, ignore_eos and stream_options as a plain server would")
    api_key: str = Field("", description="the key it wants, as a hosted API does; any request will do when empty")
    fault: Fault = Field("none", description="what goes wrong")
    fault_every: int = Field(1, ge=1, description="the fault strikes each n-th completion")
    fault_after: int = Field(0, ge=0, description="completions before the first fault")


@dataclass
class _Engine:
    """What the mock pretends to compute: a vocabulary that grows, and the counters vLLM keeps."""

    words: list[str] = field(default_factory=lambda: ["<s>"])
    ids: dict[str, int] = field(default_factory=lambda: {"<s>": 0})
    held_blocks: dict[int, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    hits: int = 0
    preemptions: int = 0
    latest_s: float = 0

    def encode(self, text: str) -> list[int]:
        return [self._id(word) for word in _WORD.findall(text)]

    def _id(self, word: str) -> int:
        if word not in self.ids:
            self.ids[word] = len(self.words)
            self.words.append(word)
        return self.ids[word]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.words[token] if token < len(self.words) else " ?" for token in tokens)

    def answer(self, tokens: list[int]) -> str:
        """Reads a whole prompt only where it ends in a question: with hundreds of streams its own work would be seen."""
        asked = _ASKED.match(self.decode(tokens[-_QUESTION_TOKENS:]))
        return dict(_NEEDLE.findall(self.decode(tokens))).get(asked.group(1), "none") if asked else "none"

    def outgrows(self, prompt_tokens: int, output_tokens: int, blocks: int) -> bool:
        """Whether requests of this shape are admitted by their prompts and then outgrow the cache."""
        running, whole = len(self.held_blocks), math.ceil((prompt_tokens + output_tokens) / 16)
        admitted = min(running, blocks // math.ceil(prompt_tokens / 16))
        return admitted * whole > blocks

    def metrics(self, config: MockConfig) -> str:
        usage = min(1.0, sum(self.held_blocks.values()) / (config.kv_blocks - 1))
        samples = {
            "vllm:num_requests_running": len(self.held_blocks),
            "vllm:kv_cache_usage_perc": usage,
            "vllm:num_preemptions_total": self.preemptions,
            "vllm:prefix_cache_hits_total": self.hits,
            "vllm:prompt_tokens_total": self.prompt_tokens,
            "vllm:generation_tokens_total": self.generation_tokens,
            f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{config.kv_blocks}"}}': 1.0,
            "mock:event_lateness_seconds_max": self.latest_s,
        }
        return "".join(f"{name} {value}\n" for name, value in samples.items())


class MockServer:
    """Answers the routes of vLLM that a load test asks."""

    def __init__(self, config: MockConfig) -> None:
        self.config = config
        self._engine = _Engine()
        self._numbers = itertools.count()
        self._reading = asyncio.Lock()

    async def handle(self, call: Call) -> None:
        """Answer one request."""
        engine, key = self._engine, self.config.api_key
        if key and call.authorization != f"Bearer {key}":
            _reply(call, 401, {"error": {"message": "no such key", "code": 401}})
        elif call.path == "/v1/models":
            model = {"id": "mock", "object": "model", "max_model_len": self.config.max_model_len}
            _reply(call, 200, {"object": "list", "data": [model]})
        elif call.path in ("/v1/completions", "/v1/chat/completions"):
            await self._complete(await self._read(call), call)
        elif call.path == "/tokenize" and self.config.engine_metrics:
            tokens = engine.encode(json.loads(call.body)["prompt"])
            _reply(call, 200, {"tokens": tokens, "count": len(tokens)})
        elif call.path == "/metrics" and self.config.engine_metrics:
            _reply_text(call, 200, engine.metrics(self.config), "text/plain")
        else:
            _reply(call, 404, {"error": {"message": f"no route {call.path}", "code": 404}})

    async def _read(self, call: Call) -> dict[str, Any]:
        """Parse a completion's body: after those that came with it are stamped, one a turn of the loop.

        Their 10 KB each would otherwise keep the next ones waiting in their sockets, and the client be blamed for it.
        """
        await asyncio.sleep(self.config.ttft_ms / 1000 * _PATIENCE)
        async with self._reading:
            await asyncio.sleep(0)
            request: dict[str, Any] = json.loads(call.body)
        return request

    async def _complete(self, request: dict[str, Any], call: Call) -> None:
        number, config = next(self._numbers), self.config
        strikes = number >= config.fault_after and (number - config.fault_after) % config.fault_every == 0
        fault: str = config.fault if strikes else "none"
        if fault == "mixed":
            fault = _MIXED[(number - config.fault_after) // config.fault_every % len(_MIXED)]
        if fault == "die":
            os._exit(1)
        if fault in ("429", "500"):
            _reply(call, int(fault), {"error": {"message": f"injected {fault}", "code": int(fault)}})
            return
        prompt = request["messages"][-1]["content"] if "messages" in request else request["prompt"]
        if config.strict and (isinstance(prompt, list) or "ignore_eos" in request):
            _reply(call, 400, {"error": {"message": "only text prompts and standard parameters", "code": 400}})
            return
        tokens = self._engine.encode(prompt) if isinstance(prompt, str) else prompt
        if len(tokens) + request["max_tokens"] > config.max_model_len:
            _reply(call, 400, {"error": {"message": f"the window is {config.max_model_len} tokens", "code": 400}})
            return
        try:
            await self._stream(number, fault, tokens, request, call)
        finally:
            self._engine.held_blocks.pop(number, None)

    async def _stream(self, number: int, fault: str, tokens: list[int], request: dict[str, Any], call: Call) -> None:
        config, engine = self.config, self._engine
        count, chat = request["max_tokens"], "messages" in request
        engine.prompt_tokens += len(tokens)
        engine.hits += len(tokens) if config.prefix_cache else 0
        engine.held_blocks[number] = math.ceil((len(tokens) + count) / 16)
        engine.preemptions += engine.outgrows(len(tokens), count, config.kv_blocks - 1)
        answer = " " + engine.answer(tokens)
        due_s = call.arrived_s + (config.ttft_ms + config.ttft_ms_per_token * len(tokens)) / 1000
        await _sleep_until(due_s)
        wrong = fault == "wrong_under_load" and len(engine.held_blocks) > 1
        words = ["000000" if wrong else answer, *[" so"] * (count - 1)]
        call.start(200, "text/event-stream")
        first_s = 0.0
        for at in range(0, count, config.tokens_per_event):
            if at:
                due_s += config.itl_ms * config.tokens_per_event / 1000
                await _sleep_until(due_s)
            if at >= count // 2 and fault in ("stall", "drop", "error_event"):
                await _break(fault, call)
                return
            text = "".join(words[at : at + config.tokens_per_event])
            left_s = call.send(_token_line(text, chat, at + config.tokens_per_event >= count))
            engine.latest_s, first_s = max(engine.latest_s, left_s - due_s), first_s or left_s
        engine.generation_tokens += count
        tail = b""
        if request.get("stream_options") and not config.strict:
            reported = len(tokens) - 7 if fault == "short_usage" else len(tokens)
            usage = {"prompt_tokens": reported, "completion_tokens": count, "total_tokens": reported + count}
            usage |= {"arrived_s": call.arrived_s, "first_event_s": first_s}
            tail = _line({"choices": [], "usage": usage})
        call.end(tail + b"data: [DONE]\n\n")


@functools.lru_cache(maxsize=1024)
def _token_line(text: str, chat: bool, last: bool) -> bytes:
    """An event with tokens; most are alike, and at hundreds of streams writing their JSON anew would be felt."""
    content: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    choice = {"index": 0, "finish_reason": "length" if last else None, **content}
    return _line({"object": "text_completion", "choices": [choice]})


async def _break(fault: str, call: Call) -> None:
    if fault == "stall":
        await asyncio.sleep(3600)
    if fault == "error_event":
        call.send(_line({"error": {"message": "engine died", "code": 500}}))
    call.end()


async def _sleep_until(due_s: float) -> None:
    # uvloop's timers count whole milliseconds and may end early.
    while (left_s := due_s - time.perf_counter()) > 0:
        await asyncio.sleep(left_s)


def _line(data: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json.dumps(data).encode()


def _reply(call: Call, status: int, data: dict[str, Any]) -> None:
    _reply_text(call, status, json.dumps(data), "application/json")


def _reply_text(call: Call, status: int, text: str, kind: str) -> None:
    call.start(status, kind)
    call.end(text.encode())


async def _serve(config: MockConfig) -> None:
    server, loop = MockServer(config), asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", config.port), backlog=_BACKLOG)
    print(listener.getsockname()[1], flush=True)
    # The loop listens again, with a backlog of its own.
    listening = await loop.create_server(lambda: Call(server.handle), sock=listener, backlog=_BACKLOG)
    await listening.serve_forever()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_flags(parser, MockConfig, *MockConfig.model_fields)
    uvloop.run(_serve(MockConfig.resolve(None, vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
