"""`ard restore --estimate`: what a run would take of memory and disk, from config.json alone."""

import torch
from transformers import AutoModelForCausalLM

from ard_serve import console
from restore.config import RestoreConfig
from restore.forecast import BYTES_PER_TRAINED, forecast
from restore.inspection import read_config, transformers_config
from restore.loading import resolve
from restore.plan import plan_steps

# A checkpoint holds adapters, the best adapters and two moments of each, in fp32; two of them are kept, and a third while
# it is written.
_CHECKPOINT_BYTES_PER_TRAINED, _CHECKPOINTS = 16, 3


def run(config: RestoreConfig) -> int:
    """Print the estimate; returns the exit code, 0."""
    base = read_config(resolve(config.model))
    rope = config.plan_rope(base)
    plan, needed = plan_steps(config, rope), forecast(base, rope, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(base), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    export = sum(weight.nbytes for weight in model.parameters())
    trained = needed.trained_bytes // BYTES_PER_TRAINED
    checkpoints = _CHECKPOINTS * _CHECKPOINT_BYTES_PER_TRAINED * trained
    rows = [
        ("device memory at the peak", needed.peak_bytes),
        ("  frozen weights", needed.weights_bytes),
        ("  adapters and optimizer", needed.trained_bytes),
        ("  a step", needed.step_bytes),
        ("disk", export + checkpoints),
        ("  exported model in bf16", export),
        ("  checkpoints", checkpoints),
    ]
    lengths = f"{rope.native_window:,} to {rope.target_length:,} tokens"
    console.print_table(
        f"{config.model}, {lengths}: {plan.steps} steps of {plan.step_tokens:,} tokens",
        ["what", "GiB"],
        [(name, f"{size / 2**30:,.2f}") for name, size in rows],
    )
    return 0
