"""`python -m restore.rope_search MODEL ...`: frequencies for one model, searched before anything is trained.

The search starts at YaRN (arXiv 2309.00071) and moves its bounds, the depth of its interpolation and its temperature; each
candidate is a whole frequency table, as in LongRoPE (arXiv 2402.13753), and is judged by what it does to the untouched model:
how far its next-token distributions move on native windows, and how well it reads windows of the target length and their end.
The result is a file for `ard restore --config`, whose RoPE every engine reads (one `longrope` list for short and long).
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from ard_serve.console import out, progress, setup_logging
from ard_serve.errors import ArdError
from ard_serve.settings import Settings, add_flags
from restore.data import evenly_spaced, read_documents, tokenize
from restore.inspection import transformers_config
from restore.loading import inspect, load, load_tokenizer, resolve
from restore.rope import RopePlan, head_dim, plan_rope
from restore.vocabulary import lm_loss, logits_kl

# The last part of a target window counts as much as the whole: a table that reaches less far wins in the mean, and fails there.
_END_SHARE = 8
# Step of the search at its start and at its end, in units of each number's natural size.
_FIRST_STEP, _LAST_STEP = 0.5, 0.05


class SearchConfig(Settings):
    """What to search for, and on what text."""

    model: str = Field(description="folder of a Hugging Face model, or its name on the hub")
    target_length: PositiveInt = Field(description="tokens the restored model must serve")
    data: tuple[str, ...] = Field(min_length=1, description="text to judge by: files, folders of them, or a dataset name")
    out: Path = Field(description="YAML file to write, for `ard restore --config`")
    native_window: PositiveInt | None = Field(None, description="tokens the model was trained on, when its config hides it")
    trials: PositiveInt = Field(48, description="frequency tables to try")
    windows: PositiveInt = Field(2, description="windows of each kind that judge a table")
    seed: int = Field(0, ge=0, description="seed of the search")


@dataclass(frozen=True)
class Shape:
    """A frequency table in five numbers; the defaults are YaRN's."""

    fast_turns: float = 32.0
    """Pairs that turn more often than this within the native window keep their frequency."""
    slow_turns: float = 1.0
    """Pairs that turn less often are divided by the factor."""
    depth: float = 1.0
    """Power of the factor that the slow pairs are divided by."""
    bend: float = 1.0
    """Power of the ramp between the two: above 1, more pairs stay near their frequency."""
    temperature: float = 0.1
    """Queries and keys are multiplied by 1 + this x ln(factor)."""

    def factors(self, theta: float, channels: int, window: int, factor: float) -> list[float]:
        """What each of the `channels` / 2 frequencies is divided by, the fastest first."""
        turns = window * theta ** (-np.arange(0, channels, 2) / channels) / (2 * math.pi)
        ramp = np.log(self.fast_turns / turns) / math.log(self.fast_turns / self.slow_turns)
        slow = np.clip(ramp, 0, 1) ** self.bend
        return [float(value) for value in 1 / (1 - slow + slow / factor**self.depth)]

    def moved(self, generator: np.random.Generator, step: float) -> "Shape":
        """A neighbour: every number multiplied by a random factor near 1."""
        drawn = dict(zip(asdict(self), np.exp(step * generator.standard_normal(5) * (1, 1, 0.3, 0.5, 0.7)), strict=True))
        shape = replace(self, **{name: float(value * drawn[name]) for name, value in asdict(self).items()})
        return shape if shape.fast_turns > 1.5 * shape.slow_turns else self.moved(generator, step)


@dataclass(frozen=True)
class Trial:
    """A table and what it does, in nats a token: KL on native windows, lm loss on target windows and on their last eighth."""

    shape: Shape
    kl: float
    lm: float
    end_lm: float

    @property
    def loss(self) -> float:
        return self.kl + (self.lm + self.end_lm) / 2


class Bench:
    """One model and the windows that judge a table."""

    def __init__(
        self, model: PreTrainedModel, base: dict[str, Any], target_length: int, native_window: int | None,
        short: Sequence[Tensor], long: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self._model, self._base, self._target, self._native = model, base, target_length, native_window
        self._short, self._long = short, long
        self._rotary = type(model.model.rotary_emb)
        self._native_hidden = [self._read(ids_BT) for ids_BT in short]

    def plan(self, shape: Shape) -> RopePlan:
        window = plan_rope(self._base, self._target, "yarn", self._native)
        theta = float(window.native_parameters["rope_theta"])
        factors = shape.factors(theta, head_dim(self._base), window.native_window, window.factor)
        temperature = 1 + shape.temperature * math.log(window.factor)
        return plan_rope(
            self._base, self._target, "longrope", self._native, rope_factors=factors, rope_attention_factor=temperature
        )

    @torch.no_grad()
    def judge(self, shape: Shape) -> Trial:
        config = transformers_config(self.plan(shape).target_config(self._base))
        native = self._model.model.rotary_emb
        self._model.model.rotary_emb = self._rotary(config).to(self._model.device)
        try:
            head_VC = self._model.lm_head.weight
            assert isinstance(head_VC, Tensor)
            kl = [
                float(logits_kl(self._read(ids_BT), teacher_BTC, head_VC))
                for ids_BT, teacher_BTC in zip(self._short, self._native_hidden, strict=True)
            ]
            lm = [self._lm(ids_BT.to(head_VC.device), head_VC) for ids_BT in self._long]
        finally:
            self._model.model.rotary_emb = native
        return Trial(shape, float(np.mean(kl)), *(float(mean) for mean in np.mean(lm, axis=0)))

    def _lm(self, ids_BT: Tensor, head_VC: Tensor) -> tuple[float, float]:
        """Loss on whole windows and on their ends."""
        hidden_BTC, end = self._read(ids_BT), ids_BT.shape[1] - ids_BT.shape[1] // _END_SHARE
        return float(lm_loss(hidden_BTC, ids_BT, head_VC)), float(lm_loss(hidden_BTC[:, end:], ids_BT[:, end:], head_VC))

    @torch.no_grad()
    def _read(self, ids_BT: Tensor) -> Tensor:
        decoder = self._model.model
        assert isinstance(decoder, nn.Module)
        hidden: Tensor = decoder(ids_BT.to(self._model.device), use_cache=False).last_hidden_state
        return hidden


def search(bench: Bench, trials: int, seed: int) -> Iterator[Trial]:
    """Try tables near the best so far, in ever smaller steps; the first is YaRN itself."""
    generator = np.random.default_rng(seed)
    best = bench.judge(Shape())
    yield best
    for number in range(1, trials):
        step = _FIRST_STEP * (_LAST_STEP / _FIRST_STEP) ** (number / trials)
        trial = bench.judge(best.shape.moved(generator, step))
        best = min(best, trial, key=lambda tried: tried.loss)
        yield trial


def run(config: SearchConfig) -> int:
    """Search, write the best table to `config.out` and every trial to a .jsonl beside it; returns the exit code."""
    base = inspect(resolve(config.model))
    native = plan_rope(base.config, config.target_length, "yarn", config.native_window)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(base.folder, torch.bfloat16, device, native.native_config(base.config))
    stream = tokenize(read_documents(config.data), load_tokenizer(base.folder), int(base.config["vocab_size"]))
    windows = [evenly_spaced(stream, length, config.windows) for length in (native.native_window, config.target_length)]
    bench = Bench(model, base.config, config.target_length, config.native_window, *windows)
    tried: list[Trial] = []
    with progress("search", config.trials) as bar, config.out.with_suffix(".jsonl").open("w", encoding="utf-8") as record:
        for trial in search(bench, config.trials, config.seed):
            tried.append(trial)
            record.write(json.dumps({**asdict(trial), "loss": trial.loss}) + "\n")
            bar.advance(1, f"best {min(one.loss for one in tried):.4f}")
    best = min(tried, key=lambda one: one.loss)
    parameters = bench.plan(best.shape).parameters
    fields = {
        "target_length": config.target_length,
        "rope_type": "longrope",
        "rope_factors": parameters["long_factor"],
        "rope_attention_factor": parameters["attention_factor"],
    }
    config.out.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    out.print(
        f"{config.out}: KL {best.kl:.4f}, lm {best.lm:.4f}, at the end {best.end_lm:.4f} nats a token; "
        f"YaRN {tried[0].kl:.4f}, {tried[0].lm:.4f}, {tried[0].end_lm:.4f}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m restore.rope_search", description=SearchConfig.__doc__)
    parser.add_argument("model", help=SearchConfig.model_fields["model"].description)
    add_flags(parser, SearchConfig, *(name for name in SearchConfig.model_fields if name != "model"))
    setup_logging()
    try:
        return run(SearchConfig.resolve(None, vars(parser.parse_args(arguments))))
    except ArdError as error:
        print(f"rope_search: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
