"""Lock an output folder for one run, so that two runs never write to it at once.

The operating system holds the lock on a file in the folder, and frees it when the process ends,
even if it is killed. The file says who holds it. It is removed at the end of the run.

A lock acts between all processes of a machine, and between machines where the network file system
supports it, as NFS does. If a file system has no locks, a warning says so.
"""

from __future__ import annotations

import errno
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from disha.finetune.errors import OutputError
from disha.text import tell

__all__ = ["LOCK", "FolderLock", "is_at"]

LOCK = ".disha-run.lock"

LONGEST_NOTE = 500
"""How many bytes of the note of another run are shown."""

ATTEMPTS = 100
"""How often to try. Between two steps, another run may remove the file or the folder."""

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""The errors of a file system that has no locks."""


class FolderLock:
    """The lock of an output folder.

    Args:
        folder: the folder; it is made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / LOCK
        self._is_wanted = False
        self._file: FileIO | None = None
        self._made: list[Path] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock during the block. Then remove the folders that it made, if they are empty.

        Raises:
            OutputError: another run holds it, or the folder can't be written.
        """
        self._take()
        self._is_wanted = True
        try:
            yield
        finally:
            self._is_wanted = False
            self._release()

    def keep(self) -> None:
        """If the folder was deleted, make it again and lock it. Call this before writing.

        Outside `held`, it does nothing.

        Raises:
            OutputError: another run has taken the folder meanwhile, or it can't be written.
        """
        if not self._is_wanted or (self._file is not None and is_at(self._path, self._file)):
            return
        if not self.folder.exists():
            _warn(
                f"{self.folder} was deleted while this run writes to it. It is made again. The "
                "earlier checkpoints are lost"
            )
        self._close()
        self._take()

    def _take(self) -> None:
        try:
            self._file = self._locked()
        except BlockingIOError as error:
            raise OutputError(
                f"--output_dir {self.folder} is in use by another run: {self._holder()}; wait "
                "until it has ended, or stop it, or name another folder"
            ) from error
        except OSError as error:
            raise OutputError(
                f"--output_dir {self.folder} can't be written: {error.strerror}"
            ) from error

    def _locked(self) -> FileIO:
        """Open and lock the file, and write who holds it."""
        for attempt in range(ATTEMPTS):
            try:
                self._make_folder()
                file = FileIO(self._path, "a+")
            except (FileNotFoundError, FileExistsError):
                # Another run may have just removed the empty folder. If it does so within mkdir,
                # the folder first exists and then does not.
                if attempt == ATTEMPTS - 1:
                    raise
                continue
            try:
                _lock(file, self.folder)
                # Another run may have removed the file between opening and locking it.
                if is_at(self._path, file):
                    file.truncate(0)
                    file.write(_note().encode())
                    _held.add(file)
                    return file
            finally:
                if file not in _held:
                    file.close()
        raise BlockingIOError

    def _make_folder(self) -> None:
        missing = [one for one in (self.folder, *self.folder.parents) if not one.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = missing + [one for one in self._made if one not in missing]

    def _holder(self) -> str:
        with suppress(OSError), open(self._path, "rb") as file:
            note = file.read(LONGEST_NOTE).decode(errors="replace").strip()
            return note or "it has just begun"
        return "it has just ended"

    def _release(self) -> None:
        if self._file is None:
            return
        with suppress(OSError):  # Windows removes no open file, so there it stays
            if is_at(self._path, self._file):
                self._path.unlink()
        self._close()
        with suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()

    def _close(self) -> None:
        if self._file is not None:
            _held.discard(self._file)
            self._file.close()
            self._file = None


def _note() -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return (
        f"process {os.getpid()} on {platform.node()}, since {started}, "
        f"started by: {shlex.join(sys.argv)}"
    )


def is_at(path: Path, file: FileIO) -> bool:
    """Return whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _warn(message: str) -> None:
    tell(f"disha: warning: {message}", sys.stderr)


# --- the system's locks --------------------------------------------------------------------------

_held: set[FileIO] = set()


def _close_copies() -> None:
    """Close the files that a forked process inherits. They would keep the lock after its parent."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies)


def _lock(file: FileIO, folder: Path) -> None:
    """Lock a file, or raise BlockingIOError if another process holds its lock."""
    try:
        _lock_without_waiting(file)
    except PermissionError as error:  # what Windows and some file systems answer
        raise BlockingIOError(*error.args) from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        _warn(f"the file system of {folder} has no locks: let no other run write to it")


if sys.platform == "win32":
    import msvcrt

    def _lock_without_waiting(file: FileIO) -> None:
        file.seek(1 << 30)  # a byte that others need not read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock_without_waiting(file: FileIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
