"""`timeout 120 python -m restore.kernels.tune_hopper`: is the warp-specialised forward right on this GPU, and is it faster?

It was written without a GPU at hand and compiled for sm_90a only. A mistake in its barriers shows as a program that never ends:
hence the `timeout`. Every shape is compared with `triton_forward`, then both are timed in turns beside a matrix product.
"""

import json
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from restore.kernels.bench import describe_run, measure_matmul
from restore.kernels.hopper_forward import hopper_forward
from restore.kernels.triton_forward import forward
from restore.kernels.tune import differs, once_ms

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(tokens: int, channels: int, groups: int, dtype: torch.dtype) -> Four:
    """q_s, k_s, q_t, k_t with [B, T, H, D] in memory, as a projection leaves them."""
    torch.manual_seed(tokens)

    def pair(count: int) -> tuple[Tensor, Tensor]:
        teacher = torch.randn(2, tokens, count, channels, device="cuda").transpose(1, 2)
        return (teacher + 0.1 * torch.randn_like(teacher)).to(dtype), teacher.to(dtype)

    (q_s, q_t), (k_s, k_t) = pair(8), pair(groups)
    return q_s, k_s, q_t, k_t


def check() -> list[str]:
    """Shapes on which the two kernels differ by more than rounding, or two runs by one bit."""
    wrong = []
    shapes = product((1, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 2048), (64, 128), (8, 2), (torch.bfloat16, torch.float16))
    for shape in shapes:
        tensors = inputs(*shape)
        scales = (0.09, 0.08)
        ours = hopper_forward(*tensors, scales)
        error = differs(ours, forward(*tensors, scales, None, None), limit=2e-4)
        again = hopper_forward(*tensors, scales)
        if error or not all(map(torch.equal, ours, again)):
            wrong.append(f"{shape}: {error or 'two runs differ'}")
    return wrong


def compare(tokens: int, channels: int, repeats: int = 15) -> dict[str, Any]:
    """Median milliseconds of both, forward alone, 32 heads."""
    q_s, q_t = (torch.randn(1, 32, tokens, channels, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    scales = (channels**-0.5, channels**-0.5)
    contest = {
        "triton": partial(forward, q_s, q_s, q_t, q_t, scales, None, None),
        "hopper": partial(hopper_forward, q_s, q_s, q_t, q_t, scales),
    }
    times_ms: dict[str, list[float]] = {name: [] for name in contest}
    for _ in range(repeats):
        for name, run in contest.items():
            times_ms[name].append(once_ms(run))
    row = {f"{name}_ms": round(median(times), 4) for name, times in times_ms.items()}
    rate = 2 * tokens**2 * channels * 32 / row["hopper_ms"] / 1e9
    return {"T": tokens, "channels": channels, **row, "hopper_tflops": round(rate, 1), "matmul_tflops": measure_matmul()}


def main() -> None:
    wrong = check()
    report = describe_run("restore.kernels.tune_hopper") | {"wrong": wrong}
    print(*wrong or ["all shapes agree"], sep="\n", flush=True)
    report["rows"] = [compare(tokens, channels) for channels in (128, 64) for tokens in (1024, 4096, 8192, 16384)]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
