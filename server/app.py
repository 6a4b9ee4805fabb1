"""`ard serve` from start to exit code: bind, check, start the engine, serve, drain, stop."""

import asyncio
import ipaddress
import logging
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
from server.assembly import Assembly, EnginePlan, assemble
from server.auth import Keys
from server.config import ServeConfig
from server.contents import Contents
from server.errors import unavailable
from server.gateway import Gateway
from server.listener import bind, make_server
from server.literal import Literal, control_tokens
from server.preflight import Checkpoint
from server.profiles import Profiles
from server.routes import build_app, build_metrics_app
from server.shortmodel import check_short, short_config, short_text_loss
from server.traces import Traces

log = logging.getLogger("server")

_DRAIN_POLL_S = 0.05
_STOP_GRACE_S = 0.5
_CHECK_FIRST_S = 0.25


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
    native = check_short(config, checkpoint) if config.profile_short else None
    contents = Contents(checkpoint, *([native] if native else []))
    if config.attach and config.engine_args:
        raise UsageError(f"{config.engine_args[0]} after --: the engine at {config.attach[0]} has its flags already; remove it")
    gpus = capacity.gpu_memory_bytes()
    main, short = _plan_engines(config, checkpoint, native, gpus)
    # The lanes of an attached engine are its operator's to set; those of a GPU are the likelier guess for it.
    lanes = flags.lanes(config, bool(gpus) or bool(config.attach))
    with tempfile.TemporaryDirectory(prefix="ard-serve-") as folder:
        make = partial(assemble, main, short, lanes, Path(folder), contents.passed)
        card = preflight.model_card(config, checkpoint, int(time.time()))
        if native:
            card["profile_short"] = _introduce(config, checkpoint, native)
        contents.wait(_CHECK_FIRST_S)
        return uvloop.run(_serve(config, card, keys, listeners, traces, contents, make))


def _plan_engines(
    config: ServeConfig, checkpoint: Checkpoint, native: Checkpoint | None, gpus: tuple[int, ...]
) -> tuple[EnginePlan, EnginePlan | None]:
    if config.attach:
        return EnginePlan(config, checkpoint, (), config.seats), None
    if native is None:
        return _plan_engine(config, checkpoint, gpus), None
    main, short = capacity.split(config, short_config(config), checkpoint, native, gpus)
    return _plan_engine(main, checkpoint, gpus), _plan_engine(short, native, gpus)


def _plan_engine(config: ServeConfig, checkpoint: Checkpoint, gpus: tuple[int, ...]) -> EnginePlan:
    """Print what fits, and choose the flags that we add to the operator's."""
    kv_bytes = capacity.kv_cache_bytes(config, bool(gpus))
    plan = capacity.plan(checkpoint, gpus, kv_bytes, config.engine_args)
    out.print(plan.title(str(config.model)), highlight=False)
    print_table("", ("tokens a request", "KV GiB", "fit at once"), plan.rows(checkpoint.window))
    known = flags.known_flags(config.engine_command)
    flags.check_engine_args(config.engine_args, known)
    seats = config.seats or capacity.default_seats(gpus)
    ours = flags.optional_flags(config, known, bool(gpus), kv_bytes, checkpoint.window, seats)
    return EnginePlan(config, checkpoint, ours, capacity.seats((*ours, *config.engine_args)))


def _introduce(config: ServeConfig, checkpoint: Checkpoint, native: Checkpoint) -> dict[str, Any]:
    """Say who answers what is short, and what the report says for it; the same for /v1/models."""
    losses = short_text_loss(checkpoint.manifest, native.window)
    why = "; ".join(losses) or "no loss on short text, so the native model may be memory for nothing"
    log.info("up to %d tokens %s answers; the report shows: %s", native.window, config.profile_short, why)
    return {"model": str(config.profile_short), "limit_tokens": native.window, "loss_without_it": losses}


def _keys(config: ServeConfig) -> Keys:
    if not config.api_keys and not config.allow_anonymous and not _is_loopback(config.host):
        raise UsageError(
            f"--host {config.host} can be reached by others and there are no keys; add --api-keys FILE or --allow-anonymous"
        )
    return Keys(config.api_keys)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which anything may stand behind
        return host == "localhost"


async def _serve(
    config: ServeConfig,
    card: dict[str, Any],
    keys: Keys,
    listeners: list[socket.socket],
    traces: Traces | None,
    contents: Contents,
    make: Callable[[], Assembly],
) -> int:
    made = make()
    gateway = Gateway(config, made.profiles, card, keys, Literal(control_tokens(config.model)), made.metrics, traces)
    apps = (build_app(gateway), build_metrics_app(gateway))
    servers = [
        make_server(app, config.header_timeout_s, config.idle_timeout_s) for app, _ in zip(apps, listeners, strict=False)
    ]
    signals = _Signals(keys)
    pairs = zip(servers, listeners, strict=True)
    serving = asyncio.gather(*(server.serve(sockets=[listener]) for server, listener in pairs))
    engines = [asyncio.create_task(keeper.run()) for keeper in made.keepers]
    damage = asyncio.create_task(contents.damage())
    for listener, what in zip(listeners, ("the engine is loading", "metrics"), strict=False):
        host, port = listener.getsockname()[:2]
        out.print(f"listening on http://{host}:{port}, {what}", highlight=False)
    try:
        ends: tuple[asyncio.Future[Any], ...] = (serving, signals.first, damage, *engines)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if damage.done():
            damage.result()
        if ended := [engine for engine in engines if engine.done()]:
            gateway.abort_all(unavailable("the engine died and could not be restarted", "engine_failed"))
            ended[0].result()
        return await _drain(config.drain_s, gateway, made.profiles, signals) if signals.first.done() else 0
    finally:
        for task in (damage, *engines):
            task.cancel()
        for server in servers:
            server.should_exit = True
        await asyncio.gather(serving, damage, *engines, return_exceptions=True)
        await asyncio.gather(*(keeper.stop(_STOP_GRACE_S) for keeper in made.keepers))
        for keeper in made.keepers:
            keeper.watch.upstream.close()
        if traces:
            traces.close()


async def _drain(drain_s: float, gateway: Gateway, profiles: Profiles, signals: "_Signals") -> int:
    """Refuse what is new, wait for what is there, end what does not end. A second signal ends the waiting."""
    number = signals.first.result()
    for pool in profiles.pools:
        pool.drain()
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
