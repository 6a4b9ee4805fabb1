"""Restore one model in many ways, each measured alike, in pieces of a few minutes: recipes x RoPE types x seeds.

    python -m scripts.study STUDY.yaml --out WORK [--results FOLDER] [--minutes 9] [--runs NAME ...]

Each call goes on where the last one stopped and ends in time: exit code 75 means that there is more to do, 0 that all is done.
A finished run is appended to FOLDER/quality-<model>.json. Native and merely stretched models are measured once. A small model
leaves most of a GPU idle: give each of several processes its runs, all with the same WORK. STUDY.yaml:

    model: SmolLM2-135M-Instruct
    restore: {target_length: 65536, data: [books/train]}     # what all runs share: fields of `ard restore`
    evaluation: {data: [books/test], tasks: [short]}         # fields of `ard eval`
    recipes: {default: {}, paper: {recipe: linearard}}       # what each changes, by a name of your own
    rope_types: [yarn, linear]
    seeds: [0, 1, 2]
"""

import argparse
import fcntl
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from ard_serve.artifact import read_manifest
from ard_serve.console import setup_logging
from ard_serve.errors import EXIT_TERMINATED, ArdError, ModelError, NumericsError, UsageError
from ard_serve.settings import Settings
from restore import evaluate, metrics, report
from restore.config import RestoreConfig
from restore.evaluate import Candidate
from restore.evaluation import preflight
from restore.evaluation.config import EvalConfig
from restore.evaluation.results import Evaluation
from restore.inspection import read_config
from restore.rope import RopeType
from restore.runfolder import CHECKPOINTS, MODEL
from scripts import record_quality

ROOT = Path(__file__).parent.parent
MORE_TO_DO = 75
# Told to stop while it trains, and while it starts or ends.
_STOPPED = (EXIT_TERMINATED, -signal.SIGTERM)
_log = logging.getLogger("study")


class Study(Settings):
    """What to run."""

    model: str = Field(description="folder of the model that every run restores")
    restore: dict[str, Any] = Field(description="fields of `ard restore` that all runs share")
    evaluation: EvalConfig = Field(description="what to measure on each")
    recipes: dict[str, dict[str, Any]] = Field(min_length=1, description="fields of `ard restore` that each recipe changes")
    rope_types: tuple[RopeType, ...] = Field(("yarn",), min_length=1, description="how positions are stretched")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="one run for each")


class OutOfTimeError(Exception):
    """The piece is over; the next one goes on."""


@dataclass(frozen=True)
class Work:
    """One piece of a study."""

    study: Study
    out: Path
    results: Path
    command: str
    deadline: float
    chosen: tuple[str, ...] = ()

    def do(self) -> None:
        """Seeds one after the other, so that a study that is cut short has every recipe once."""
        runs = dict(self.runs())
        if unknown := set(self.chosen) - runs.keys():
            raise UsageError(f"runs: no {', '.join(sorted(unknown))} in this study; it has {', '.join(runs)}")
        for name in self.chosen or runs:
            self.check(runs[name])
        for name, config in runs.items():
            if (not self.chosen or name in self.chosen) and self.train(config):
                self.measure(name, config)

    def check(self, config: RestoreConfig) -> None:
        """Refuse what cannot be measured before anything is trained for it; once for all pieces, it reads all the text."""
        base = Path(self.study.model)
        rope = config.plan_rope(read_config(base))
        settings = self.study.evaluation.for_target(rope.target_length, rope.native_window)
        checked = self.out / f"evaluation-{rope.target_length}.checked"
        with self.alone("checked"):
            told = settings.model_dump_json() + "\n"
            if not checked.exists() or checked.read_text(encoding="utf-8") != told:
                preflight.check_folders([base], settings)
                checked.write_text(told, encoding="utf-8")

    def runs(self) -> Iterator[tuple[str, RestoreConfig]]:
        for seed in self.study.seeds:
            for rope_type in self.study.rope_types:
                for recipe, changes in self.study.recipes.items():
                    own = changes.get("rope_type")
                    if own and rope_type != self.study.rope_types[0]:
                        continue  # a recipe with a RoPE of its own runs once
                    name = f"{recipe}-{own or rope_type}-{seed}"
                    fields = {"model": self.study.model, "rope_type": rope_type, "evaluate": False}
                    fields |= {**self.study.restore, **changes, "seed": seed, "out": self.out / name}
                    yield name, RestoreConfig.resolve(None, fields)

    def train(self, config: RestoreConfig) -> bool:
        """Whether there is a restored model; a recipe that diverges is a result too, and is not tried again."""
        failure = _beside(config.out, "failed")
        if (config.out / MODEL).exists() or failure.exists():
            return not failure.exists()
        self.need(0)
        settings = _beside(config.out, "yaml")
        config.save(settings)
        resume = ["--resume"] if any((config.out / CHECKPOINTS).glob("step-*")) else []
        code = self.ard("restore", "--config", str(settings), *resume)
        if code in _STOPPED:
            raise OutOfTimeError
        if code == NumericsError.exit_code:
            failure.write_text(f"exit code {code}\n")
            _log.warning("%s: the run failed; remove %s to try it again", config.out, failure)
        elif code != 0:
            raise ModelError(f"{config.out}: `ard restore --config {settings}` ended with exit code {code}")
        return code == 0

    def ard(self, *words: str) -> int:
        """Exit code of a command that is told to save and stop when the piece is over."""
        process = subprocess.Popen([sys.executable, "-m", "ard_serve.cli", *words])
        try:
            return process.wait(self.deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            return process.wait()

    def measure(self, name: str, config: RestoreConfig) -> None:
        """Native, stretched (where anything is) and restored side by side, on record as one entry."""
        manifest = read_manifest(config.out / MODEL)
        assert manifest is not None, "a restoration publishes its manifest with the model"
        settings = self.study.evaluation.for_target(manifest.rope.target_length, manifest.base.native_window)
        base, stretched = Path(self.study.model), read_config(config.out / MODEL)
        models = [self.evaluation("native", Candidate("native", base), settings)]
        if config.rope_type != "none":
            kept = f"stretched-{config.rope_type}-{config.target_length}"
            models.append(self.evaluation(kept, Candidate("stretched", base, stretched), settings))
        models.append(self.evaluation(name, Candidate("restored", config.out / MODEL), settings))
        if (config.out / "evaluation.json").exists():
            found = report.read(config.out / "evaluation.json")
        else:
            found = evaluate.make_report(models, settings)
            report.write(found, config.out, report.Restoration.from_manifest(manifest), metrics.read(config.out))
        _, entry = record_quality.describe(found, config.out, self.command, remark=name)
        path = self.results / record_quality.file_name(config.model)
        with self.alone(path.stem):
            record_quality.append(path, entry)

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """While other parts of the study wait that want `name` too."""
        with (self.out / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def evaluation(self, name: str, candidate: Candidate, settings: EvalConfig) -> Evaluation:
        """Measured once and kept; not begun when the longest so far would not fit into the rest of the piece."""
        with self.alone(name):
            return self._evaluation(self.out / f"{name}.evaluation.json", candidate, settings)

    def _evaluation(self, path: Path, candidate: Candidate, settings: EvalConfig) -> Evaluation:
        if path.exists():
            return Evaluation.model_validate_json(path.read_bytes())
        kept = [Evaluation.model_validate_json(other.read_bytes()) for other in self.out.glob("*.evaluation.json")]
        self.need(max((other.seconds for other in kept), default=0))
        found = candidate.measure(settings)
        path.write_text(found.model_dump_json() + "\n", encoding="utf-8")
        return found

    def need(self, seconds: float) -> None:
        if time.monotonic() + seconds > self.deadline:
            raise OutOfTimeError


def _beside(folder: Path, ending: str) -> Path:
    """`folder`.`ending`; names such as `tokens-0.5M-yarn-0` have a dot of their own."""
    return folder.with_name(f"{folder.name}.{ending}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML, TOML or JSON file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; the next piece goes on from it")
    parser.add_argument("--results", type=Path, default=record_quality.RESULTS, help="folder of quality-<model>.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this piece (default: 9)")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME", help="RECIPE-ROPE-SEED; all when not given")
    given = parser.parse_args(arguments)
    setup_logging()
    deadline = time.monotonic() + 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        study = Study.resolve(given.study, {})
        command = f"python -m scripts.study {given.study} --out {given.out}"
        Work(study, given.out, given.results, command, deadline, tuple(given.runs)).do()
    except OutOfTimeError:
        _log.info("this piece is over, the study is not; run the same command again")
        return MORE_TO_DO
    except ArdError as error:
        print(f"study: {error}", file=sys.stderr)
        return error.exit_code
    _log.info("the study is complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
