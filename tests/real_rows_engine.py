"""What `real_faults.py` does to the engine and the server themselves: kills, stops, overflows, signals.

The first row ends the shared server: two engines would hold each other up on a machine with two cores.
"""

import os
import signal
import time

import httpx
import psutil
from helpers_server import Gateway, wait_for
from real_scene import START_S, Scene, core_of, damaged, engine_processes, refused, row, suspend, tensor_set_to

_CORES_FOR_TWO_ENGINES = 8


@row("S6", "SIGTERM with a stream in flight that ends in time, and new requests")
def drain(scene: Scene) -> str:
    gateway, seen = scene.shared, {}
    family = psutil.Process(gateway.process.pid).children(recursive=True)

    def terminate() -> None:
        gateway.process.send_signal(signal.SIGTERM)
        wait_for(lambda: gateway.status("/readyz") == 503, 2)
        seen["new"] = refused(scene.ask(), 503, "server_draining")[:40]

    text, _ = scene.stream(gateway, 300, terminate)
    assert text.rstrip().endswith("data: [DONE]"), text[-200:]
    code = gateway.wait(30)
    assert code == 0, f"exit code {code}"
    assert psutil.wait_procs(family, timeout=3)[1] == [], "processes are left"
    return f"the stream ended with [DONE]; a new request {seen['new']}; exit code 0, no process left"


@row("S5", "SIGSTOP of the whole engine: a stream at its deadline, the engine replaced")
def hang(scene: Scene) -> str:
    gateway = scene.serve(request_timeout_s=6, hang_timeout_s=25).until_ready(START_S)
    engine = engine_processes(gateway)
    text, took_s = scene.stream(gateway, scene.window - 10, lambda: suspend(engine))
    assert "deadline_exceeded" in text, text[-200:]
    assert took_s < 8, took_s
    wait_for(lambda: gateway.status("/readyz") == 503, 10)
    assert gateway.status("/livez") == 200
    wait_for(lambda: not any(process.is_running() for process in engine), 60)
    again_s = wait_for(lambda: gateway.status("/readyz") == 200, START_S)
    assert gateway.stop() == 0
    return f"deadline_exceeded in the stream after {took_s:.1f} s; ready 503, live 200; replaced, ready after {again_s:.0f} s"


@row("S4", "kill -9 of EngineCore under a stream, then again beyond --max-restarts 1")
def engine_killed(scene: Scene) -> str:
    gateway = scene.serve(max_restarts=1, restart_backoff_s=0.1).until_ready(START_S)
    text, took_s = scene.stream(gateway, scene.window - 10, lambda: core_of(gateway).kill())
    last = text.strip().split("\n\n")[-1]
    assert '"error"' in last, last
    assert "data: [DONE]" not in text
    assert took_s < 2, f"{took_s:.2f} s"
    wait_for(lambda: gateway.status("/readyz") == 503, 5)
    again_s = wait_for(lambda: gateway.status("/readyz") == 200, START_S)
    core_of(gateway).kill()
    code = gateway.wait(30)
    assert code == 70, f"exit code {code}"
    return f"error event and no [DONE] {took_s:.2f} s after; ready 503; ready again after {again_s:.0f} s; then exit code 70"


@row("S7", "SIGTERM with a stream longer than --drain-s 1")
def drain_deadline(scene: Scene) -> str:
    gateway = scene.serve(drain_s=1).until_ready(START_S)
    family = psutil.Process(gateway.process.pid).children(recursive=True)
    text, took_s = scene.stream(gateway, scene.window - 10, lambda: gateway.process.send_signal(signal.SIGTERM))
    started = time.monotonic()
    code = gateway.wait(20)
    assert code == 143, f"exit code {code}"
    assert "server_draining" in text.strip().split("\n\n")[-1], text[-300:]
    assert "data: [DONE]" not in text
    assert took_s < 2.5, took_s
    ended_s = took_s + time.monotonic() - started
    assert ended_s < 1 + 2, f"{ended_s:.1f} s"
    assert psutil.wait_procs(family, timeout=3)[1] == [], "processes are left"
    return f"error event after {took_s:.1f} s, exit code 143 {ended_s:.1f} s after the signal, no process left"


@row("S22", "a model whose weights are finite and whose logits are not")
def non_finite(scene: Scene) -> str:
    folder = damaged(scene, "overflow")
    tensor_set_to(folder, 3e38, "model.norm.weight")
    # vLLM's newer model runner, its default for a Llama on CUDA, may die of such logits when it warms up: from NaNs it can draw
    # a token that the vocabulary does not have (its issue 53029). Then the older one is tried too, which lets them through.
    runners: tuple[dict[str, str], ...] = ({}, {"VLLM_USE_V2_MODEL_RUNNER": "0"})
    # Starting engines is nearly all of the row's time, so both start at once where neither would hold the other up.
    at_once = (os.cpu_count() or 1) >= _CORES_FOR_TWO_ENGINES
    servers = [scene.serve(folder, hang_timeout_s=30, environment=runner) for runner in runners[: 2 if at_once else 1]]
    seen, began = [], time.monotonic()
    for number, runner in enumerate(runners):
        which = "older runner" if runner else "default runner"
        if number == len(servers):
            servers.append(scene.serve(folder, hang_timeout_s=30, environment=runner))
        gateway = servers[number]
        if raised_the_alarm(scene, gateway):
            assert gateway.status("/readyz") == 503
            answer = refused(scene.ask(to=gateway), 500, "non_finite_logits")
            seen.append(f"{which}: after {time.monotonic() - began:.0f} s ready 503, ard_engine_non_finite 1, {answer}")
            for server in servers:
                server.stop()
            return "; ".join(seen)
        code, last = gateway.wait(30), gateway.stderr.splitlines()[-1]
        assert code == 70, f"exit code {code}: {last}"
        assert "the engine never became ready" in last, last
        seen.append(f"{which}: exit code 70 after {time.monotonic() - began:.0f} s: {last}")
    raise AssertionError("; ".join(seen))


def raised_the_alarm(scene: Scene, gateway: Gateway) -> bool:
    """Whether the server came as far as an alarm, or ended before; it may not be ready in between."""

    def has_ended_or_alarmed() -> bool:
        if gateway.process.poll() is not None:
            return True
        assert gateway.status("/readyz") == 503
        return scene.engine_metric("ard_engine_non_finite", gateway) == 1

    try:
        wait_for(has_ended_or_alarmed, START_S)
    except httpx.TransportError:  # it ends
        return False
    return gateway.process.poll() is None
