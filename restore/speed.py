"""How fast a GPU trains: what share of its data sheet's rate a step reaches, from what `python -m restore.bench` measured."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restore import devices
from restore.config import RestoreConfig
from restore.devices import Gpu
from restore.flops import Counter
from restore.plan import Plan

# Of a source checkout; an installed package has no measurements and assumes.
_RESULTS = Path(__file__).parent.parent / "docs" / "results"
# What steps of a 7B model reached on an H100 by the first program, every layer recomputed.
_ASSUMED = 0.3
# Another GPU is as far away as twice the width; another recipe for the same windows, or other layers recomputed, as a tenth
# more.
_OTHER_GPU, _OTHER_RECIPE, _OTHER_RECOMPUTE = math.log(2), math.log(1.1), math.log(1.1)


@dataclass(frozen=True)
class Share:
    """A share of the rate of bf16 matrix products by the data sheet, and where it is from, in words."""

    value: float
    source: str


@dataclass(frozen=True)
class Training:
    """What all steps of a run take on one GPU; validation, evaluation and export come on top."""

    seconds: float
    flops: int
    sources: tuple[str, ...]

    def of_rate(self, gpu: Gpu) -> float:
        """Its share of the data sheet's rate of `gpu`."""
        return self.flops / self.seconds / gpu.matrix_tflops / 1e12


class Speeds:
    """What was measured of training steps, on any GPU."""

    def __init__(self, folder: Path = _RESULTS) -> None:
        """Read every engine-*.json in `folder`."""
        self._rows: list[dict[str, Any]] = []
        for path in sorted(folder.glob("engine-*.json")):
            for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
                gpu = devices.by_name(run["machine"]["device"])
                told = {"gpu": gpu, "file": path.name}
                self._rows += [row | told for row in run["rows"] if gpu and _counts(row)]

    def training(self, gpu: Gpu, base: Mapping[str, Any], config: RestoreConfig, plan: Plan) -> Training:
        """Time of a run on one `gpu`: at the share that such steps reach, or windows of each kind at that of such windows."""
        counter, parts = Counter(base, config), []
        if both := self._of_both(gpu, int(base["hidden_size"]), config, plan):
            total = counter.run(plan).counted
            return Training(total / (both.value * gpu.matrix_tflops * 1e12), total, (both.source,))
        if plan.short_windows:
            parts.append((plan.window, True, counter.distilling(plan)))
        if plan.long_windows:
            parts.append((plan.long_window, False, counter.reading(plan)))
        seconds, sources = 0.0, []
        for window, distils, flops in parts:
            share = self.share(gpu, int(base["hidden_size"]), config, window, distils)
            seconds += flops.counted / (share.value * gpu.matrix_tflops * 1e12)
            sources.append(share.source)
        return Training(seconds, counter.run(plan).counted, tuple(dict.fromkeys(sources)))

    def share(self, gpu: Gpu, hidden_size: int, config: RestoreConfig, window: int, distils: bool) -> Share:
        """The share that the most alike of the measured steps with windows of one kind reached."""
        kind, other = ("window", "long_window") if distils else ("long_window", "window")
        alike = [row for row in self._alike(config) if row[kind] and not row[other]]
        if not alike:
            return Share(_ASSUMED, "assumed")
        row = min(alike, key=lambda row: _distance(row, gpu, hidden_size, config) + _apart(row[kind], window))
        return _told(row, gpu, f"{row[kind]:,} tokens")

    def _of_both(self, gpu: Gpu, hidden_size: int, config: RestoreConfig, plan: Plan) -> Share | None:
        """The share of a step with both kinds of windows, where one of about this width and these windows was measured."""
        if not (plan.short_windows and plan.long_windows):
            return None

        def distance(row: Mapping[str, Any]) -> float:
            windows = _apart(row["window"], plan.window) + _apart(row["long_window"], plan.long_window)
            return _distance(row, gpu, hidden_size, config) + windows

        alike = [row for row in self._alike(config) if row["window"] and row["long_window"]]
        row = min(alike, key=distance, default=None)
        if row is None or distance(row) > 2 * _OTHER_GPU:
            return None
        return _told(row, gpu, f"{row['window']:,} and {row['long_window']:,} tokens")

    def _alike(self, config: RestoreConfig) -> list[dict[str, Any]]:
        same = ("dtype", "trainable", "quantize")
        return [row for row in self._rows if all(row.get(name) == getattr(config, name) for name in same)]


def _told(row: Mapping[str, Any], gpu: Gpu, windows: str) -> Share:
    where = "" if row["gpu"] == gpu else f" on {row['gpu'].name}"
    return Share(row["tflops"] / row["gpu"].matrix_tflops, f"measured{where} with {row['shape']} and {windows} ({row['file']})")


def _distance(row: Mapping[str, Any], gpu: Gpu, hidden_size: int, config: RestoreConfig) -> float:
    """How far a measured step is from one on `gpu` by a model so wide, windows apart."""
    otherwise = _OTHER_GPU * int(row["gpu"] != gpu) + _OTHER_RECIPE * int(row["recipe"] != config.recipe)
    # A row that does not tell is of "auto".
    otherwise += _OTHER_RECOMPUTE * int(row.get("recompute", "auto") != config.recompute)
    return _apart(row["hidden_size"], hidden_size) + otherwise


def _counts(row: Mapping[str, Any]) -> bool:
    """Whether it is a step of this trainer on one GPU that came to its end."""
    return "tflops" in row and row["processes"] == 1 and "engine" not in row


def _apart(one: float, other: float) -> float:
    return abs(math.log(one / other))
