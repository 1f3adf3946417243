"""Let operations on files fail, one after another, or let the process die at one of them.

All files below a folder are opened by `_pyio`, Python's slow twin of `io`. It does everything by
functions of `os`, so each read and write is a call that can fail. What C or Rust code does with
files by itself does not fail.
"""

from __future__ import annotations

import _pyio
import builtins
import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["CODES", "Faults", "Killed"]

CODES = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT)

BY_PATH = (
    *("open", "stat", "lstat", "readlink", "listdir", "scandir", "mkdir", "rmdir", "unlink"),
    *("remove", "rename", "replace", "chmod", "chown", "link", "symlink", "truncate"),
)
BY_DESCRIPTOR = ("read", "write", "fsync", "close", "fstat", "lseek", "ftruncate", "sendfile")
REMOVING = ("rmdir", "unlink", "remove")


class Killed(BaseException):
    """What SIGKILL looks like to the files: nothing is done after it."""


class Faults:
    """Counts the operations on files below a folder, and lets some fail.

    Args:
        folder: what lies below it is watched.
        at: the number of the operation that fails, from 0; None for none.
        code: the number of its error. None kills: nothing is done from there on.
        lasting: let all later operations fail too.
    """

    def __init__(
        self, folder: Path, at: int | None = None, code: int | None = None, lasting: bool = False
    ) -> None:
        self._folder, self._at, self._code = str(folder), at, code
        self._lasting = lasting or code is None
        self.done: list[str] = []
        """The operations so far: name and path."""
        self._open: dict[int, str] = {}
        self._files: list[Any] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Faults]:
        """Let operations fail in the block."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            for name in (*BY_PATH, *BY_DESCRIPTOR):
                stack.enter_context(mock.patch.object(os, name, self._failing(name)))
            opening = self._opening(io.open)
            stack.enter_context(mock.patch.object(io, "open", opening))
            stack.enter_context(mock.patch.object(builtins, "open", opening))
            yield self

    @property
    def failed(self) -> str | None:
        """The operation that failed first."""
        happened = self._at is not None and self._at < len(self.done)
        return self.done[self._at] if happened else None  # type: ignore[index]

    def _failing(self, name: str) -> Callable[..., Any]:
        right = getattr(os, name)

        def operation(what: Any, *arguments: Any, **options: Any) -> Any:
            path = self._path(what, options.get("dir_fd", options.get("src_dir_fd")))
            if path is None:
                return right(what, *arguments, **options)
            try:
                self._count(f"{name} {path}")
            except OSError:
                if name == "close":  # the descriptor is gone even so
                    self._open.pop(what, None)
                    right(what)
                raise
            if name == "fsync":  # which takes time, and nobody pulls the plug
                return None
            result = right(what, *arguments, **options)
            if name == "open":
                self._open[result] = path
            elif name == "close":
                self._open.pop(what, None)
            return result

        return operation

    def _opening(self, right: Callable[..., Any]) -> Callable[..., Any]:
        def opening(file: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(file, int) or self._path(file, None) is None:
                return right(file, *arguments, **options)
            opened = _pyio.open(file, *arguments, **options)
            self._files.append(opened)
            return opened

        return opening

    def _path(self, what: Any, folder: int | None) -> str | None:
        """Return the path of what is below the folder, else None."""
        if isinstance(what, int):
            return self._open.get(what)
        path = os.path.join(self._open.get(folder, "") if folder else "", os.fsdecode(what))
        path = os.path.abspath(path)
        return path if path == self._folder or path.startswith(f"{self._folder}/") else None

    def _count(self, operation: str) -> None:
        self.done.append(operation)
        number = len(self.done) - 1
        if self._at is None or number < self._at or (number > self._at and not self._lasting):
            return
        if self._code is None:
            raise Killed(operation)
        raise OSError(self._code, os.strerror(self._code), operation.partition(" ")[2])

    def _close(self) -> None:
        """Close what is still open, as the end of a process does."""
        for file in self._files:
            while hasattr(file, "buffer") or hasattr(file, "raw"):
                file = file.buffer if hasattr(file, "buffer") else file.raw
            if not file.closed:
                self._open.pop(file.fileno(), None)
                file.close()
        for descriptor in self._open:
            os.close(descriptor)
