"""Every setting of a restoration, in one place: the fields of a config file and the flags of `ard restore`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from ard_serve.settings import Settings
from restore.evaluation.config import EvalConfig, GateConfig
from restore.rope import RopePlan, RopeType, plan_rope

Objective = Literal["self_relation", "attention", "logits", "hidden", "short_lm", "lm", "retrieval"]
# What is learnt from long windows, by the student alone; all others are learnt from native ones.
LONG: frozenset[Objective] = frozenset({"lm", "retrieval"})
# What teaches the text itself, and so moves the model to text of its kind.
LEARNS_TEXT: frozenset[Objective] = frozenset({"short_lm", "lm"})

# A recipe is a weight for each objective; docs/decisions/0001-default-recipe.md says why `default` is what it is.
RECIPES: dict[str, dict[Objective, float]] = {
    "default": {"attention": 1.0, "logits": 0.25, "short_lm": 1.0, "lm": 1.0, "retrieval": 0.05},
    "distill": {"attention": 1.0, "logits": 1.0},
    "linearard": {"self_relation": 1.0},
    "cpt": {"lm": 1.0},
    # After LongReD (arXiv 2502.07365): six layers' hidden states at a weight of 5 each, as in its code.
    "longred": {"hidden": 5.0, "lm": 1.0},
}


# Recipes that cut a share of their native windows into short texts; the others are as their authors have them.
_CUT_SHARES = {"default": 0.5, "distill": 0.5}


class RestoreConfig(Settings):
    """One restoration: which model, how far, on what data, with which objectives."""

    model: str = Field(description="folder of a Hugging Face model, or its name on the hub")
    target_length: int = Field(gt=0, description="tokens the restored model must serve")
    data: tuple[str, ...] = Field(min_length=1, description="text, JSONL or Parquet files, folders of them, or a dataset name")
    out: Path = Field(description="folder for the exported model (OUT/model), the checkpoints and the report")

    native_window: PositiveInt | None = Field(None, description="tokens the model was trained on, when its config hides it")
    rope_type: RopeType = Field(
        "yarn", description="how positions are stretched: yarn, linear, llama3, theta, longrope, or none (the control)"
    )
    rope_theta: PositiveFloat | None = Field(None, description="raised RoPE base, for rope_type theta")
    rope_factors: tuple[float, ...] | None = Field(
        None,
        description="divisor of each frequency of a head, for rope_type longrope; `python -m restore.rope_search` finds them",
    )
    rope_attention_factor: PositiveFloat | None = Field(
        None, description="factor on queries and keys, for rope_type longrope; 0.1 ln(factor) + 1 when not given"
    )

    recipe: Literal["default", "distill", "linearard", "cpt", "longred"] = Field(
        "default", description="named set of objective weights: default, distill, linearard (the paper's), cpt or longred"
    )
    objectives: dict[Objective, float] | None = Field(None, description="objective weights that replace the recipe's")
    trainable: Literal["lora", "full"] = Field("lora", description="train low-rank adapters (lora) or full-rank deltas (full)")
    targets: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj"], ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1, description="attention projections that learn"
    )
    rank: PositiveInt = Field(128, description="rank of the LoRA adapters")
    alpha: PositiveInt | None = Field(None, description="LoRA alpha; twice the rank when not given")

    tokens: PositiveInt = Field(4_250_000, description="training tokens at most, long windows included")
    steps: PositiveInt | None = Field(None, description="optimizer steps, instead of a number of tokens")
    batch_tokens: PositiveInt = Field(
        32_768, description="tokens of one optimizer step, in the mean over those with a long window and those without"
    )
    window: PositiveInt | None = Field(None, description="tokens of a distillation window; the native window when not given")
    long_window: PositiveInt | None = Field(
        None, description="tokens of a long window; the target length, at most eight native windows, when not given"
    )
    long_share: float = Field(0.5, ge=0, le=1, description="share of all tokens in long windows")
    jump_share: float = Field(
        0.0, ge=0, le=1, description="share of the distillation windows that the student reads at far, jumping positions"
    )
    cut_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the distillation windows that are cut into short texts of 64 to 1,024 tokens; when not given, "
        "half in the recipes default and distill, none in the others",
    )
    retrieval_spacing: PositiveInt = Field(
        1024, description="tokens of a long window for each fact woven into it, where the objective retrieval is used"
    )
    layer_weighting: Literal["uniform", "equal_loss"] = Field(
        "uniform", description="weights of the layers in relation objectives: uniform, or equal_loss at the start of the run"
    )
    learning_rate: PositiveFloat | None = Field(
        None, description="peak learning rate of AdamW; when not given 1e-3 for a model 576 wide, and lower for wider ones"
    )
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1, description="the cosine ends at this share of the peak rate")
    warmup_steps: int = Field(4, ge=0, description="steps of linear warm-up; the first counted step already has a rate above 0")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of AdamW's mean of squared gradients in a step")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay of the adapters")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped once a step to this global norm")
    seed: int = Field(0, ge=0, description="seed of the data order and of the adapters")

    validation_share: float = Field(
        0.05, gt=0, lt=0.5, description="share of the documents held out to choose the best weights"
    )
    validation_windows: PositiveInt = Field(4, description="held-out windows of one validation")
    validation_every: PositiveInt = Field(20, description="steps between validations")
    checkpoint_every: PositiveInt = Field(20, description="steps between checkpoints")
    resume: bool = Field(False, description="go on from the newest checkpoint in OUT")
    resume_changed: bool = Field(
        False, description="with resume: go on although settings, data or the thread count differ from the checkpoint's"
    )

    dtype: Literal["bf16", "fp32"] = Field("bf16", description="dtype of the frozen weights and the arithmetic: bf16 or fp32")
    quantize: Literal["4bit", "8bit"] | None = Field(
        None, description="keep the frozen weights of the layers in 4bit (NF4) or 8bit; the export adds to the original ones"
    )
    shard: Literal["auto", "on", "off"] = Field(
        "auto",
        description="spread the frozen weights over several processes; auto does where the model does not fit one device",
    )
    recompute: Literal["auto", "all", "none"] = Field(
        "auto",
        description="layers whose work is done again in backward instead of kept: all takes the least memory; auto keeps what "
        "a GPU has room for",
    )
    gpu_memory_utilization: float = Field(
        0.85, gt=0, le=1, description="share of the GPU's free memory that recompute auto may fill; less where others run on it"
    )
    deterministic: bool = Field(
        False,
        description="on a GPU, only operations that give the same bits in every run, as a CPU's do, so that a resumed run ends "
        "as one that was not stopped; slower",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a CUDA device where there is one")
    evaluate: bool = Field(True, description="measure native, stretched and restored before the result is published")
    evaluation: EvalConfig = Field(EvalConfig(), description="what to measure; the held-out documents where it names no data")
    gate: GateConfig = Field(GateConfig(), description="what the restored model must reach to be published")
    # Left out of the saved settings: it speaks of one publication, not of the run.
    force: bool = Field(False, exclude=True, description="publish a model that misses its limits, and say so in its card")

    @field_validator("model")
    @classmethod
    def _named(cls, model: str) -> str:
        """`.` and `..` are another folder elsewhere, and no name for a card."""
        return os.path.abspath(model) if Path(model).name in ("", "..") else model

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any(weight > 0 for weight in self.weights.values()):
            raise ValueError("at least one objective needs a weight above 0")
        if any(weight < 0 for weight in self.weights.values()):
            raise ValueError("objective weights cannot be negative")
        if (both := self.jump_share + self.cut) > 1:
            raise ValueError(f"jump_share + cut_share = {both:g}: together at most 1")
        if self.alpha is not None and self.trainable == "full":
            raise ValueError("alpha belongs to trainable 'lora', this run trains full-rank deltas")
        if self.quantize is not None and self.trainable == "full":
            raise ValueError("quantize belongs to trainable 'lora': full-rank deltas are larger than what it saves")
        if self.quantize is not None and self.shard == "on":
            raise ValueError("quantize and shard: every process holds a quantised model whole; use one of the two")
        return self

    def plan_rope(self, base: Mapping[str, Any]) -> RopePlan:
        """The stretch of a checkpoint with the config.json `base`; raises what `restore.rope.plan_rope` raises."""
        return plan_rope(
            dict(base), self.target_length, self.rope_type, self.native_window, self.rope_theta, self.rope_factors,
            self.rope_attention_factor,
        )  # fmt: skip

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each objective in use."""
        chosen = RECIPES[self.recipe] if self.objectives is None else self.objectives
        return {name: weight for name, weight in chosen.items() if weight != 0}

    @property
    def cut(self) -> float:
        """`cut_share`, or the recipe's."""
        return _CUT_SHARES.get(self.recipe, 0.0) if self.cut_share is None else self.cut_share

    @property
    def recipe_name(self) -> str:
        """The recipe whose objectives are in use, or `custom`."""
        return self.recipe if self.objectives is None or self.weights == RECIPES[self.recipe] else "custom"

    def spelled_out(self) -> Self:
        """The same run with what its recipe stands for now, which another version may change."""
        return self.model_copy(update={"objectives": self.weights, "cut_share": self.cut})

    @property
    def distils(self) -> bool:
        """Whether any objective reads native windows."""
        return not self.weights.keys() <= LONG

    @property
    def reads_long(self) -> bool:
        """Whether any objective needs long windows."""
        return not self.weights.keys().isdisjoint(LONG)


class EstimateConfig(RestoreConfig):
    """`ard restore --estimate`: a restoration of which neither data nor output folder need be known."""

    data: tuple[str, ...] = Field(("-",), description="not read")
    out: Path = Field(Path("-"), description="not written")
    gpu: str | None = Field(
        None, description="H100, H200, A100, L40S or RTX 4090; the one here when not given, or all of them where there is none"
    )
