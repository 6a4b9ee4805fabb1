"""The training loop: windows in, better adapters out, every step on record."""

import json
import logging
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ard_serve.console import Bar, progress
from ard_serve.errors import DataError, NumericsError, UsageError
from restore import checkpoint
from restore.checkpoint import RunState
from restore.config import RestoreConfig
from restore.data import TokenStream, Windows, evenly_spaced
from restore.metrics import MetricsLog
from restore.model import TwoFaced
from restore.objectives import Losses
from restore.rope import RopePlan

# A default long window of four native ones: the cost of its attention still compares with the distillation's.
_LONG_WINDOW_FACTOR = 4
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The shape of a run: windows of each kind in one optimizer step, and how many steps."""

    window: int
    short_windows: int
    long_window: int
    long_windows: int
    steps: int

    @property
    def step_tokens(self) -> int:
        return self.window * self.short_windows + self.long_window * self.long_windows


def plan_steps(config: RestoreConfig, rope: RopePlan) -> Plan:
    """Fill an optimizer step with distillation and language-model windows.

    Raises:
        UsageError: a window longer than the teacher or the target reads.
    """
    window = config.window or rope.native_window
    long_window = config.long_window or min(rope.target_length, _LONG_WINDOW_FACTOR * rope.native_window)
    if window > rope.native_window:
        raise UsageError(f"window = {window}: the teacher reads at most its native window of {rope.native_window} tokens")
    if long_window > rope.target_length:
        raise UsageError(f"long_window = {long_window}: at most the target length of {rope.target_length} tokens")
    trains_lm = "lm" in config.weights and config.long_share > 0
    if not config.distils and not trains_lm:
        raise UsageError("long_share = 0 leaves nothing to train: the only objective is lm")
    if not config.distils:
        short_windows, long_windows = 0, max(1, round(config.batch_tokens / long_window))
    else:
        long_windows = max(1, round(config.batch_tokens * config.long_share / long_window)) if trains_lm else 0
        # One long window can be more than its share of a step: the distillation windows keep the proportion.
        distilled = long_windows * long_window * (1 / config.long_share - 1) if long_windows else config.batch_tokens
        short_windows = max(1, round(distilled / window))
    plan = Plan(window, short_windows, long_window, long_windows, steps=1)
    return replace(plan, steps=config.steps or math.ceil(config.tokens / plan.step_tokens))


def learning_rate(config: RestoreConfig, step: int, steps: int) -> float:
    """Linear warm-up that starts above 0, then a cosine to `min_learning_rate_ratio` of the peak at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Trainer:
    """One run over one model."""

    def __init__(
        self, faces: TwoFaced, config: RestoreConfig, rope: RopePlan, train: TokenStream, validation: TokenStream, folder: Path
    ) -> None:
        """`folder` receives metrics.jsonl, tensorboard/ and checkpoints/."""
        self.plan = plan_steps(config, rope)
        self._faces, self._config, self._folder = faces, config, folder
        self._losses = Losses(faces, config.weights)
        self._short = Windows(train, self.plan.window, config.seed) if self.plan.short_windows else None
        self._long = Windows(train, self.plan.long_window, config.seed) if self.plan.long_windows else None
        self._validation = self._validation_windows(validation)
        self._parameters = faces.adapters.state()
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._device = faces.model.device
        self._fingerprint = _fingerprint(config, train, validation)
        self._state = RunState(0, 0, best_step=-1, best_loss=math.inf, fingerprint=self._fingerprint)
        self._best: dict[str, Tensor] = {}

    @property
    def state(self) -> RunState:
        return self._state

    def train(self, should_stop: Callable[[], bool] = lambda: False) -> RunState:
        """Run every step that is left, then load the best weights.

        Args:
            should_stop: asked after every step; when true, a checkpoint is saved and the run ends early.

        Returns:
            The state at the end; `state.step < plan.steps` when the run was stopped.

        Raises:
            NumericsError: a loss or gradient is not finite; the weights were not changed by that step.
            ResourceError: a checkpoint cannot be written.
        """
        if self._config.resume:
            self._resume()
        with MetricsLog(self._folder, self._state.step) as metrics, progress("restore", self.plan.steps) as bar:
            bar.advance(self._state.step)
            if self._state.best_step < 0:
                metrics.write({"step": 0, "tokens": 0, "validation": self._validate()})
            while self._state.step < self.plan.steps:
                row = self._step()
                done = self._state.step
                if done % self._config.validation_every == 0 or done == self.plan.steps:
                    row["validation"] = self._validate()
                metrics.write(row)
                _advance(bar, row)
                stop = should_stop()
                if stop or done % self._config.checkpoint_every == 0 or done == self.plan.steps:
                    self._save()
                if stop:
                    return self._state
        self._faces.adapters.load_state(self._best)
        _log.info("best weights: step %d, validation loss %.4f", self._state.best_step, self._state.best_loss)
        return self._state

    def _step(self) -> dict[str, Any]:
        started = time.monotonic()
        number = self._state.step
        rate = learning_rate(self._config, number, self.plan.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        values, layer_kl = self._accumulate(number)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._config.max_grad_norm))
        loss = sum(self._config.weights[name] * value for name, value in values.items())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericsError(self._save_bad_batch(number, loss, norm))
        self._optimizer.step()
        self._state = replace(self._state, step=number + 1, tokens=self._state.tokens + self.plan.step_tokens)
        seconds = time.monotonic() - started
        return {
            "step": self._state.step,
            "tokens": self._state.tokens,
            "loss": loss,
            **values,
            "layer_kl": layer_kl,
            "grad_norm": norm,
            "learning_rate": rate,
            "seconds": seconds,
            "tokens_per_s": self.plan.step_tokens / seconds,
            "peak_memory_bytes": _peak_memory_bytes(self._device),
        }

    def _accumulate(self, number: int) -> tuple[dict[str, float], list[float]]:
        """Backward through every window of step `number`; mean of each objective and of each layer's relation KL."""
        sums: dict[str, Tensor] = {}
        layer_kl: Tensor | None = None
        for window in self._windows(self._short, self.plan.short_windows, number):
            with self._autocast():
                loss, parts, layers = self._losses.distil(window)
            torch.autograd.backward(loss / self.plan.short_windows)
            _add(sums, parts, self.plan.short_windows)
            if layers is not None:
                layer_kl = layers if layer_kl is None else layer_kl + layers
        for window in self._windows(self._long, self.plan.long_windows, number):
            with self._autocast():
                loss, parts = self._losses.language_model(window)
            torch.autograd.backward(loss / self.plan.long_windows)
            _add(sums, parts, self.plan.long_windows)
        kl = [] if layer_kl is None else (layer_kl / self.plan.short_windows).tolist()
        return {name: float(value) for name, value in sums.items()}, kl

    def _windows(self, windows: Windows | None, count: int, number: int) -> list[Tensor]:
        return [] if windows is None else [windows[number * count + i].to(self._device) for i in range(count)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._config.dtype == "bf16")

    def _validation_windows(self, stream: TokenStream) -> tuple[list[Tensor], list[Tensor]]:
        short = evenly_spaced(stream, self.plan.window, self._config.validation_windows) if self._short else []
        # A long window costs as many tokens as many short ones: one of them is enough to choose by.
        try:
            long = evenly_spaced(stream, self.plan.long_window, 1) if self._long else []
        except DataError as error:
            raise DataError(
                f"{error}: hold more out (--validation-share) or train on shorter long windows (--long-window)"
            ) from None
        return short, long

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Objectives on the held-out windows; keeps the weights when they are the best so far."""
        sums: dict[str, Tensor] = {}
        layer_kl: list[Tensor] = []
        short, long = self._validation
        with self._autocast():
            for window in short:
                _, parts, layers = self._losses.distil(window.to(self._device))
                _add(sums, parts, len(short))
                if layers is not None:
                    layer_kl.append(layers)
            for window in long:
                _add(sums, self._losses.language_model(window.to(self._device))[1], len(long))
        values = {name: float(value) for name, value in sums.items()}
        loss = sum(self._config.weights[name] * value for name, value in values.items())
        if not math.isfinite(loss):
            where = f"validation after step {self._state.step}"
            raise NumericsError(f"{where}: loss {loss}; try --dtype fp32 or a lower --learning-rate")
        if loss < self._state.best_loss:
            self._best = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
            self._state = replace(self._state, best_step=self._state.step, best_loss=loss)
        kl = torch.stack(layer_kl).mean(0).tolist() if layer_kl else []
        return {"loss": loss, **values, "layer_kl": kl}

    def _save(self) -> None:
        checkpoint.save(self._folder / "checkpoints", self._state, self._parameters, self._best, self._optimizer)

    def _resume(self) -> None:
        found = checkpoint.load_newest(self._folder / "checkpoints")
        if found is None:
            _log.info("%s: no checkpoint to resume from, starting at step 0", self._folder)
            return
        state, tensors = found
        if different := sorted(key for key in self._fingerprint if state.fingerprint.get(key) != self._fingerprint[key]):
            key = different[0]
            raise UsageError(
                f"resume: {key} is {self._fingerprint[key]!r}, the checkpoint was made with {state.fingerprint.get(key)!r}; "
                "give the same settings, or start again in another --out"
            )
        self._faces.adapters.load_state(checkpoint.group(tensors, "adapter"))
        self._best = {name: value.to(self._device) for name, value in checkpoint.group(tensors, "best").items()}
        checkpoint.restore_optimizer(tensors, self._parameters, self._optimizer)
        self._state = state
        _log.info("resumed at step %d of %d", state.step, self.plan.steps)

    def _save_bad_batch(self, number: int, loss: float, norm: float) -> str:
        """Keep the windows that broke the step, and say so in one line."""
        path = self._folder / f"bad-batch-step-{number + 1}.json"
        windows = self._windows(self._short, self.plan.short_windows, number)
        windows += self._windows(self._long, self.plan.long_windows, number)
        path.write_text(json.dumps([window[0].tolist() for window in windows]), encoding="utf-8")
        return (
            f"step {number + 1}: loss {loss}, gradient norm {norm}; the weights were not changed. "
            f"The batch is in {path}; try a lower --learning-rate than {self._config.learning_rate} or --dtype fp32"
        )


def _fingerprint(config: RestoreConfig, train: TokenStream, validation: TokenStream) -> dict[str, Any]:
    """What must be equal for a resumed run to be the run it goes on with."""
    free = {"out", "resume", "evaluate", "checkpoint_every", "device", "data", "model"}
    settings: dict[str, Any] = config.model_dump(mode="json", exclude=free)
    return settings | {"train data": train.sha256, "validation data": validation.sha256, "threads": torch.get_num_threads()}


def _add(sums: dict[str, Tensor], parts: dict[Any, Tensor], count: int) -> None:
    for name, value in parts.items():
        sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach() / count


def _advance(bar: Bar, row: dict[str, Any]) -> None:
    bar.advance(1, f"loss {row['loss']:.4f}, {row['tokens_per_s']:.0f} tokens/s")


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
