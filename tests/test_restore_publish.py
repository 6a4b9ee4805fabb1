"""A folder is replaced in one step, nothing else is ever replaced, and what killed runs left is cleared."""

import errno
import fcntl
import logging
import os
from pathlib import Path

import pytest

from ard_serve.errors import ResourceError, UsageError
from restore import publish
from restore.publish import publication, replace_file

MARKER = "marker.json"


def put(target: Path, text: str) -> None:
    """Publish a folder whose files all say `text`."""
    with publication(target, MARKER) as folder:
        (folder / MARKER).write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(text)


def read(target: Path) -> tuple[str, str]:
    return (target / MARKER).read_text(), (target / "deep" / "file").read_text()


def test_new_folder_takes_the_place_of_the_old(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "out"
    put(target, "first")
    inode = target.stat().st_ino
    put(target, "second")
    assert read(target) == ("second", "second")
    assert target.stat().st_ino != inode
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    put(tmp_path / "out", "first")
    assert read(tmp_path / "out") == ("first", "first")


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_block_that_raises_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    put(tmp_path / "out", "first")

    def broken() -> None:
        with publication(tmp_path / "out", MARKER) as folder:
            (folder / MARKER).write_text("half")
            raise error

    with pytest.raises(type(error)):
        broken()
    assert read(tmp_path / "out") == ("first", "first")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.fault("E2")
def test_leftover_of_a_killed_run_is_removed_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dead, live = tmp_path / ".out.tmp-1", tmp_path / ".out.tmp-2"
    for folder in (dead, live):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    descriptor = os.open(live, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with caplog.at_level(logging.WARNING):
        put(tmp_path / "out", "first")
    os.close(descriptor)
    assert not dead.exists()
    assert live.exists(), "a run that still goes on keeps its folder"
    assert f"{dead}: removed" in caplog.text


def test_running_publication_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with publication(tmp_path / "out", MARKER) as folder:
        (folder / MARKER).write_text("slow")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        put(tmp_path / "out", "quick")
        assert folder.exists()
    assert (tmp_path / "out" / MARKER).read_text() == "slow"


@pytest.mark.parametrize("kind", ["file", "other files"])
def test_what_is_no_publication_is_never_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "thesis"
    if kind == "file":
        target.write_text("years of work")
    else:
        target.mkdir()
        (target / "chapter.txt").write_text("years of work")
    with pytest.raises(UsageError, match="thesis"):
        put(target, "export")
    assert (target if kind == "file" else target / "chapter.txt").read_text() == "years of work"


def test_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    put(tmp_path / "v1", "first")
    (tmp_path / "current").symlink_to("v1")
    put(tmp_path / "current", "second")
    assert (tmp_path / "current").is_symlink()
    assert read(tmp_path / "v1") == ("second", "second")


def test_file_system_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS answers EINVAL: the old folder is moved aside, and put back if the process dies before the new one is in place."""
    target = tmp_path / "out"

    def refuse(one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, "no exchange")

    monkeypatch.setattr(publish, "exchange", refuse)
    put(target, "first")
    put(target, "second")
    assert read(target) == ("second", "second")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    target.rename(tmp_path / ".out.replaced")
    with pytest.raises(ValueError, match="late"), publication(target, MARKER):
        raise ValueError("late")
    assert read(target) == ("second", "second")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_refused_write_is_one_line_with_exit_code_5(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="nothing was published") as caught:
        put(tmp_path / "file" / "out", "first")
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


def test_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("old")
    path.chmod(0o640)
    replace_file(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]
