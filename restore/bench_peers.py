"""`python -m restore.bench_peers`: parts of a training step beside what libraries make of them, as one JSON file.

Next-token losses, the KL of logits and both at once beside Liger-Kernel's, cut-cross-entropy's and plain PyTorch, each held
against float64; decoder layers with adapters beside the same under torch.compile and beside transformers' own modules. A peer
that is not installed or fails says so in its row. What came of it is in docs/training.md.

Shapes: B batch, N rows (tokens), T tokens, C hidden channels, V vocabulary.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from restore import vocabulary
from restore.adapters import Adapters
from restore.bench import median_s
from restore.bench_cases import SHAPES, Case, build_model
from restore.bench_results import Results
from restore.model import Kept, TwoFaced

# (student's rows [N, C], teacher's rows [N, C], next tokens [N], head [V, C]) to a scalar.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_PARTS = ("lm", "logits", "both", "layers")
# Of KL and next-token loss in `both`, as in the default recipe.
_BOTH = (0.25, 1.0)
_LAYERS = 4
_WINDOWS = {"7b": 8192, "1.7b": 8192, "135m": 8192, "tiny": 32}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m restore.bench_peers", description="Time parts of a step beside libraries'."
    )
    parser.add_argument("--out", type=Path, required=True, help="results file; rows are appended")
    parser.add_argument("--shapes", nargs="+", default=["7b", "135m"], choices=_WINDOWS)
    parser.add_argument("--tokens", type=int, default=16_384, help="read at once (default 16384)")
    parser.add_argument("--parts", nargs="+", default=list(_PARTS), choices=_PARTS)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--commit", help="what the numbers belong to, where there is no git")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = Results(options.out, options.commit, device)
    for shape in options.shapes:
        for part in options.parts:
            rows = _layers(shape, options, device) if part == "layers" else _losses(shape, part, options, device)
            for row in rows:
                results.append(row)
                print(json.dumps(row), flush=True)


# Losses


def _losses(shape: str, part: str, options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    base = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, device=device, generator=generator)
    channels, words = base["hidden_size"], base["vocab_size"]
    # Logits with a deviation of 3, about a trained model's; the student is off by a tenth.
    teacher_NC = draw(options.tokens, channels).bfloat16()
    student_NC = (teacher_NC + 0.1 * draw(options.tokens, channels)).bfloat16().requires_grad_()
    head_VC = (3 * channels**-0.5 * draw(words, channels)).bfloat16()
    next_N = torch.randint(words, (options.tokens,), device=device, generator=generator)
    given = (student_NC, teacher_NC, next_N, head_VC)
    exact = _in_float64(part, *given)
    for name, loss in _OF_PART[part].items():
        row = {
            "part": part,
            "shape": shape,
            "tokens": options.tokens,
            "hidden_size": channels,
            "vocab_size": words,
            "peer": name,
        }
        yield row | _tried(lambda loss=loss: _timed_loss(loss, given, exact, options.repeats, device))  # type: ignore[misc]


def _timed_loss(
    loss: Loss, given: tuple[Tensor, Tensor, Tensor, Tensor], exact: tuple[Tensor, Tensor], repeats: int, device: torch.device
) -> dict[str, Any]:
    def once() -> tuple[Tensor, Tensor]:
        value = loss(*given)
        return value.detach(), torch.autograd.grad(value, given[0])[0]

    row = _timed(once, repeats, device)
    value, grad = once()
    of_value, of_grad = exact
    row["loss_error"] = float((value.double() - of_value).abs() / of_value.abs())
    row["gradient_error"] = float((grad.double() - of_grad).norm() / of_grad.norm())
    return row


def _in_float64(part: str, student_NC: Tensor, teacher_NC: Tensor, next_N: Tensor, head_VC: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the student's rows, a few rows at a time."""
    total, grads = torch.zeros((), dtype=torch.float64, device=head_VC.device), []
    count, head = len(student_NC), head_VC.double()
    for at in range(0, count, 1024):
        student, teacher, following = (given[at : at + 1024] for given in (student_NC, teacher_NC, next_N))
        leaf = student.detach().double().requires_grad_()
        rows = linear(leaf, head).log_softmax(-1)
        native = linear(teacher.double(), head).log_softmax(-1)
        kl = (native.exp() * (native - rows)).sum() / count
        told = -rows.gather(1, following[:, None])
        if part == "both":  # one text, whose last token has no next
            loss = _BOTH[0] * kl + _BOTH[1] * told[: count - 1 - at].sum() / (count - 1)
        else:
            loss = kl if part == "logits" else told.sum() / count
        grads.append(torch.autograd.grad(loss, leaf)[0])
        total += loss.detach()
    return total, torch.cat(grads)


def _ours_lm(student_NC: Tensor, _teacher: Tensor, next_N: Tensor, head_VC: Tensor) -> Tensor:
    return vocabulary.token_loss(student_NC, next_N, head_VC)


def _torch_lm(student_NC: Tensor, _teacher: Tensor, next_N: Tensor, head_VC: Tensor) -> Tensor:
    return cross_entropy(linear(student_NC, head_VC).float(), next_N)


def _liger_lm(student_NC: Tensor, _teacher: Tensor, next_N: Tensor, head_VC: Tensor) -> Tensor:
    found: Tensor = _liger().liger_fused_linear_cross_entropy(student_NC, head_VC, next_N)
    return found


def _cut_cross_entropy(student_NC: Tensor, _teacher: Tensor, next_N: Tensor, head_VC: Tensor) -> Tensor:
    found: Tensor = import_module("cut_cross_entropy").linear_cross_entropy(student_NC, head_VC, next_N)
    return found


def _ours_kl(student_NC: Tensor, teacher_NC: Tensor, _next: Tensor, head_VC: Tensor) -> Tensor:
    return vocabulary.logits_kl(student_NC[None], teacher_NC[None], head_VC)


def _torch_kl(student_NC: Tensor, teacher_NC: Tensor, _next: Tensor, head_VC: Tensor) -> Tensor:
    rows = linear(student_NC, head_VC).log_softmax(-1, dtype=torch.float32)
    native = linear(teacher_NC, head_VC).log_softmax(-1, dtype=torch.float32)
    return torch.nn.functional.kl_div(rows, native, log_target=True, reduction="none").sum(-1).mean()


def _liger_kl(student_NC: Tensor, teacher_NC: Tensor, _next: Tensor, head_VC: Tensor) -> Tensor:
    # Its generalised Jensen-Shannon divergence at 0 is KL(teacher || student).
    found: Tensor = _liger().liger_fused_linear_jsd(student_NC, head_VC, teacher_NC, head_VC, jsd_beta=0.0)
    return found


def _ours_both(student_NC: Tensor, teacher_NC: Tensor, next_N: Tensor, head_VC: Tensor) -> Tensor:
    ids_BT = torch.cat((next_N[-1:], next_N[:-1]))[None]
    return vocabulary.logits_kl_and_lm(student_NC[None], teacher_NC[None], ids_BT, head_VC, _BOTH)[0]


def _sum_of(kl: Loss, lm: Loss) -> Loss:
    def both(student_NC: Tensor, teacher_NC: Tensor, next_N: Tensor, head_VC: Tensor) -> Tensor:
        of_lm = lm(student_NC[:-1], teacher_NC, next_N[:-1], head_VC)  # the last row has no next
        return _BOTH[0] * kl(student_NC, teacher_NC, next_N, head_VC) + _BOTH[1] * of_lm

    return both


def _liger() -> Any:
    return import_module("liger_kernel.transformers.functional")


def _compiled(loss: Loss) -> Loss:
    return torch.compile(loss, dynamic=False)


_LM: dict[str, Loss] = {
    "ours": _ours_lm,
    "liger-kernel": _liger_lm,
    "cut-cross-entropy": _cut_cross_entropy,
    "torch": _torch_lm,
    "torch, compiled": _compiled(_torch_lm),
}
_LOGITS: dict[str, Loss] = {
    "ours": _ours_kl,
    "liger-kernel": _liger_kl,
    "torch": _torch_kl,
    "torch, compiled": _compiled(_torch_kl),
}
# Those of libraries make the student's logits twice.
_OF_PART: dict[str, dict[str, Loss]] = {
    "lm": _LM,
    "logits": _LOGITS,
    "both": {
        "ours": _ours_both,
        "ours, one by one": _sum_of(_ours_kl, _ours_lm),
        "liger-kernel": _sum_of(_liger_kl, _liger_lm),
        "torch": _sum_of(_torch_kl, _torch_lm),
        "torch, compiled": _compiled(_sum_of(_torch_kl, _torch_lm)),
    },
}


# Layers


def _layers(shape: str, options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    window = _WINDOWS[shape]
    for name in ("ours", "ours, compiled", "transformers", "transformers, compiled"):
        row = {"part": "layers", "shape": shape, "tokens": options.tokens, "window": window, "layers": _LAYERS, "peer": name}
        yield row | _tried(lambda name=name: _timed_layers(name, shape, window, options, device))  # type: ignore[misc]


def _timed_layers(name: str, shape: str, window: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The student's layers with adapters, forward and backward, all they did kept; nobody's relations are taken."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    case = Case(shape, window, {"recipe": "cpt", "batch_tokens": options.tokens})
    config, rope = case.config, case.rope
    model = build_model(rope.native_config(case.base | {"num_hidden_layers": _LAYERS}), torch.bfloat16, device)
    ids_BT = torch.randint(case.base["vocab_size"], (options.tokens // window, window), device=device)
    read: Callable[[], Tensor]
    if name.startswith("ours"):
        faces = TwoFaced(model, rope, config)
        faces.kept = Kept(reading=_LAYERS)
        adapters, read = faces.adapters, partial(faces.student, ids_BT)
    else:
        adapters = Adapters(model, config)
        model.train(False)
        read = lambda: model.model(ids_BT, use_cache=False).last_hidden_state  # noqa: E731
    if name.endswith("compiled"):
        for layer in model.model.layers:
            # Dynamo looks for what attention's forward calls where the function was written, and cannot guard another one.
            vars(layer.self_attn).pop("forward", None)
            layer.forward = torch.compile(layer.forward, dynamic=False)
    learnt = adapters.parameters()
    grad_BTC = torch.randn(*ids_BT.shape, case.base["hidden_size"], device=device, dtype=torch.bfloat16)

    def once() -> tuple[Tensor, ...]:
        return torch.autograd.grad(read(), learnt, grad_BTC)

    row = _timed(once, options.repeats, device)
    if name.endswith("compiled"):
        row["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    return row


# Clocks


def _tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    # Whatever a library raises is what there is to report about it.
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _timed(once: Callable[[], object], repeats: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of one call, its memory beyond what was there, and the first call's seconds, with compilation and tuning."""
    started = time.perf_counter()
    once()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    first_s, there = time.perf_counter() - started, torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    row: dict[str, Any] = {"fwd_bwd_ms": 1e3 * median_s(once, device, repeats)}
    if device.type == "cuda":
        row["extra_mib"] = (torch.cuda.max_memory_allocated(device) - there) / 2**20
    return row | {"first_call_s": first_s}


if __name__ == "__main__":
    main()
