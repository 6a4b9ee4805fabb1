"""vLLM's rotary tables, in a process of its own: `python -m restore.rotary_tables OUT.npz TARGET_LENGTH FOLDER...`.

Importing vLLM takes seconds and changes process-wide state (logging, torch defaults), which an export must not inherit. Its
public command line says nothing about rotary tables, so this one module uses its Python API, the same in 0.23 to 0.33.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

UNUSABLE = 69
_DENSE = 4096


def sampled_positions(target_length: int) -> list[int]:
    """Positions at which tables are compared: all of a short table, the ends and a grid of a long one."""
    step = max(1, target_length // _DENSE)
    ends = [*range(min(_DENSE, target_length)), *range(max(0, target_length - _DENSE), target_length)]
    return sorted({*ends, *range(0, target_length, step)})


def vllm_table(folder: Path, target_length: int) -> tuple[np.ndarray, int]:
    """Cosines then sines that vLLM uses at the sampled positions ([P, D] fp32), and the length it would serve."""
    import torch
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    model = ModelConfig(model=str(folder), tokenizer=str(folder))
    config = model.hf_text_config
    with set_current_vllm_config(VllmConfig(model_config=model)):
        rope = get_rope(
            model.get_head_size(),
            max_position=config.max_position_embeddings,
            is_neox_style=True,
            rope_parameters=config.rope_parameters,
            dtype=torch.float32,
        )
    if config.rope_parameters["rope_type"] == "longrope":
        # The short table lies before the long one, which is the one vLLM uses for a stretched model.
        both = rope.get_buffer("long_short_cos_sin_cache")
        table = both[config.rope_parameters["original_max_position_embeddings"] :]
    else:
        table = rope.get_buffer("cos_sin_cache")
    positions = [position for position in sampled_positions(target_length) if position < len(table)]
    return table[positions].float().cpu().numpy(), model.max_model_len


def main(out: str, target_length: str, *folders: str) -> None:
    """Write `N.table` and `N.served` for the N-th folder into `out`; exits with UNUSABLE where vLLM cannot be imported."""
    try:
        import vllm.config  # noqa: F401
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(UNUSABLE)
    arrays: dict[str, Any] = {}
    for number, folder in enumerate(folders):
        arrays[f"{number}.table"], arrays[f"{number}.served"] = vllm_table(Path(folder), int(target_length))
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
