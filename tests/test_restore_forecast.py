"""The memory forecast: what the allocator of a real step reports, for every family, and a refusal that names what would fit."""

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ard_serve.cli import main
from restore import fit
from restore.config import RestoreConfig
from restore.evaluation.config import EvalConfig
from restore.fit import kept_layers
from restore.forecast import _most_spared, forecast, kept_bytes
from restore.inspection import read_config
from restore.kernels import chunked
from restore.loading import load
from restore.model import Kept, TwoFaced
from restore.objectives import Losses
from restore.plan import plan_steps
from restore.rope import RopePlan, head_dim

MakeCheckpoint = Callable[..., Path]
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 3000}
LAYERS = 6
# What a restoration of 128 tokens to 512 measures of itself when nobody says.
EVALUATION = EvalConfig(dtype="bf16").for_target(512, 128)


# Leaves 300 MB of address space to a run whose logits alone need more; the forecast sees only what the machine has.
STARVED = """
    import resource, sys
    from pathlib import Path
    import restore.job
    from ard_serve.cli import main
    (used,) = [int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line]
    resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + 300_000_000,) * 2)
    sys.exit(main(sys.argv[1:]))
"""


def planned(base: dict[str, Any], **fields: Any) -> tuple[RestoreConfig, RopePlan]:
    config = RestoreConfig.model_validate({"model": "m", "target_length": 1024, "data": ("d",), "out": "o", "rank": 8} | fields)
    return config, config.plan_rope(base)


@pytest.mark.parametrize(
    ("recipe", "dtype", "kept"),
    [
        ("default", "bf16", Kept()),
        ("default", "fp32", Kept()),
        ("linearard", "bf16", Kept()),
        ("distill", "bf16", Kept(4, 0)),
        ("cpt", "bf16", Kept(0, 5)),
        ("linearard", "bf16", Kept(4, 0)),
        ("distill", "bf16", Kept(0, 0, 6, 0)),
        ("cpt", "bf16", Kept(0, 2, 0, 4)),
    ],
)
def test_a_real_step_takes_what_was_forecast(
    make_checkpoint: MakeCheckpoint, recipe: str, dtype: str, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The CPU kernel's scratch, 1 MiB a tile, is nothing beside a real model and would be much beside this one.
    monkeypatch.setattr(chunked, "TILE_ELEMENTS", 1 << 13)
    folder = make_checkpoint("llama3", num_hidden_layers=LAYERS, max_position_embeddings=512, **SHAPE)
    base = read_config(folder)
    config, rope = planned(base, recipe=recipe, dtype=dtype, batch_tokens=2048, window=256)
    expected = forecast(base, rope, config, kept)

    faces = TwoFaced(load(folder, torch.bfloat16 if dtype == "bf16" else torch.float32), rope, config)
    faces.kept = kept
    plan, losses = plan_steps(config, rope), Losses(faces, config.weights)
    trained = sum(parameter.numel() for parameter in faces.adapters.parameters())
    for parameter in faces.adapters.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.profiler.profile(profile_memory=True) as profile:
        if plan.short_windows:
            torch.autograd.backward(
                losses.distil(torch.ones(plan.windows_at_once(base["hidden_size"]), plan.window, dtype=torch.long))[0]
            )
        if plan.long_windows:
            torch.autograd.backward(losses.language_model(torch.ones(1, plan.long_window, dtype=torch.long))[0])
    weights = [weight for weight in faces.model.parameters() if not weight.requires_grad]
    assert expected.weights_bytes == sum(weight.nbytes for weight in weights)
    assert expected.trained_bytes == 20 * trained
    assert expected.step_bytes == pytest.approx(_peak(profile), rel=0.1)


def test_as_many_layers_are_kept_as_there_is_room_for(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    base = read_config(make_checkpoint("llama3", num_hidden_layers=LAYERS, max_position_embeddings=512, **SHAPE))
    config, rope = planned(base, batch_tokens=2048, window=256)
    none = forecast(base, rope, config)
    cuda = torch.device("cuda")
    each = kept_bytes(base, rope, config)  # once: a forecast that keeps something measures it
    monkeypatch.setattr("restore.forecast.kept_bytes", lambda *_: each)
    for free_bytes in (none.peak_bytes, 2 * none.peak_bytes, 100 * none.peak_bytes):
        monkeypatch.setattr("restore.fit._free_bytes", lambda _, free=free_bytes: free)
        kept = kept_layers(base, rope, config, none, cuda)
        assert forecast(base, rope, config, kept).peak_bytes <= max(none.peak_bytes, 0.85 * free_bytes)
        for kind in range(4):
            counts = [kept.distilling, kept.reading, kept.distilling_attention, kept.reading_attention]
            counts[kind] += 1
            more = Kept(*counts)
            full = counts[kind % 2] + counts[kind % 2 + 2] > LAYERS
            assert full or forecast(base, rope, config, more).peak_bytes > 0.85 * free_bytes, f"{kept} of {free_bytes}"
    assert kept == Kept(LAYERS, LAYERS)
    assert kept_layers(base, rope, config, none, torch.device("cpu")) == Kept(), "the CPU's memory is everybody's"
    assert kept_layers(base, rope, config.model_copy(update={"recompute": "all"}), none, cuda) == Kept()


@pytest.mark.parametrize(
    ("layers", "rest", "bytes_each", "flops_each", "expected"),
    [
        (32, 38, (2.9, 0.25), (22, 9), (11, 21)),  # a long window: attention everywhere, then as many layers as fit
        (32, 5, (2.9, 0.25), (22, 9), (0, 20)),
        (32, 6, (0.6, 0.03), (1.9, 0.01), (10, 0)),  # a short one: attention is little of a layer, and takes what is left
        (32, -1, (2.9, 0.25), (22, 9), (0, 0)),
        (4, 100, (2.9, 0.25), (22, 9), (4, 0)),
    ],
)
def test_memory_goes_to_what_spares_the_most_work(
    layers: int, rest: float, bytes_each: tuple[float, float], flops_each: tuple[float, float], expected: tuple[int, int]
) -> None:
    mib = 1 << 20
    sizes = int(bytes_each[0] * mib), int(bytes_each[1] * mib)
    assert _most_spared(layers, int(rest * mib), sizes, (int(flops_each[0] * 100), int(flops_each[1] * 100))) == expected


def _peak(profile: torch.profiler.profile) -> int:
    """Most bytes that the CPU's allocator held above what it held at first."""
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    totals = [total for event in _events(profile.profiler.kineto_results.experimental_event_tree())
              if (total := getattr(event.extra_fields, "total_allocated", None)) is not None]  # fmt: skip
    return int(max(totals) - totals[0])


def _events(tree: Any) -> Iterator[Any]:
    for event in tree:
        yield event
        yield from _events(event.children)


@pytest.mark.parametrize(("recipe", "windows", "window"), [("distill", 64, 128), ("cpt", 1, 8192)])
def test_more_tokens_than_are_measured_lie_on_a_line(
    make_checkpoint: MakeCheckpoint, recipe: str, windows: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many short windows at once, or a long one; a chunk of logits is as little of the step as in real models."""
    monkeypatch.setattr("restore.vocabulary.LOGIT_ROWS", 64)
    monkeypatch.setattr("restore.plan.Plan.windows_at_once", lambda *_: windows)
    base = read_config(make_checkpoint("llama3", max_position_embeddings=2048, **SHAPE))
    config, rope = planned(base, target_length=8192, recipe=recipe, window=min(window, 2048), long_window=window)
    measured = forecast(base, rope, config)
    monkeypatch.setattr("restore.forecast._LONGEST_MEASURED", 2048)
    assert forecast(base, rope, config).step_bytes == pytest.approx(measured.step_bytes, rel=0.02)


@pytest.mark.parametrize("family", ["llama-tied", "mistral", "qwen3"])
def test_a_forecast_needs_no_weights_and_grows_with_the_layers(make_checkpoint: MakeCheckpoint, family: str) -> None:
    base = read_config(make_checkpoint(family))
    config, rope = planned(base, target_length=512)
    needed = forecast(base | {"num_hidden_layers": 40}, rope, config)
    assert needed.peak_bytes > forecast(base, rope, config).peak_bytes
    assert min(needed.weights_bytes, needed.trained_bytes, needed.step_bytes) > 0


def test_a_searched_table_takes_what_yarn_takes(make_checkpoint: MakeCheckpoint) -> None:
    """transformers chooses one of longrope's lists by the positions of a batch, which a forecast has not; ours are one list."""
    base = read_config(make_checkpoint("llama3"))
    factors = (1.0,) * (head_dim(base) // 4) + (8.0,) * (head_dim(base) // 4)
    yarn, searched = (
        forecast(base, rope, config)
        for config, rope in (planned(base), planned(base, rope_type="longrope", rope_factors=factors))
    )
    assert searched == yarn


@pytest.mark.fault("R11")
def test_a_run_that_cannot_fit_is_refused_before_it_starts(
    make_checkpoint: MakeCheckpoint, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A window of 16M tokens through 64 layers: half a terabyte, on this machine as it is."""
    model = make_checkpoint("llama3", num_hidden_layers=64, hidden_size=256)
    words = ["restore", str(model), "--data", str(texts), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*words, "--target-length", str(2**24), "--long-window", str(2**24)]) == 5
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cpu: this run needs about" in said
    assert "GB are free; --window 128 --long-window " in said
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_an_estimate_needs_a_config_alone(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_checkpoint("llama3", num_hidden_layers=3)
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    assert main(["restore", str(tmp_path), "--target-length", "512", "--estimate"]) == 0
    said = capsys.readouterr().out
    config, rope = planned(read_config(model), target_length=512, rank=128)
    assert f"{forecast(read_config(model), rope, config).peak_bytes / 2**20:,.2f} MiB" in said
    assert "128 to 512 tokens" in said
    measured = fit.measuring(read_config(model), forecast(read_config(model), rope, config).weights_bytes, EVALUATION)
    assert f"{measured.peak_bytes / 2**20:,.2f} MiB" in said
    assert main(["restore", str(tmp_path), "--target-length", "512", "--estimate", "--no-evaluate"]) == 0
    assert "afterwards" not in capsys.readouterr().out


@pytest.mark.fault("R19")
def test_out_of_memory_in_a_step_is_one_line_with_sizes(make_checkpoint: MakeCheckpoint, texts: Path, tmp_path: Path) -> None:
    model = make_checkpoint("llama3", vocab_size=200_000, max_position_embeddings=1024)
    words = ["restore", str(model), "--data", str(texts), "--out", str(tmp_path / "out"), "--device", "cpu", "--rank", "4"]
    words += ["--target-length", "2048", "--long-window", "1024", "--validation-share", "0.3"]
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(STARVED), *words], capture_output=True, text=True, check=False)
    said = run.stderr.splitlines()[-1]
    assert run.returncode == 5, said
    assert "out of memory" in said
    assert said.endswith(
        "with windows of 1024 and 1024 tokens and rank 4; about half is needed with --window 512 --long-window 512"
    )
