"""A run that is killed at any moment of a save goes on from a whole checkpoint, bit-equal to one that was not disturbed."""

import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers_forks import Forks

from restore import checkpoint, metrics

TRAIN = """
    import json, os, signal, sys
    from pathlib import Path
    import numpy as np
    import torch
    torch.set_num_threads(1)
    from restore.config import RestoreConfig
    from restore.data import TokenStream
    from restore.loading import load
    from restore.model import TwoFaced
    from restore.rope import plan_rope
    from restore.trainer import Trainer

    base = Path(sys.argv[1])

    def run(out):
        config = RestoreConfig(
            model="m", target_length=512, data=("x",), out=out, rank=4, dtype="fp32", window=64, long_window=128,
            batch_tokens=256, steps=5, checkpoint_every=1, validation_every=1, learning_rate=0.01, resume=True,
        )
        rope = plan_rope(json.loads((base / "config.json").read_text()), 512, "yarn")
        faces = TwoFaced(load(base, torch.float32), rope, config)
        pattern = np.tile(np.arange(17, dtype=np.int32) * 13 % 251, 200)
        trainer = Trainer(faces, config, rope, TokenStream(pattern[:2400], 3), TokenStream(pattern[2400:], 1), Path(out))
        os.kill(os.getpid(), signal.SIGSTOP)
        trainer.train()
"""


@pytest.fixture(scope="module")
def forks(make_checkpoint: Callable[..., Path]) -> Iterator[Forks]:
    server = Forks(TRAIN, str(make_checkpoint("llama3")))
    yield server
    server.close()


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]]]:
    """The newest checkpoint's tensors and the losses of every step."""
    newest = checkpoint.load_newest(folder / "checkpoints")
    assert newest is not None
    state, tensors = newest
    assert state.step == 5
    return tensors, [(row["step"], row["loss"]) for row in metrics.read(folder) if "loss" in row]


@pytest.mark.fault("R13")
def test_kill_at_each_system_call_of_a_save(forks: Forks, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    assert forks.finish(forks.start(tmp_path / "whole")) == 0
    # A save makes its folder, syncs tensors, state and folder, renames it into place and syncs the parent; from the third
    # checkpoint on it removes an old one. Each try goes on where the last was killed.
    for fault in ("mkdir:when=2", "fsync:when=1", "fsync:when=3", "rename:error=EINTR", "fsync:when=8", "unlinkat:when=1"):
        call, _, rest = fault.partition(":")
        assert forks.finish(forks.start(tmp_path / "killed"), f"{call}:signal=KILL:{rest}") == -signal.SIGKILL, fault
    assert forks.finish(forks.start(tmp_path / "killed")) == 0
    tensors, losses = result(tmp_path / "killed")
    whole_tensors, whole_losses = result(tmp_path / "whole")
    assert losses == whole_losses
    assert tensors.keys() == whole_tensors.keys()
    assert all(torch.equal(tensors[name], whole_tensors[name]) for name in tensors)


@pytest.mark.fault("R12")
@pytest.mark.parametrize("fault", ["an I/O error", "a limit"])
def test_a_disk_that_fails_keeps_the_last_good_checkpoint(forks: Forks, tmp_path: Path, fault: str) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    out = tmp_path / "run"
    assert forks.finish(forks.start(out), "fsync:signal=KILL:when=5") == -signal.SIGKILL
    pid = forks.start(out)
    if fault == "a limit":
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert forks.finish(pid, "fsync:error=EIO:when=2" if fault == "an I/O error" else None) == 5
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]
    newest = checkpoint.load_newest(out / "checkpoints")
    assert newest is not None
    assert newest[0].step == 1
