"""Writing a folder whole or not at all: beside its place first, then moved there in one step."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from disha.errors import AdapterIOError, DishaError

__all__ = ["staged_folder"]

UNFINISHED = ".unfinished"
FORMER = ".former"


@contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a new empty folder beside `target`, which takes its place when the block ends well.

    When the block raises, the new folder goes and what was there stays. What a killed process left
    is cleared by the next one that writes to the same place; killed between the two renames that
    replace a folder, it leaves the former one beside its place, as `.<name>.*.former`.

    Args:
        target: where the folder is to be; its parent exists.
        overwrite: let a folder that is there and not empty go.

    Raises:
        AdapterIOError: it can't be written, or is there and not empty.
    """
    target = Path(os.path.realpath(target))
    try:
        _clear_unfinished(target)
        staged = Path(tempfile.mkdtemp(UNFINISHED, f".{target.name}.", target.parent))
        lock = _locked(staged)
    except OSError as error:
        raise AdapterIOError(f"can't write to {target.parent}: {error.strerror}") from error
    try:
        yield staged
        os.chmod(staged, _permissions(target))
        os.fsync(lock)
        _move(staged, target, overwrite)
    except OSError as error:
        if isinstance(error, DishaError):
            raise
        raise AdapterIOError(
            f"can't write {target}: {error.strerror or error}; what was there is unchanged"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        os.close(lock)


def _move(staged: Path, target: Path, overwrite: bool) -> None:
    """Put a folder in the place of another, or where there is none, or an empty one."""
    former = None
    if overwrite and target.exists():
        former = Path(tempfile.mkdtemp(FORMER, f".{target.name}.", target.parent))
        os.rename(target, former)
    try:
        os.rename(staged, target)
    except OSError:
        if former is not None:
            os.rename(former, target)
        raise
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)
    _sync(target.parent)


def _clear_unfinished(target: Path) -> None:
    """Delete what processes that are no more have left of this folder."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{UNFINISHED}"):
        with suppress(OSError):  # still being written, or not ours to delete
            lock = _locked(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int:
    """Return a descriptor that holds the lock of a folder as long as this process lives."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _permissions(target: Path) -> int:
    """The mode of the folder that is replaced, or else what a new one would get."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o777 & ~mask


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
