"""An export that is killed, or whose disk fails, at any moment: the old one or the new one is there, whole."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers_forks import Forks

from ard_serve import artifact

MakeCheckpoint = Callable[..., Path]

EXPORT = """
    import os, signal, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from ard_serve.artifact import RecipeRecord
    from restore.export import Assessment, Provenance, Reference, export
    from restore.inspection import inspect
    from restore.loading import load
    from restore.rope import plan_rope

    base = inspect(Path(sys.argv[1]))
    plan = plan_rope(base.config, 512)
    recipe = RecipeRecord(name="default", objectives={}, trainable="lora", steps=1, tokens=1, seed=0)
    ids = torch.arange(3, 35)[None]

    @torch.no_grad()
    def run(value, out):
        value, out = float(value), Path(out)
        def delta(name):
            return torch.full(base.tensors[name].shape, value) if "q_proj.weight" in name else None
        model = load(base.folder, torch.float32, config=plan.target_config(base.config))
        for name, parameter in model.named_parameters():
            parameter += 0 if delta(name) is None else delta(name)
        reference = Reference(ids, model(ids).logits, torch.float32)
        os.kill(os.getpid(), signal.SIGSTOP)
        export(base, plan, delta, out, Provenance(str(value), recipe), reference=reference,
               assess=lambda folder: Assessment("card"), compare_vllm=False)
"""


@pytest.fixture(scope="module")
def forks(make_checkpoint: MakeCheckpoint) -> Iterator[Forks]:
    server = Forks(EXPORT, str(make_checkpoint("llama3", "60KB")))
    yield server
    server.close()


def whole_export(out: Path) -> float:
    """What was added to the base in the export at `out`, which must be whole."""
    manifest = artifact.read_manifest(out)
    assert manifest is not None
    artifact.verify(out, manifest)
    return float(manifest.base.name)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.timing
@pytest.mark.fault("E1")
def test_kill_at_any_time_leaves_the_old_export_or_the_new(forks: Forks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pid = forks.start(0.0, out)
    started = time.monotonic()
    assert forks.finish(pid) == 0
    writing_s = time.monotonic() - started
    killed = 0
    for moment in range(12):
        old = whole_export(out)
        died = forks.kill_after(forks.start(old + 1 / 64, out), writing_s * moment / 12) == -signal.SIGKILL
        assert whole_export(out) in (old, old + 1 / 64)
        killed += died
        writing_s *= 1 if died else 0.7  # The first export was a slow one: aim earlier.
    assert killed >= 3
    assert forks.finish(forks.start(1.0, out)) == 0
    assert whole_export(out) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the next export removes what the killed ones left"


@pytest.mark.fault("E1")
def test_kill_at_each_system_call_that_publishes(forks: Forks, tmp_path: Path) -> None:
    """strace kills the export at chosen calls: the old one is there until the exchange, the new one from then on."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    out = tmp_path / "out"
    assert forks.finish(forks.start(0.0, out)) == 0
    synced = len(snapshot(out)) + 1
    before = ["mkdir:signal=KILL", "fsync:signal=KILL:when=1", "fsync:signal=KILL:when=5", f"fsync:signal=KILL:when={synced}"]
    # With an error the call itself is not done: the process dies just before the exchange.
    before.append("renameat2:error=EINTR:signal=KILL")
    after = [f"fsync:signal=KILL:when={synced + 1}", "unlinkat:signal=KILL:when=1", "unlinkat:signal=KILL:when=3"]
    for fault in (*before, *after):
        old = whole_export(out)
        assert forks.finish(forks.start(old + 1, out), fault) == -signal.SIGKILL, fault
        assert whole_export(out) == (old if fault in before else old + 1), fault
        for leftover in tmp_path.glob(".out.tmp-*"):
            shutil.rmtree(leftover)


@pytest.mark.fault("R12")
@pytest.mark.parametrize("fault", ["write:error=ENOSPC", "fsync:error=EIO:when=4", "renameat2:error=EROFS"])
def test_disk_that_fails_leaves_the_old_export(forks: Forks, tmp_path: Path, fault: str) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    out = tmp_path / "out"
    assert forks.finish(forks.start(0.0, out)) == 0
    before = snapshot(out)
    pid = forks.start(1.0, out)
    shard = tmp_path / f".out.tmp-{pid}" / "model-00002-of-00007.safetensors"
    assert forks.finish(pid, fault, shard if fault.startswith("write") else None) == 5
    assert snapshot(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
