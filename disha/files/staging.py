"""Writing a folder whole or not at all: beside its place first, then moved there in one step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disha.errors import AdapterIOError, DishaError
from disha.files.atomic import Temporary, clear_leftovers, sync_names

__all__ = ["staged_folder"]


@contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a new empty folder, which takes the place of `target` when the block ends well.

    When the block raises, the new folder goes and what was there stays. What a killed process left
    is cleared by the next one that writes to the same place. Killed between the two renames that
    replace a folder, it leaves none there, and the former one whole as `former` in its temporary
    folder; the next one puts that back first.

    Args:
        target: where the folder is to be; its parent exists.
        overwrite: let a folder that is there and not empty go.

    Raises:
        AdapterIOError: it can't be written, or is there and not empty.
    """
    target = Path(os.path.realpath(target))
    clear_leftovers(target, is_folder=True)
    try:
        _check_room(target, overwrite)
        temporary = Temporary.beside(target)
    except OSError as error:
        if isinstance(error, DishaError):
            raise
        raise AdapterIOError(f"can't write to {target.parent}: {error.strerror}") from error
    try:
        temporary.new.mkdir()
        yield temporary.new
        _finish(temporary)
        _place(temporary, overwrite)
    except BaseException as error:
        temporary.put_back_and_discard()
        if isinstance(error, DishaError) or not isinstance(error, OSError):
            raise
        raise AdapterIOError(
            f"can't write {target}: {error.strerror or error}; what was there is unchanged"
        ) from error
    _confirm(temporary)


def _check_room(target: Path, overwrite: bool) -> None:
    """Refuse what can't be replaced before any work is done; a former folder may be back."""
    if target.exists() and not os.access(target, os.W_OK):
        raise AdapterIOError(
            f"can't write {target}: it is read-only; allow writing, or name another"
        )
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise AdapterIOError(
            f"can't write {target}: it is not empty; name another folder, or let it be replaced"
        )


def _finish(temporary: Temporary) -> None:
    """Let the new folder be what it will be: its permissions set, all its names on the disk."""
    if temporary.target.exists():
        os.chmod(temporary.new, temporary.target.stat().st_mode & 0o777)
    for folder, _, _ in os.walk(temporary.new):
        sync_names(Path(folder))


def _place(temporary: Temporary, overwrite: bool) -> None:
    """Put the new folder in the place of another, or where there is none, or an empty one."""
    if overwrite and temporary.target.exists():
        temporary.take()
    temporary.become()


def _confirm(temporary: Temporary) -> None:
    """Delete the former folder as soon as the disk has the name of the new one."""
    try:
        sync_names(temporary.target.parent)
    except OSError as error:
        kept = ""
        if temporary.former.exists():
            kept = f"; what was there is in {temporary.former}"
            temporary.unlock()
        else:
            temporary.discard()
        raise AdapterIOError(
            f"written to {temporary.target}, but the disk has not confirmed its name: "
            f"{error.strerror or error}; write it again before you rely on it{kept}"
        ) from error
    temporary.discard()
