"""What `real_faults.py` asks of a server with a real engine: a function for each row, which says what it saw or raises."""

import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from helpers_server import wait_for
from real_scene import ALICE, BOB, START_S, Scene, damaged, refused, row, tensor_set_to

from server.auth import hash_key


@row("S1", "a truncated shard and a NaN weight at start")
def damaged_export(scene: Scene) -> str:
    seen = []
    short, nan = damaged(scene, "truncated"), damaged(scene, "nan")
    shard = next(short.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size // 2)
    tensor_set_to(nan, float("nan"), "norm.weight")
    for folder in (short, nan):
        started = time.monotonic()
        code = scene.serve(folder).wait(30)
        took_s = time.monotonic() - started
        assert code == 3, f"exit code {code}"
        assert took_s < 10, f"{took_s:.1f} s"
        seen.append(f"{folder.name}: exit code 3 in {took_s:.1f} s")
    return "; ".join(seen)


@row("S2", "a port that is in use")
def port_in_use(scene: Scene) -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        started = time.monotonic()
        assert scene.serve(port=taken.getsockname()[1]).wait(30) == 2
        return f"exit code 2 in {time.monotonic() - started:.1f} s, before the model was read"


@row("S3", "probes while the engine loads")
def while_loading(scene: Scene) -> str:
    gateway = scene.serve()
    states = gateway.status("/livez"), gateway.status("/readyz"), scene.ask(to=gateway).status_code
    assert states == (200, 503, 503), states
    started = time.monotonic()
    gateway.until_ready(START_S)
    scene.__dict__["shared"] = gateway
    return f"live 200, ready 503, a request 503; ready {time.monotonic() - started:.0f} s later"


@row("S8", "four times as many requests as fit, then one more with a full queue; streams of whole windows")
def full(scene: Scene) -> str:
    gateway, size = scene.shared, scene.window - 40
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(scene.ask, prompt=[5] * 20, max_tokens=size) for _ in range(3)]
        wait_for(lambda: scene.engine_metric("ard_queue_length", gateway) == 1, 20)
        took_ms = []
        with gateway.client(ALICE) as client:  # made before the clock starts: an httpx client takes as long as the answer may
            for _ in range(5):
                started = time.monotonic()
                answer = client.post("/v1/completions", json={"prompt": [5] * 20, "max_tokens": size})
                took_ms.append(1e3 * (time.monotonic() - started))
                refused(answer, 429, "server_busy")
                assert int(answer.headers["retry-after"]) >= 1
        answers = [future.result() for future in asked]
    statuses = [answer.status_code for answer in answers]
    assert statuses == [200] * 3, statuses
    written = [answer.json()["usage"]["completion_tokens"] for answer in answers]
    assert written == [size] * 3, written
    preempted = scene.engine_metric("vllm:num_preemptions_total")
    assert preempted == 0, f"{preempted} preemptions"
    assert min(took_ms) < 50, took_ms
    quick = f"429 with Retry-After in {min(took_ms):.0f} to {max(took_ms):.0f} ms"
    return f"{quick}; those let in and the one that waited 200, {size} tokens each; preemptions 0"


@row("S9", "n, best_of, logprobs, max_tokens out of range")
def out_of_range(scene: Scene) -> str:
    wrong: dict[str, Any] = {"n": 10_000, "best_of": 99, "logprobs": 500, "max_tokens": 10**9, "prompt_logprobs": -2}
    return "; ".join(refused(scene.ask(**{name: value}), 400, param=name)[:70] for name, value in wrong.items())


@row("S10", "a body of 30 MB")
def big_body(scene: Scene) -> str:
    with scene.shared.client(ALICE) as client:
        started = time.monotonic()
        answer = client.post("/v1/completions", content=b"x" * 30_000_000)
        return refused(answer, 413) + f" ({time.monotonic() - started:.2f} s)"


@row("S11", "half a header, half a body, silence")
def slow_sender(scene: Scene) -> str:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
    key = f"authorization: Bearer {ALICE}\r\n".encode()
    seen = []
    for what, sent in {
        "silence": b"",
        "half a header": head,
        "half a body": head + key + b"content-length: 9\r\n\r\n{",
    }.items():
        with socket.create_connection(("127.0.0.1", scene.shared.port), timeout=10) as connection:
            connection.sendall(sent)
            started = time.monotonic()
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 408"), answer[:80]
        seen.append(f"{what}: 408 after {time.monotonic() - started:.1f} s")
    return "; ".join(seen)


@row("S12", "broken, deep, huge and lone-surrogate JSON")
def bad_json(scene: Scene) -> str:
    bodies = [
        b"{",
        b"\xff\xfe{}",
        b'{"prompt": "\\ud800"}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"a":' * 80 + b"1" + b"}" * 80,
    ]
    with scene.shared.client(ALICE) as client:
        return "; ".join({refused(client.post("/v1/completions", content=body), 400, "invalid_json")[:60] for body in bodies})


@row("S13", "a parameter that this vLLM does not have, and one of its own")
def unknown_parameter(scene: Scene) -> str:
    assert scene.ask(min_p=0.1, top_k=5).status_code == 200
    return refused(scene.ask(top_q=5), 400, "unknown_parameter", "top_q")


@row("S14", "a prompt longer than the window")
def too_long(scene: Scene) -> str:
    before = scene.engine_metric("vllm:prompt_tokens_total")
    seen = refused(scene.ask(prompt="harbour " * 4 * scene.window), 400, "context_length_exceeded")
    assert str(scene.window) in seen, seen
    prefilled = scene.engine_metric("vllm:prompt_tokens_total") - before
    assert prefilled < 100, f"{prefilled} prompt tokens were read"
    return f"{seen}; prompt tokens read meanwhile {prefilled:.0f} (canaries)"


@row("S15", "no key, a wrong one, a near-right one")
def keys(scene: Scene) -> str:
    return "; ".join(refused(scene.ask(key), 401)[:60] for key in (None, "wrong", ALICE[:-1]))


@row("S16", "vLLM's other routes, and a wrong method")
def routes(scene: Scene) -> str:
    with scene.shared.client() as client:
        paths = ("/invocations", "/tokenize", "/docs", "/v1/embeddings", "/pause", "/load")
        found = {path: client.post(path, json={}).status_code for path in paths}
        assert set(found.values()) == {404}, found
        assert client.put("/v1/completions", json={}).status_code == 405
    return f"404 for {', '.join(paths)}; 405 for PUT"


@row("S17", "clients leave, a stream and a plain request")
def client_leaves(scene: Scene) -> str:
    seen = []
    for stream in (True, False):
        body = {"prompt": [5, 6], "max_tokens": scene.window - 10, "ignore_eos": True, "stream": stream}
        raw = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ALICE}\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", scene.shared.port), timeout=10) as connection:
            connection.sendall(head.encode() + raw)
            wait_for(lambda: scene.engine_metric("vllm:num_requests_running") >= 1, 20)
        took_s = wait_for(lambda: scene.engine_metric("vllm:num_requests_running") == 0, 10)
        assert took_s < 1.5, f"{took_s:.2f} s"
        seen.append(f"{'stream' if stream else 'plain'}: the engine's slot free after {took_s:.2f} s")
    return "; ".join(seen)


@row("S18", "grammar bombs beyond the limits, and a heavy grammar within them beside short requests")
def bombs(scene: Scene) -> str:
    beyond: dict[str, Any] = {"structured_outputs": {"regex": "((a{1000}){1000}){1000}"}}
    seen = refused(scene.ask(**beyond), 400)[:90]
    # Not beyond its grammar: to older vLLM a token after the grammar's end is an error (its issue 42619), so that is refused.
    heavy: dict[str, Any] = {"structured_outputs": {"regex": "((a|b|c|d|e){1,99}(f|g|h){1,99}){1}x"}, "max_tokens": 200}
    seen += "; " + refused(scene.ask(**heavy), 400, param="ignore_eos")[:90]
    heavy["ignore_eos"] = False
    with ThreadPoolExecutor(2) as pool:
        bomb = pool.submit(scene.ask, **heavy)
        took_s = []
        for _ in range(5):
            started = time.monotonic()
            assert scene.ask(BOB, max_tokens=1).status_code == 200
            took_s.append(time.monotonic() - started)
        status = bomb.result().status_code
    assert status in (200, 400), bomb.result().text
    assert max(took_s) < 10, took_s
    return f"{seen}; the heavy one {status}, five others beside it at most {max(took_s):.2f} s each"


@row("S19", "a control token typed by a user")
def control_token(scene: Scene) -> str:
    def prompt_tokens(content: str) -> int:
        with scene.shared.client(ALICE, timeout_s=60) as client:
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            return int(client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"])

    more = prompt_tokens("a<|im_end|>") - prompt_tokens("a")
    assert more > 3, f"{more} tokens"
    return f"<|im_end|> in a message is {more} tokens of text, not one control token"


@row("S20", "an image URL on a listening socket")
def media(scene: Scene) -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(2)
        part = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"}}
        with scene.shared.client(ALICE) as client:
            answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part]}]})
        seen = refused(answer, 400)
        try:
            listener.accept()
        except TimeoutError:
            return f"{seen}; nobody connected in 2 s"
    raise AssertionError("the URL was fetched")


@row("S21", "one key's cached prompt asked by another")
def cache_salt(scene: Scene) -> str:
    def hits(key: str) -> float:
        before = scene.engine_metric("vllm:prefix_cache_hits_total")
        assert scene.ask(key, prompt=[9 + number % 200 for number in range(600)], max_tokens=1).status_code == 200
        return scene.engine_metric("vllm:prefix_cache_hits_total") - before

    first, own, others = hits(ALICE), hits(ALICE), hits(BOB)
    assert (first, others) == (0, 0), (first, own, others)
    assert own > 0, "the same key did not hit either"
    return f"tokens found in the cache: the key itself {own:.0f}, the other key {others:.0f}"


@row("S23", "prompts and keys in the logs of gateway and engine")
def logs(scene: Scene) -> str:
    scene.ask(prompt="the secret recipe of harbour soup")
    scene.ask("sk-mistyped-key", prompt="the secret recipe of harbour soup")
    text = scene.shared.stderr + scene.shared.stdout
    found = [secret for secret in ("secret recipe", ALICE, BOB, "sk-mistyped-key", hash_key(ALICE)) if secret in text]
    assert not found, found
    return f"none in {len(text.splitlines())} lines"
