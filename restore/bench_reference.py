"""LinearARD's own trainer (gracefulning/LinearARD) for `python -m restore.bench --reference`: its code, our model and data.

Nothing of it is part of this project: `train.py` of a checkout is imported in a process of its own and run as it is. Put in its
place is only what a bench cannot have or current libraries no longer have: weights and a data set from the hub, and
FlashAttention's package where it is not installed, for which PyTorch's own attention stands in.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from restore.bench_cases import Case, build_model, random_tokens
from restore.flops import Counter
from restore.inspection import transformers_config

# Its training script for LLaMA2-7B: rank 1024 on q, k and v, linear scaling, two windows a step.
_RANK, _WINDOWS = 1024, 2
_SETTINGS: dict[str, Any] = {
    "recipe": "linearard", "rope_type": "linear", "rank": _RANK, "alpha": 2 * _RANK,
    "targets": ("q_proj", "k_proj", "v_proj"), "min_learning_rate_ratio": 0.9, "learning_rate": 2e-5, "max_grad_norm": 5.0,
}  # fmt: skip
_GIB = 1 << 30
_TIMEOUT_S = 540


def case(shape: str, window: int) -> Case:
    """What the reference does in a step, for our trainer to do beside it."""
    return Case(shape, window, _SETTINGS | {"batch_tokens": _WINDOWS * window})


def measure(checkout: Path, shape: str, window: int, warmup: int, steps: int) -> dict[str, Any]:
    """The row of the reference; where it cannot run, its row says why."""
    same = case(shape, window)
    row = same.describe(1) | {"engine": "LinearARD"}
    command = [sys.executable, "-m", __name__, str(checkout), shape, str(window), str(warmup + steps)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return row | {"error": f"no result within {_TIMEOUT_S} s"}
    if ended.returncode != 0:
        return row | {"error": (ended.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    found = json.loads(ended.stdout.splitlines()[-1])
    seconds = median(found["seconds"][warmup - 1 :])  # the first is from the start of the second step on
    tokens = _WINDOWS * window
    tflops = Counter(same.base, same.config).distilled(window).counted * _WINDOWS / seconds / 1e12
    measured = {"seconds": seconds, "tokens_per_s": tokens / seconds, "tflops": tflops}
    return row | measured | {"peak_gib": found["peak_bytes"] / _GIB}


class _Blocks(IterableDataset[dict[str, Tensor]]):
    """What its data set gives: blocks of token ids, none of them padded."""

    def __init__(self, base: dict[str, Any], window: int) -> None:
        self._base, self._window = base, window

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        ids = torch.from_numpy(random_tokens(self._base, 4 * self._window).ids).long().view(4, -1)
        while True:
            for block in ids:
                yield {"input_ids": block, "attention_mask": torch.ones_like(block), "labels": block}


def _attend(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, q, k, v, None, **kwargs)


def prepare(checkout: Path, base: dict[str, Any], window: int) -> ModuleType:
    """Import `train.py` of the checkout with random weights and data behind the names that it loads them by."""
    data_loader = ModuleType("data_loader")
    builder = SimpleNamespace(build=lambda **_: _Blocks(base, window))
    data_loader.PG19BlockDatasetBuilder = lambda **_: builder  # type: ignore[attr-defined]
    sys.modules["data_loader"] = data_loader
    if importlib.util.find_spec("flash_attn") is None:
        ALL_ATTENTION_FUNCTIONS.register("flash_attention_2", _attend)
    AttentionMaskInterface.register("record_qkv", sdpa_mask)
    sys.path.insert(0, str(checkout))
    train = importlib.import_module("train")

    def load(_name: str, config: PreTrainedConfig | None = None, **_: Any) -> PreTrainedModel:
        stretched = {} if config is None else {"rope_parameters": {"rope_theta": base["rope_theta"], **config.rope_scaling}}
        model = build_model(base | stretched, torch.bfloat16, torch.device("cuda"))
        model.set_attn_implementation("record_qkv")
        return model

    stand_ins = {
        "AutoTokenizer": SimpleNamespace(from_pretrained=lambda _name: None),
        "AutoConfig": SimpleNamespace(from_pretrained=lambda _name: transformers_config(base)),
        "AutoModelForCausalLM": SimpleNamespace(from_pretrained=load),
    }
    for name, stand_in in stand_ins.items():
        setattr(train, name, stand_in)
    return train


def run(checkout: Path, case_: Case, steps: int) -> dict[str, Any]:
    """Train `steps` steps in this process: seconds from each step's log line to the next, and the peak of device memory."""
    train = prepare(checkout, case_.base, case_.window)
    logged: list[float] = []
    train.print = lambda *words: logged.append(time.perf_counter()) if words[0] == "step:" else None  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [
            "train.py", "--model-id", "m", "--tokenizer-id", "m", "--num-gpus", "1", "--batch-size", "1",
            "--student-rope-scaling", '{"rope_type": "linear", "factor": 8.0}', "--ctx-len", str(case_.window),
            "--grad-accum", str(_WINDOWS), "--steps", str(steps), "--base-lr", "2e-5", "--writer-dir", folder,
            "--save-final-ckpt-dir", folder, "--save-step-ckpt-prefix", f"{folder}/",
        ]  # fmt: skip
        train.train_ddp(0, 1, train.parse_args())
    seconds = [after - before for before, after in pairwise(logged)]
    return {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), case(sys.argv[2], int(sys.argv[3])), int(sys.argv[4]))))
