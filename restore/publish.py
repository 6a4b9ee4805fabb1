"""Put a finished folder in its place in one step: a reader, or a crash, meets the old one or the new one, never a mixture.

The new folder is written beside its place, fsynced, and exchanged with what is there by renameat2(2). Where the file system
cannot exchange (NFS, some overlays), the old folder is first moved aside: a kill between the two renames leaves no folder
at the place, and the next publication puts the old one back.
"""

import ctypes
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ard_serve.errors import ResourceError, UsageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_FILE_MODE, _FOLDER_MODE = 0o644, 0o755
_log = logging.getLogger(__name__)


@contextmanager
def publication(target: Path, marker: str) -> Iterator[Path]:
    """Yield an empty folder; when the block ends well, make it durable, readable by everyone, and the new `target`.

    When the block raises, the folder is removed and `target` is as it was.

    Args:
        target: the folder to publish; its parents are made.
        marker: name of a file that a folder must hold to be replaced, so that a mistyped path destroys nothing.

    Raises:
        UsageError: `target` exists and is neither empty nor an earlier publication.
        ResourceError: the disk is full, fails or refuses.
    """
    target = target.expanduser().resolve()
    _refuse_foreign(target, marker)
    beside = target.parent / f".{target.name}.tmp-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target)
        beside.mkdir()
        with _locked(beside):
            yield beside
            make_durable(beside)
            _swap(beside, target)
            _fsync(target.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise ResourceError(
            f"{error.filename or target}: {error.strerror}; nothing was published, {target} is as it was"
        ) from None
    finally:
        # Before the exchange this is the unfinished folder, after it the one that was replaced.
        shutil.rmtree(beside, ignore_errors=True)


def make_durable(folder: Path) -> None:
    """Open modes to every reader and fsync each file, then each folder, leaves first."""
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            folders.append(path)
        else:
            path.chmod(_FILE_MODE)
            _fsync(path)
    for path in reversed(folders):
        path.chmod(_FOLDER_MODE)
        _fsync(path)


def replace_file(path: Path, content: str) -> None:
    """Replace one file durably and in one step, keeping its mode."""
    mode = path.stat().st_mode if path.exists() else _FILE_MODE
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        beside.write_text(content, encoding="utf-8")
        beside.chmod(mode & 0o777)
        _fsync(beside)
        beside.replace(path)
        _fsync(path.parent)
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror}; the file is as it was") from None
    finally:
        beside.unlink(missing_ok=True)


def _refuse_foreign(target: Path, marker: str) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UsageError(f"{target}: is a file; name a folder that does not exist yet or an earlier export")
    if any(target.iterdir()) and not (target / marker).exists():
        raise UsageError(
            f"{target}: holds files but no {marker}, so it is not replaced; name a new folder or an earlier export"
        )


def _clear_leftovers(target: Path) -> None:
    aside = _aside(target)
    if aside.exists() and not target.exists():
        aside.rename(target)
        _log.warning("%s: put back after an export that was killed", target)
    for leftover in [aside, *target.parent.glob(f".{target.name}.tmp-*")]:
        if leftover.is_dir() and not _is_locked(leftover):
            shutil.rmtree(leftover)
            _log.warning("%s: removed, an export that was killed left it", leftover)


def _swap(beside: Path, target: Path) -> None:
    if not target.exists():
        beside.rename(target)
        return
    try:
        exchange(beside, target)
    except OSError as error:
        if error.errno not in _CANNOT_EXCHANGE:
            raise
        target.rename(_aside(target))
        beside.rename(target)
        shutil.rmtree(_aside(target), ignore_errors=True)


def exchange(one: Path, other: Path) -> None:
    """Let two existing paths trade places atomically, by renameat2(2) with RENAME_EXCHANGE."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the kernel drops with the process: a leftover is a folder that nobody holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_locked(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
