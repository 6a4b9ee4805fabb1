"""What an evaluation found, for one model and for several side by side: the schema of evaluation.json."""

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ard_serve.artifact import Scores

# The p-value below which a difference is called more than chance.
SIGNIFICANT = 0.05


class _Record(BaseModel):
    # A model that breaks down gives figures that are no numbers; JSON has none, and null could not be read back.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class PerplexityScore(_Record):
    """Perplexity over the last tokens of windows of `length` tokens."""

    length: int
    window_nll: tuple[float, ...] = Field(description="mean negative log-likelihood of each window, in nats a token")

    @property
    def value(self) -> float:
        return math.exp(min(_mean(self.window_nll), 700.0))

    @property
    def stderr(self) -> float | None:
        """Over windows, by the delta method; None for a single window."""
        spread = mean_stderr(self.window_nll)
        return None if spread is None else self.value * spread


class PositionCurve(_Record):
    """Perplexity by position inside the longest windows; bucket i covers [edges[i], edges[i + 1])."""

    edges: tuple[int, ...]
    perplexity: tuple[float, ...]


class SlidingScore(_Record):
    """Perplexity of whole documents: short ones at once, long ones through a sliding window of `length` tokens."""

    documents: Literal["short", "long"]
    length: int
    nll: tuple[float, ...] = Field(description="mean negative log-likelihood of each document, in nats a token")

    @property
    def value(self) -> float:
        return math.exp(min(_mean(self.nll), 700.0))

    @property
    def title(self) -> str:
        window = f"sliding over {self.length:,} tokens, " if self.documents == "long" else "whole, "
        return f"perplexity, {window}{self.documents} documents"


class NeedleScore(_Record):
    """Retrieval at one length and depth; each sample is the share of its answers that was found."""

    task: str
    length: int
    depth: float
    samples: tuple[float, ...]

    @property
    def value(self) -> float:
        return _mean(self.samples)


class TaskScore(_Record):
    """One short task. `metric` names the headline among `metrics`; `correct` holds its items in file order, 0, 1 or a share.

    `chance`: what guessing scores, where that is known.
    """

    name: str
    metric: str
    metrics: dict[str, float]
    correct: tuple[int, ...] | tuple[float, ...]
    chance: float | None = None

    @property
    def counts(self) -> bool:
        """Whether it counts in a mean over tasks. Shares do not: TruthfulQA's MC2 has the items of a task that is there
        already, and rises where a model loses its preferences."""
        return {*self.correct} <= {0, 1}

    @property
    def value(self) -> float:
        return _mean(self.correct)

    @property
    def stderr(self) -> float | None:
        return mean_stderr(self.correct)


class Evaluation(_Record):
    """Everything measured on one model."""

    name: str
    server: str | None = Field(None, description="URL of the server that was asked, where the model was not loaded")
    perplexity: tuple[PerplexityScore, ...] = ()
    window_documents: tuple[str, ...] = Field((), description="the document that each perplexity window was cut from")
    by_position: PositionCurve | None = None
    sliding: tuple[SlidingScore, ...] = ()
    haystack: str | None = Field(None, description="the document that needles were hidden in, the longest one")
    needles: tuple[NeedleScore, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    seconds: float = 0.0

    @property
    def scores(self) -> Scores:
        """The figures a manifest carries; needles are the `single` task, the mean over depths."""
        lengths = sorted({needle.length for needle in self.needles if needle.task == "single"})
        return Scores(
            perplexity={score.length: score.value for score in self.perplexity},
            needle={length: self.needle(length) for length in lengths},
            tasks={score.name: score.value for score in self.tasks},
        )

    @property
    def short_mean(self) -> float | None:
        """Mean of the short tasks' headline scores, those that count; None without any."""
        counted = [task.value for task in self.tasks if task.counts]
        return sum(counted) / len(counted) if counted else None

    def needle(self, length: int, task: str = "single") -> float:
        """Exact match of one needle task at one length, the mean over depths and samples."""
        return _mean(self.needle_samples(length, task))

    def needle_samples(self, length: int, task: str = "single") -> tuple[float, ...]:
        """Every sample of one needle task at one length, depth after depth."""
        return tuple(sample for n in self.needles if (n.task, n.length) == (task, length) for sample in n.samples)

    def task(self, name: str) -> TaskScore | None:
        return next((score for score in self.tasks if score.name == name), None)


class Comparison(_Record):
    """One figure of `model` against the same items of `reference`.

    `ratio` is after / before: a task's retention, and above 1 a worse perplexity. `p_value` is None where nothing is paired;
    `pairs` counts the items, windows or prompts behind it.
    """

    reference: str
    model: str
    what: str
    before: float
    after: float
    ratio: float | None
    p_value: float | None
    pairs: int = 0

    @property
    def too_few(self) -> bool:
        """So few pairs that even all of them together could not be told from chance."""
        return self.p_value is not None and self.pairs > 0 and 2 / 2**self.pairs > SIGNIFICANT


class EvaluationReport(_Record):
    """`evaluation.json`: the models side by side, how they were measured, and on what machine."""

    schema_version: int = 1
    created_at: str
    ard_serve_version: str
    machine: str
    config: dict[str, Any]
    models: tuple[Evaluation, ...]
    comparisons: tuple[Comparison, ...] = ()


def mean_stderr(values: tuple[float, ...] | tuple[int, ...]) -> float | None:
    """Standard error of a mean; None where one value says nothing about spread."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _mean(values: tuple[float, ...] | tuple[int, ...]) -> float:
    return sum(values) / len(values) if values else math.nan
