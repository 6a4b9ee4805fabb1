"""What `ard eval` measures, with how much of it, and what a restoration must reach: fields of config files and flags."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator, model_validator

from ard_serve.settings import Settings

NeedleTask = Literal["single", "multi_key", "multi_value", "multi_query", "variable_tracking", "common_words"]

_SHORTEST_TOKENS = 1024
# What a question and a few sentences of text take, unless lengths are stated.
_SHORTEST_NEEDLE_TOKENS = 512


class EvalConfig(Settings):
    """One evaluation: on which text and tasks, at which lengths, with how many samples."""

    data: tuple[str, ...] = Field(
        (), description="held-out text, JSONL or Parquet files, folders of them, or a dataset name; in a restoration its own"
    )
    tasks: tuple[str, ...] = Field((), description="short tasks: JSONL files or folders of them; none when not given")
    harness: tuple[str, ...] = Field(
        (), description="tasks of lm-evaluation-harness, by name or YAML file; needs the package lm-eval"
    )
    lengths: tuple[PositiveInt, ...] = Field(
        (), description="window lengths in tokens; doubling from 1024 to the target length when not given"
    )
    windows: PositiveInt = Field(8, description="perplexity windows of each length, spread over the text")
    sliding: tuple[PositiveInt, ...] = Field(
        (), description="window lengths that slide over whole documents, short ones apart from long; none when not given"
    )
    needle_tasks: tuple[NeedleTask, ...] = Field(("single",), description="retrieval tasks hidden in long text")
    reading: tuple[str, ...] = Field(
        (), description="JSONL files of questions over long text, asked at the needles' lengths and depths"
    )
    needle_lengths: tuple[PositiveInt, ...] = Field(
        (), description="prompt lengths of the needles; the lengths from 512 tokens on when not given"
    )
    needle_depths: tuple[float, ...] = Field(
        (0.0, 0.25, 0.5, 0.75, 1.0), min_length=1, description="where a needle lies: 0 is the beginning, 1 the end"
    )
    needle_samples: NonNegativeInt = Field(4, description="prompts for each needle task, length and depth; 0 measures none")
    shots: NonNegativeInt = Field(5, description="solved examples before each question of a task that has a pool of them")
    limit: PositiveInt | None = Field(None, description="at most this many items of each short task, spread over the file")
    batch_tokens: PositiveInt = Field(16_384, description="tokens of one forward pass; a longer window runs alone")
    seed: NonNegativeInt = Field(0, description="seed of the needles' numbers and places")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="dtype of the weights and the arithmetic: bf16 or fp32")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a CUDA device where there is one")

    @field_validator("needle_depths")
    @classmethod
    def _inside(cls, depths: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= depth <= 1 for depth in depths):
            raise ValueError("every depth must be between 0 and 1")
        return depths

    @model_validator(mode="after")
    def _long_enough(self) -> Self:
        if any(length < 2 for length in (*self.lengths, *self.sliding)):
            raise ValueError("a window needs at least 2 tokens: one to read and one to predict")
        return self

    def for_target(self, target_length: int, native_window: int | None = None) -> "EvalConfig":
        """The same evaluation with every length stated, for a model that serves `target_length` tokens.

        Lengths that double by themselves take in the native window, which longer ones are held to.
        """
        lengths = self.lengths or tuple(sorted({*_doubling(target_length), min(native_window or target_length, target_length)}))
        roomy = tuple(length for length in lengths if length >= _SHORTEST_NEEDLE_TOKENS)
        return self.model_copy(update={"lengths": lengths, "needle_lengths": self.needle_lengths or roomy or lengths})


class GateConfig(Settings):
    """What a restored model must reach, against its native self, to be published; what is not measured is not judged."""

    retention: NonNegativeFloat = Field(
        0.99, description="least share of the native mean over the short tasks, beyond two standard errors"
    )
    significance: float = Field(
        0.05, ge=0, le=1, description="no task may be worse with a p-value below this, divided by the number of tasks"
    )
    perplexity: NonNegativeFloat = Field(
        0.1, description="perplexity above the native one's by at most this share, at every length; 0.1 is 10%"
    )
    needle: NonNegativeFloat = Field(0.5, description="least share of the native needles found, at every length")
    length: PositiveInt | None = Field(
        None, description="tokens up to which perplexity and needles must hold; the target length when not given"
    )


def _doubling(target_length: int) -> tuple[int, ...]:
    lengths = []
    length = _SHORTEST_TOKENS
    while length < target_length:
        lengths.append(length)
        length *= 2
    return (*lengths, target_length)
