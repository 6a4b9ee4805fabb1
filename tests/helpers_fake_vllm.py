"""A stand-in for `python -m vllm.entrypoints.openai.api_server`: the same routes on a Unix socket, scripted faults.

It runs as a process of its own, on `--port` where that is given. A request says in its `user` field, as JSON, how it is
to be answered: `tokens`, `first_s`, `gap_s` (timing), `end` (done, truncate, error, die, hang; late: a stream is cut after its
last event), `logprob`, `health` (the engine's own status from then on). What it sees it writes to $FAKE_LOG as JSON lines, so
that a test can tell what reached the engine and what was cancelled. As in vLLM, `--max-num-seqs` requests are computed at once
and others wait inside; with `seats` in $FAKE_SCRIPT it is so many, whatever the flag says.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

HELP = "--model --served-model-name --uds --max-model-len --load-format --disable-uvicorn-access-log --max-num-seqs"
PARAMETERS = """model prompt messages input n best_of max_tokens max_completion_tokens max_output_tokens stream stream_options
    user temperature logprobs top_logprobs prompt_logprobs seed cache_salt response_format tools stop instructions store
    priority prompt_embeds structured_outputs ignore_eos"""
STATUS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    500: "Internal Server Error",
    503: "Unavailable",
}


def log(**fields: Any) -> None:
    with Path(os.environ["FAKE_LOG"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


class FakeEngine:
    def __init__(self, arguments: list[str]) -> None:
        self.script: dict[str, Any] = json.loads(os.environ.get("FAKE_SCRIPT", "{}"))
        self.corrupted = self.generated = 0
        told = [int(value) for flag, value in itertools.pairwise(arguments) if flag == "--max-num-seqs"]
        self.seats = asyncio.Semaphore(self.script.get("seats") or [1000, *told][-1])

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                request_line, *lines = head.split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self.answer(request_line.split()[1], headers, body, reader, writer)
        writer.close()

    async def answer(
        self, path: str, headers: dict[str, str], body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if path.startswith("/v1") and headers.get("authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            return reply(writer, 401, {"error": "Unauthorized"})
        if path == "/health":
            return reply(writer, self.script.get("health", 200), {})
        if path == "/version":
            return reply(writer, 200, {"version": self.script["version"]} if "version" in self.script else {})
        if path == "/openapi.json":
            log(event="openapi")
            schema = {"properties": dict.fromkeys(PARAMETERS.split(), 0)}
            names = ("CompletionRequest", "ChatCompletionRequest", "ResponsesRequest")
            return reply(writer, 200, {"components": {"schemas": dict.fromkeys(names, schema)}})
        if path == "/v1/models":
            name = self.script.get("model", "tiny")
            return reply(writer, 200, {"data": [{"id": name, "max_model_len": self.script.get("window", 512)}]})
        if path == "/metrics":
            blocks = self.script.get("blocks", 65)
            text = f'vllm:cache_config_info{{num_gpu_blocks="{blocks}",block_size="16"}} 1.0\n'
            if self.script.get("counts_nans", True):
                text += f"vllm:corrupted_requests_total {self.corrupted}\n"
            text += f"vllm:generation_tokens_total {self.generated}\n"
            return reply(writer, 200, text, "text/plain")
        fields = json.loads(body)
        if path == "/tokenize":
            log(event="tokenize")
            texts = (
                [fields["prompt"]] if "prompt" in fields else [str(message.get("content")) for message in fields["messages"]]
            )
            return reply(writer, 200, {"count": len("".join(texts))})
        is_canary = headers.get("x-request-id") == "canary"
        self.corrupted += self.script.get("corrupted", 0)
        script = self.script.get("canary", {}) if is_canary else script_of(fields.get("user"))
        if not is_canary:
            log(event="start", path=path, id=headers.get("x-request-id"), trace=headers.get("traceparent"), body=body.decode())
        work = asyncio.create_task(self.generate(writer, fields, script))
        gone = asyncio.create_task(reader.read(1))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        outcome = "done" if work.done() and not work.exception() else "cancelled"
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
        if not is_canary:
            log(event=outcome, id=headers.get("x-request-id"))
        if outcome == "cancelled":
            raise ConnectionError
        return None

    async def generate(self, writer: asyncio.StreamWriter, fields: dict[str, Any], script: dict[str, Any]) -> None:
        async with self.seats:
            await asyncio.sleep(script.get("first_s", 0))
            self.script |= {"health": script["health"]} if "health" in script else {}
            if status := script.get("status"):
                message = "Out of range float values are not JSON compliant"
                return reply(writer, status, {"error": {"message": message}})
            if fields.get("stream"):
                return await self.stream(writer, script)
            return await self.whole(writer, script)

    async def whole(self, writer: asyncio.StreamWriter, script: dict[str, Any]) -> None:
        if (end := script.get("end", "done")) != "done":
            await misbehave(end, writer)
        count, logprob = script.get("tokens", 1), script.get("logprob", -0.5)
        for _ in range(count):
            await self.token(script)
        choice = {"index": 0, "text": "x" * count, "logprobs": {"token_logprobs": [logprob]}, "finish_reason": "stop"}
        reply(writer, 200, {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": {"prompt_tokens": 1}})

    async def stream(self, writer: asyncio.StreamWriter, script: dict[str, Any]) -> None:
        head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        for index in range(script.get("tokens", 3)):
            event(writer, {"id": "cmpl-1", "choices": [{"index": 0, "text": f"{index} data: [DONE]\n\n"}]})
            await writer.drain()
            await self.token(script)
        if (end := script.get("end", "done")) not in ("done", "late"):
            await misbehave(end, writer)
        chunk(writer, b"data: [DONE]\n\n")
        await writer.drain()
        if end == "late":
            raise ConnectionError
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def token(self, script: dict[str, Any]) -> None:
        await asyncio.sleep(script.get("gap_s", 0))
        self.generated += not script.get("uncounted")


def script_of(user: Any) -> dict[str, Any]:
    try:
        script = json.loads(user)
    except (TypeError, ValueError):
        return {}
    return script if isinstance(script, dict) else {}


async def misbehave(end: str, writer: asyncio.StreamWriter) -> None:
    if end == "hang":
        await asyncio.sleep(3600)
    if end == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "error":
        event(writer, {"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "code": 500}})
        chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
    if end == "truncate":
        chunk(writer, b'data: {"id": "cmpl-1", "choi')
    await writer.drain()
    writer.close()
    raise ConnectionError


def event(writer: asyncio.StreamWriter, fields: dict[str, Any]) -> None:
    chunk(writer, b"data: " + json.dumps(fields).encode() + b"\n\n")


def chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def reply(writer: asyncio.StreamWriter, status: int, content: Any, content_type: str = "application/json") -> None:
    body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
    head = f"HTTP/1.1 {status} {STATUS[status]}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


async def main(arguments: list[str]) -> None:
    engine = FakeEngine(arguments)
    log(event="engine", pid=os.getpid(), arguments=arguments)
    if (code := engine.script.get("exit")) is not None:
        print(f"ValueError: {engine.script.get('last_words', 'no reason')}")
        sys.exit(code)
    await asyncio.sleep(engine.script.get("load_s", 0))
    if "--port" in arguments:
        server = await asyncio.start_server(engine.connection, "127.0.0.1", int(arguments[arguments.index("--port") + 1]))
    else:
        server = await asyncio.start_unix_server(engine.connection, arguments[arguments.index("--uds") + 1])
    # As vLLM does: a second process that outlives the first unless somebody ends it.
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(600)")
    log(event="worker", pid=worker.pid)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    if "--help=all" in sys.argv:
        print(HELP)
    else:
        asyncio.run(main(sys.argv[1:]))
