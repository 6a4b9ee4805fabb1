"""The training loop: windows in, better adapters out, every step on record."""

import json
import logging
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ard_serve.console import Bar, progress
from ard_serve.errors import NumericsError, UsageError
from restore import checkpoint, devices
from restore.batches import Ahead, Batch, Batches, validation_batches
from restore.checkpoint import RunState
from restore.config import LONG, RestoreConfig
from restore.data import TokenStream
from restore.flops import Counter
from restore.metrics import MetricsLog
from restore.model import TwoFaced
from restore.objectives import Losses
from restore.parallel import ALONE, World
from restore.plan import learning_rate, peak_rate, plan_steps
from restore.retrieval import Weaver
from restore.rope import RopePlan
from restore.runfolder import CHECKPOINTS

# A validation loss this many times that of the untrained student is no fluctuation.
_DIVERGED = 2.0
_log = logging.getLogger(__name__)


class Trainer:
    """One run over one model."""

    def __init__(
        self,
        faces: TwoFaced,
        config: RestoreConfig,
        rope: RopePlan,
        train: TokenStream,
        validation: TokenStream,
        folder: Path,
        world: World = ALONE,
        weaver: Weaver | None = None,
    ) -> None:
        """`folder` receives metrics.jsonl, tensorboard/ and checkpoints/, from the process that leads `world`.

        `weaver` puts the facts into long windows that the objective `retrieval` asks for.
        """
        self.plan = plan_steps(config, rope)
        self.peak_rate = peak_rate(config, faces.model.config.hidden_size)
        config = config.model_copy(update={"learning_rate": self.peak_rate})
        self._faces, self._config, self._folder, self._world = faces, config, folder, world
        self._losses = Losses(faces, config.weights)
        at_once = self.plan.windows_at_once(faces.model.config.hidden_size)
        self._batches = Batches(self.plan, config, train, rope.target_length, weaver, at_once)
        self._ahead = Ahead(self._mine, self.plan.steps)
        self._validation = validation_batches(self.plan, config, validation, weaver)
        self._parameters = faces.adapters.state()
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=self.peak_rate,
            betas=(0.9, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._device = faces.model.device
        self._counter = Counter(faces.model.config.to_dict(), config)
        self._gpu = devices.named(self._device)
        threads = {"threads": torch.get_num_threads()} if self._device.type == "cpu" else {}  # a GPU's bits do not depend on it
        self._fingerprint = _fingerprint(config, train, validation) | {"processes": world.size} | threads
        self._state = RunState(0, 0, math.inf, best_step=-1, best_loss=math.inf, fingerprint=self._fingerprint)
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
            NumericsError: a loss or gradient is not finite, and the weights were not changed by that step; or the run
                diverged, and its best weights are in the last checkpoint.
            ResourceError: a checkpoint cannot be written.
        """
        if self._config.resume:
            self._resume()
        log = MetricsLog(self._folder, self._state.step) if self._world.leads else nullcontext()
        with log as metrics, progress("restore", self.plan.steps) as bar:
            bar.advance(self._state.step)
            if self._state.best_step < 0:
                before = {"step": 0, "tokens": 0, "validation": self._validate()}
                if metrics:
                    metrics.write(before)
            while self._state.step < self.plan.steps:
                row = self.step()
                done = self._state.step
                if done % self._config.validation_every == 0 or done == self.plan.steps:
                    row["validation"] = self._validate()
                if metrics:
                    metrics.write(row)
                _advance(bar, row)
                stop = self._world.any(should_stop(), self._device)
                if stop or done % self._config.checkpoint_every == 0 or done == self.plan.steps:
                    self._save()
                if stop:
                    return self._state
                self._refuse_divergence(row)
        self._refuse_divergence({})  # of a run that was refused at its last step, and is resumed after it
        self._faces.adapters.load_state(self._best)
        _log.info("best weights: step %d, validation loss %.4f", self._state.best_step, self._state.best_loss)
        return self._state

    def _refuse_divergence(self, row: dict[str, Any]) -> None:
        """End a run that has made the model much worse, or that ends without having made it better."""
        state, first = self._state, self._state.first_loss
        loss = row.get("validation", {}).get("loss", 0.0)
        in_vain = state.step == self.plan.steps and state.best_step == 0
        if loss > _DIVERGED * first or in_vain:
            self._save()
            told = f"validation loss {loss:.4g}, {first:.4g} before training: " if row else ""
            raise NumericsError(
                f"step {state.step}: {told}the run "
                f"{'made nothing better' if in_vain else 'diverged'}. The best weights, of step {state.best_step}, are in "
                f"{self._folder / CHECKPOINTS}; try a lower --learning-rate than {self.peak_rate}"
            )

    def step(self) -> dict[str, Any]:
        """One optimizer step; returns its row of metrics.

        Raises:
            NumericsError: its loss or gradient is not finite; no weight was changed.
        """
        started = time.monotonic()
        number = self._state.step
        rate = learning_rate(self._config, self.peak_rate, number, self.plan.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        batches = self._ahead.of_step(number)
        values, layer_kl = self._accumulate(batches, self.plan.long_in(number))
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._config.max_grad_norm))
        loss = sum(self._config.weights[name] * value for name, value in values.items())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericsError(self._save_bad_batch(number, loss, norm))
        self._optimizer.step()
        self._state = replace(self._state, step=number + 1, tokens=self._state.tokens + self.plan.tokens_in(number))
        seconds = time.monotonic() - started
        tflops = sum(self._counter.batch(batch).counted for batch in batches) / seconds / 1e12
        return {
            "step": self._state.step,
            "tokens": self._state.tokens,
            "loss": loss,
            **values,
            "layer_kl": layer_kl,
            "grad_norm": norm,
            "learning_rate": rate,
            "seconds": seconds,
            "tokens_per_s": self.plan.tokens_in(number) / seconds,
            "tflops": tflops,
            **({} if self._gpu is None else {"of_matrix_rate": tflops / self._gpu.matrix_tflops}),
            "peak_memory_bytes": _peak_memory_bytes(self._device),
        }

    def _mine(self, number: int) -> list[Batch]:
        """This process's batches of step `number`."""
        return list(self._batches.of_step(number, self._world.share(self._batches.lengths(number))))

    def _accumulate(self, batches: Sequence[Batch], long_windows: int) -> tuple[dict[str, float], list[float]]:
        """Backward through this process's part of a step; mean of each objective and of each layer's relation KL."""
        sums, layer_kl = self._zeros(long_windows)
        for batch in self._together(batches, trains=True):
            loss, parts, layers = self._losses.of(batch)
            # What comes in every fourth step counts four times there, so that weights hold in the mean over steps.
            torch.autograd.backward(loss * (batch.share * (self.plan.long_every if batch.is_long else 1)))
            _add(sums, parts, batch.share)
            if layers is not None:
                layer_kl += layers * batch.share
        self._world.add_up_gradients(self._parameters.values())
        self._world.add_up([*sums.values(), layer_kl])
        return {name: float(value) for name, value in sums.items()}, layer_kl.tolist()

    def _together(self, batches: Sequence[Batch], trains: bool) -> Iterator[Batch]:
        """The batches on the device. Of sharded weights every process needs as many passes as the one with the most batches."""
        shards = self._faces.shards
        idle = int(self._world.most(len(batches), self._device)) - len(batches) if shards else 0
        yield from (batch.to(self._device) for batch in batches)
        for _ in range(idle):
            assert shards is not None
            shards.idle(trains)

    def _zeros(self, long_windows: int) -> tuple[dict[str, Tensor], Tensor]:
        """A sum for every objective in use, and one for every layer where relations are compared."""
        used = [name for name in self._config.weights if (long_windows if name in LONG else self.plan.short_windows)]
        layers = len(self._faces.layers) if self.plan.short_windows and self._losses.compares_relations else 0
        return {name: torch.zeros((), device=self._device) for name in used}, torch.zeros(layers, device=self._device)

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Objectives on the held-out windows; keeps the weights when they are the best so far."""
        sums, layer_kl = self._zeros(self.plan.long_windows)
        mine = self._world.share([batch.ids_BT.shape[1] for batch in self._validation])
        for batch in self._together([self._validation[at] for at in mine], trains=False):
            _, parts, layers = self._losses.of(batch)
            _add(sums, parts, batch.share)
            if layers is not None:
                layer_kl += layers * batch.share
        self._world.add_up([*sums.values(), layer_kl])
        values = {name: float(value) for name, value in sums.items()}
        loss = sum(self._config.weights[name] * value for name, value in values.items())
        if not math.isfinite(loss):
            where = f"validation after step {self._state.step}"
            raise NumericsError(f"{where}: loss {loss}; try --dtype fp32 or a lower --learning-rate")
        if self._state.best_step < 0:
            self._state = replace(self._state, first_loss=loss)
            self._weigh_layers(layer_kl)
        if loss < self._state.best_loss:
            self._best = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
            self._state = replace(self._state, best_step=self._state.step, best_loss=loss)
        return {"loss": loss, **values, "layer_kl": layer_kl.tolist()}

    def _weigh_layers(self, layer_kl: Tensor) -> None:
        """From here on every layer counts alike, if that is asked for: by what is wrong with it now."""
        if self._config.layer_weighting == "equal_loss" and len(layer_kl):
            weights = layer_kl.mean() / layer_kl.clamp(min=torch.finfo(layer_kl.dtype).tiny)
            self._state = replace(self._state, layer_weights=weights.tolist())
            self._losses.layer_weights = weights

    def _save(self) -> None:
        if self._world.leads:
            checkpoint.save(self._folder / CHECKPOINTS, self._state, self._parameters, self._best, self._optimizer)

    def _resume(self) -> None:
        found = checkpoint.load_newest(self._folder / CHECKPOINTS)
        if found is None:
            _log.info("%s: no checkpoint to resume from, starting at step 0", self._folder)
            return
        state, tensors = found
        if different := sorted(key for key in self._fingerprint if state.fingerprint.get(key) != self._fingerprint[key]):
            key = different[0]
            told = f"resume: {key} is {self._fingerprint[key]!r}, the checkpoint was made with {state.fingerprint.get(key)!r}"
            if not self._config.resume_changed:
                raise UsageError(f"{told}; give the same settings, add --resume-changed, or start again in another --out")
            _log.warning("%s: the rest of the run differs from what it would have been", told)
        self._faces.adapters.load_state(checkpoint.group(tensors, "adapter"))
        self._best = {name: value.to(self._device) for name, value in checkpoint.group(tensors, "best").items()}
        checkpoint.restore_optimizer(tensors, self._parameters, self._optimizer)
        self._state = state
        if state.layer_weights:
            self._losses.layer_weights = torch.tensor(state.layer_weights, device=self._device)
        _log.info("resumed at step %d of %d", state.step, self.plan.steps)

    def _save_bad_batch(self, number: int, loss: float, norm: float) -> str:
        """Keep the windows that broke the step, and say so in one line."""
        self._ahead.wait()
        path = self._folder / f"bad-batch-step-{number + 1}.json"
        batches = self._batches.of_step(number, range(len(self._batches.lengths(number))))
        path.write_text(json.dumps([window for batch in batches for window in batch.ids_BT.tolist()]), encoding="utf-8")
        return (
            f"step {number + 1}: loss {loss}, gradient norm {norm}; the weights were not changed. "
            f"The batch is in {path}; try a lower --learning-rate than {self.peak_rate} or --dtype fp32"
        )


def _fingerprint(config: RestoreConfig, train: TokenStream, validation: TokenStream) -> dict[str, Any]:
    """What must be equal for a resumed run to be the run it goes on with."""
    free = {
        "out", "resume", "resume_changed", "evaluate", "evaluation", "gate", "checkpoint_every", "recompute",
        "gpu_memory_utilization", "device", "data", "model", "shard",
    }  # fmt: skip
    settings: dict[str, Any] = config.spelled_out().model_dump(mode="json", exclude=free)
    return settings | {"train data": train.sha256, "validation data": validation.sha256}


def _add(sums: dict[str, Tensor], parts: dict[Any, Tensor], share: float) -> None:
    for name, value in parts.items():
        sums[name] += value.detach() * share


def _advance(bar: Bar, row: dict[str, Any]) -> None:
    bar.advance(1, f"loss {row['loss']:.4f}, {row['tokens_per_s']:.0f} tokens/s")


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
