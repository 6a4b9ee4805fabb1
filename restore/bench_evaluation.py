"""What measuring a model takes of a GPU's memory: python -m restore.bench_evaluation --out evaluation-memory-h200.json

Random weights of a shape read one window and one needle prompt of each length, as `ard eval` would. A row:
`{"shape": "7b", "what": "needle", "length": 32768, "peak_gib": ..., "told_gib": ..., "weights_gib": ...}`. What is told is what
an estimate says of a run that measures this alone (restore/fit.py).
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from restore.bench_cases import SHAPES, build_model
from restore.bench_results import Results
from restore.evaluation.config import EvalConfig
from restore.evaluation.likelihood import Loaded
from restore.fit import measuring

_GIB = 1 << 30
_SCORED, _WRITTEN = 1024, 8  # tokens of a window that are scored, and of an answer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m restore.bench_evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="results file; rows are appended")
    parser.add_argument("--shapes", nargs="+", default=["1.7b", "7b", "8b"], choices=SHAPES)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768], metavar="TOKENS")
    parser.add_argument("--commit", help="what the numbers belong to, where there is no git")
    options = parser.parse_args()
    device = torch.device("cuda")
    results = Results(options.out, options.commit, device)
    for shape in options.shapes:
        for row in _rows(shape, options.lengths, device):
            results.append(row)
            print(row, flush=True)


def _rows(shape: str, lengths: list[int], device: torch.device) -> Iterator[dict[str, Any]]:
    base = SHAPES[shape] | {"max_position_embeddings": max(lengths)}
    model = build_model(base, torch.bfloat16, device).train(False)
    weights_bytes = sum(weight.nbytes for weight in model.parameters())
    for length in lengths:
        for what, read in _readings(Loaded(model, length), length).items():
            torch.cuda.reset_peak_memory_stats(device)
            read()
            peak_bytes = torch.cuda.max_memory_allocated(device)
            told = measuring(base, weights_bytes, settings(what, length))
            yield {
                "shape": shape, "what": what, "length": length, "peak_gib": peak_bytes / _GIB,
                "told_gib": told.peak_bytes / _GIB, "weights_gib": weights_bytes / _GIB,
            }  # fmt: skip


def settings(what: str, length: int) -> EvalConfig:
    """An evaluation of one window, or of one needle prompt as well."""
    needles = {"needle_lengths": (length,), "needle_samples": int(what == "needle")}
    return EvalConfig.model_validate({"data": ("books",), "lengths": (length,), "batch_tokens": length, **needles})


def _readings(reader: Loaded, length: int) -> dict[str, Callable[[], object]]:
    ids = torch.randint(reader.model.config.vocab_size, (length,)).tolist()
    return {
        "window": lambda: reader.log_probs([ids], range(length - _SCORED, length), lambda _: None),
        "needle": lambda: reader.continue_greedily([ids], _WRITTEN, lambda _: None),
    }


if __name__ == "__main__":
    main()
