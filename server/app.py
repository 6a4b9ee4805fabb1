"""`ard serve` from start to exit code: bind, check, start the engine, serve, drain, stop."""

import asyncio
import logging
import os
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from ard_serve.console import out, print_table
from ard_serve.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, UsageError
from server import capacity, flags, preflight
from server.admission import Admission
from server.attachment import ENGINE_KEY, Attachment
from server.auth import Keys
from server.call import CallLimits
from server.config import ServeConfig
from server.engine import engine_spec
from server.errors import unavailable
from server.gateway import Gateway
from server.health import Health
from server.listener import bind, make_server
from server.literal import Literal, control_tokens
from server.metrics import Metrics
from server.preflight import Checkpoint
from server.routes import build_app, build_metrics_app
from server.supervisor import Supervisor
from server.traces import Traces
from server.upstream import Upstream
from server.watch import Watch

log = logging.getLogger("server")

_DRAIN_POLL_S = 0.05
_STOP_GRACE_S = 0.5
_LOOPBACK = ("127.", "::1", "localhost")


def run(config: ServeConfig) -> int:
    """Serve until a signal. Exit code 0 after a complete drain, 143 or 130 if requests had to be cut off.

    Raises:
        ArdError: usage (2), model (3), memory (5), or an engine that died for good (70).
    """
    keys = _keys(config)
    traces = Traces(config.traces) if config.traces else None
    listeners = [bind(config.host, config.port)]
    if config.metrics_port is not None:
        listeners.append(bind(config.host, config.metrics_port))
    checkpoint = preflight.check_model(config)
    if config.attach and config.engine_args:
        raise UsageError(f"{config.engine_args[0]} after --: the engine at {config.attach} has its flags already; remove it")
    gpus = capacity.gpu_memory_bytes()
    engine_flags = () if config.attach else _plan_engine(config, checkpoint, gpus)
    # The lanes of an attached engine are its operator's to set; those of a GPU are the likelier guess for it.
    lanes = flags.lanes(config, bool(gpus) or bool(config.attach))
    with tempfile.TemporaryDirectory(prefix="ard-serve-") as folder:
        make_keeper = partial(_keeper, config, checkpoint, engine_flags, lanes, Path(folder))
        return uvloop.run(_serve(config, checkpoint, keys, listeners, traces, make_keeper))


def _plan_engine(config: ServeConfig, checkpoint: Checkpoint, gpus: tuple[int, ...]) -> tuple[str, ...]:
    """Print what fits, and return the flags that we add to the operator's."""
    kv_bytes = capacity.kv_cache_bytes(config, bool(gpus))
    plan = capacity.plan(checkpoint, gpus, kv_bytes, config.engine_args)
    out.print(plan.title(config.model_name), highlight=False)
    print_table("", ("tokens a request", "KV GiB", "fit at once"), plan.rows(checkpoint.window))
    known = flags.known_flags(config.engine_command)
    flags.check_engine_args(config.engine_args, known)
    return flags.optional_flags(config, known, bool(gpus), kv_bytes)


def _keys(config: ServeConfig) -> Keys:
    if not config.api_keys and not config.allow_anonymous and not config.host.startswith(_LOOPBACK):
        raise UsageError(
            f"--host {config.host} can be reached by others and there are no keys; add --api-keys FILE or --allow-anonymous"
        )
    return Keys(config.api_keys)


async def _serve(
    config: ServeConfig,
    checkpoint: Checkpoint,
    keys: Keys,
    listeners: list[socket.socket],
    traces: Traces | None,
    make_keeper: Callable[[], Supervisor | Attachment],
) -> int:
    keeper = make_keeper()
    card = preflight.model_card(config, checkpoint, int(time.time()))
    limits = CallLimits.of(config, checkpoint.window, checkpoint.measured_limit)
    literal = Literal(control_tokens(config.model))
    gateway = Gateway(config, limits, card, keys, literal, keeper.watch, traces)
    apps = (build_app(gateway), build_metrics_app(gateway))
    servers = [
        make_server(app, config.header_timeout_s, config.idle_timeout_s) for app, _ in zip(apps, listeners, strict=False)
    ]
    signals = _Signals(keys)
    pairs = zip(servers, listeners, strict=True)
    serving = asyncio.gather(*(server.serve(sockets=[listener]) for server, listener in pairs))
    engine = asyncio.create_task(keeper.run())
    for listener, what in zip(listeners, ("the engine is loading", "metrics"), strict=False):
        host, port = listener.getsockname()[:2]
        out.print(f"listening on http://{host}:{port}, {what}", highlight=False)
    try:
        ends: tuple[asyncio.Future[Any], ...] = (serving, engine, signals.first)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if engine.done():
            gateway.abort_all(unavailable("the engine died and could not be restarted", "engine_failed"))
            engine.result()
        return await _drain(config.drain_s, gateway, keeper.watch.health, signals) if signals.first.done() else 0
    finally:
        engine.cancel()
        for server in servers:
            server.should_exit = True
        await asyncio.gather(serving, engine, return_exceptions=True)
        await keeper.stop(_STOP_GRACE_S)
        keeper.watch.upstream.close()
        if traces:
            traces.close()


def _keeper(
    config: ServeConfig, checkpoint: Checkpoint, engine_flags: tuple[str, ...], lanes: tuple[int, int], folder: Path
) -> Supervisor | Attachment:
    """Who looks after the engine, ours or one that runs already. To be called in the event loop."""
    window, metrics = checkpoint.window, Metrics()
    metrics.describe(config.model_name, checkpoint.manifest, checkpoint.measured_limit)
    admission = Admission(config.queue_size, config.queue_timeout_s)
    if config.attach:
        upstream = Upstream(config.attach, os.environ.get(ENGINE_KEY, ""))
        return Attachment(config, Watch(config, upstream, window, lanes, Health(), admission, metrics))
    path, key = folder / "engine.sock", secrets.token_hex(32)
    spec = engine_spec(config, path, key, window, engine_flags)
    return Supervisor(config, spec, Watch(config, Upstream(path, key), window, lanes, Health(), admission, metrics))


async def _drain(drain_s: float, gateway: Gateway, health: Health, signals: "_Signals") -> int:
    """Refuse what is new, wait for what is there, end what does not end. A second signal ends the waiting."""
    number = signals.first.result()
    health.drain()
    log.info("%s: draining, %d requests in flight, at most %g s", number.name, gateway.in_flight, drain_s)
    deadline = time.monotonic() + drain_s
    while gateway.in_flight and time.monotonic() < deadline and not signals.again.is_set():
        await asyncio.sleep(_DRAIN_POLL_S)
    if not gateway.in_flight:
        return 0
    log.warning("drain deadline: ending %d requests", gateway.in_flight)
    gateway.abort_all(unavailable("the server is shutting down before this request could finish", "server_draining"))
    return EXIT_INTERRUPTED if number is signal.SIGINT else EXIT_TERMINATED


class _Signals:
    """SIGTERM and SIGINT as a future, a further one as an event; SIGHUP reads the key file again."""

    def __init__(self, keys: Keys) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[signal.Signals] = loop.create_future()
        self.again = asyncio.Event()
        self._keys = keys
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)

    def _stop(self, number: signal.Signals) -> None:
        if self.first.done():
            self.again.set()
        else:
            self.first.set_result(number)

    def _reload(self) -> None:
        try:
            self._keys.reload()
            log.info("key file read again")
        except UsageError as error:
            log.error("key file not read again, the keys from before stay: %s", error)
