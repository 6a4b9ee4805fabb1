"""Puts together what runs: for each model a pool of engines, for each engine a watch and whoever looks after it."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from server.admission import Admission, Lanes
from server.attachment import ENGINE_KEY, Attachment
from server.call import CallLimits
from server.config import ServeConfig
from server.engine import engine_spec
from server.ledger import Ledger
from server.metrics import Metrics
from server.pool import Pool
from server.preflight import Checkpoint
from server.profiles import NATIVE, RESTORED, Profiles, Short
from server.supervisor import Supervisor
from server.upstream import Upstream
from server.watch import Checked, Watch


@dataclass(frozen=True)
class EnginePlan:
    """One model's engine: its settings, its folder as it was checked, the flags that we add to the operator's, its seats."""

    config: ServeConfig
    checkpoint: Checkpoint
    flags: tuple[str, ...]
    seats: int | None


@dataclass(frozen=True)
class Assembly:
    """What was put together."""

    profiles: Profiles
    keepers: tuple[Supervisor | Attachment, ...]
    metrics: Metrics


def assemble(main: EnginePlan, short: EnginePlan | None, lanes: tuple[int, int], folder: Path, checked: Checked) -> Assembly:
    """Everything but the gateway. To be called in the event loop; `lanes` are the tokens of a batch and of a long prompt's
    share of it, `folder` is for sockets, and `checked` ends when the models' files have been checked."""
    config, metrics = main.config, Metrics()
    metrics.describe(config.model_name, main.checkpoint.manifest, main.checkpoint.measured_limit)
    rules = Lanes(lanes[1], max(1, lanes[0] // lanes[1] - 1))
    pool, keepers = (_attached if config.attach else _supervised)(main, RESTORED, rules, metrics, folder, checked)
    limits = CallLimits.of(config, main.checkpoint.window, main.checkpoint.measured_limit)
    if short is None:
        return Assembly(Profiles(pool, limits, None), keepers, metrics)
    native, more = _supervised(short, NATIVE, rules, metrics, folder, checked, first=pool.watches[0])
    return Assembly(Profiles(pool, limits, Short(native, short.checkpoint.window)), (*keepers, *more), metrics)


def _attached(
    plan: EnginePlan, profile: str, rules: Lanes, metrics: Metrics, _folder: Path, checked: Checked
) -> tuple[Pool, tuple[Attachment, ...]]:
    config, ledgers = plan.config, [Ledger() for _ in plan.config.attach]
    admission = Admission(ledgers, rules, config.queue_size, config.queue_timeout_s)
    upstreams = [Upstream(url, os.environ.get(ENGINE_KEY, "")) for url in config.attach]
    watches = [
        Watch(str(number), config, upstream, plan.checkpoint.window, plan.seats, ledger, admission, metrics, checked)
        for number, (upstream, ledger) in enumerate(zip(upstreams, ledgers, strict=True))
    ]
    keepers = tuple(Attachment(config, url, watch, watches) for url, watch in zip(config.attach, watches, strict=True))
    return Pool(profile, watches, admission), keepers


def _supervised(
    plan: EnginePlan, profile: str, rules: Lanes, metrics: Metrics, folder: Path, checked: Checked, first: Watch | None = None
) -> tuple[Pool, tuple[Supervisor, ...]]:
    config, ledger = plan.config, Ledger()
    admission = Admission([ledger], rules, config.queue_size, config.queue_timeout_s)
    path, key = folder / f"{profile}.sock", secrets.token_hex(32)
    name, window = NATIVE if profile == NATIVE else "0", plan.checkpoint.window
    watch = Watch(name, config, Upstream(path, key), window, plan.seats, ledger, admission, metrics, checked)
    keeper = Supervisor(config, engine_spec(config, path, key, window, plan.flags), watch, first)
    return Pool(profile, [watch], admission), (keeper,)
