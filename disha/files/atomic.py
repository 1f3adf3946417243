"""Writing files whole or not at all: no path ever leads to a part of one.

A file is filled in a temporary folder beside its place, brought to the disk, and renamed into its
place. A folder, because what fills the file may use temporary files of its own (safetensors does).
It is locked as long as its process lives. So the next save of the same file can tell what a killed
one has left behind, and clears it away: however many saves are killed, no more is left than what
one of them leaves. Where there are no locks, nothing is cleared.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from disha.errors import AdapterIOError, ArgumentTypeError

__all__ = ["PathLike", "checked_path", "write_whole", "write_whole_folder"]

PathLike = str | os.PathLike[str]

Write = Callable[[str], None]
"""Fills the file at a path; raises OSError if it can't."""


def checked_path(path: object) -> Path:
    """Return a path that the file system can be asked about."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ArgumentTypeError(
            f"path must be a str or a pathlib.Path, got {path!r} of type {type(path).__name__}"
        )
    try:
        os.fspath(path).encode()  # safetensors reads no other names
        with suppress(FileNotFoundError):  # one to be written, or missed with its own message
            os.stat(path)
    except (OSError, ValueError) as error:
        raise AdapterIOError(f"{str(path)[:80]!r} can't be a file here: {error}") from error
    return Path(path)


def write_whole(path: Path, write: Write) -> None:
    """Let `write` fill a file so that its path never leads to a part of it.

    Args:
        path: where the file is to be; its folder exists. A symbolic link stays, and what it
            leads to is replaced.
        write: fills the file at the path that it is given, another one in the same folder.

    Raises:
        AdapterIOError: it can't be written; what was there is unchanged.
    """
    _replace_all({path: write})


def write_whole_folder(folder: Path, files: Mapping[str, Write]) -> None:
    """Write several files into a folder, each whole, and none before all of them are complete.

    Args:
        folder: made if it is not there; its parent exists. Other files in it stay.
        files: name -> what fills it. They take their places in this order: name the one last
            that makes a reader look for the others.

    Raises:
        AdapterIOError: something can't be written; what was there is unchanged.
    """
    if folder.exists() and not folder.is_dir():
        raise AdapterIOError(f"can't save to {folder}: it is a file; name a folder")
    made = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise AdapterIOError(f"can't make the folder {folder}: {error.strerror}") from error
    try:
        _replace_all({folder / name: write for name, write in files.items()})
    except BaseException:
        if made:
            with suppress(OSError):  # somebody else has put something into it
                folder.rmdir()
        raise


def _replace_all(files: Mapping[Path, Write]) -> None:
    targets = {path: _regular_target(path) for path in files}
    staged: dict[Path, _Temporary] = {}
    placed: list[Path] = []
    current = next(iter(files))
    try:
        for current, write in files.items():
            target = targets[current]
            _clear_leftovers(target)
            staged[current] = temporary = _Temporary.beside(target)
            write(str(temporary.file))
            os.chmod(temporary.file, _permissions(temporary, target))
            _sync(temporary.file)
        for current, temporary in staged.items():
            temporary.become(targets[current])
            placed.append(current)
    except OSError as error:
        new = f", but for {', '.join(map(str, placed))}, new already" if placed else ""
        raise AdapterIOError(
            f"can't save to {current}: {error.strerror or error}; what was there is unchanged{new}"
        ) from error
    finally:
        for temporary in staged.values():
            temporary.discard()
    for parent in {target.parent for target in targets.values()}:
        _sync_names(parent)


def _regular_target(path: Path) -> Path:
    """Return where a file will be, links followed; raise if it can't be there."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise AdapterIOError(f"can't save to {path}: it is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise AdapterIOError(f"can't save to {path}: it is no regular file; name another")
    if target.exists() and not os.access(target, os.W_OK):
        raise AdapterIOError(
            f"can't save to {path}: it is read-only; allow writing, or name another"
        )
    if not target.parent.is_dir():
        raise AdapterIOError(
            f"can't save to {path}: the folder {target.parent} does not exist; create it first"
        )
    return target


# --- temporary folders ---------------------------------------------------------------------------


@dataclass
class _Temporary:
    """A folder for a file that is being filled, locked as long as this process lives."""

    folder: Path
    descriptor: int | None

    @classmethod
    def beside(cls, target: Path) -> _Temporary:
        """Make one for a target."""
        # What takes the place of another file is nobody else's business until it has that one's
        # permissions.
        mode = 0o700 if target.exists() else 0o777
        while True:
            folder = target.parent / f"{_prefix(target)}{secrets.token_hex(8)}.tmp"
            folder.mkdir(mode)
            if fcntl is None:
                return cls(folder, None)
            # As long as it is not locked, another save may take it for a dead one's and clear it.
            try:
                descriptor = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue
            except OSError:
                folder.rmdir()
                raise
            if _lock(descriptor) is not False and folder.exists():
                return cls(folder, descriptor)
            os.close(descriptor)

    @property
    def file(self) -> Path:
        """Where the file is to be filled."""
        return self.folder / "file"

    def become(self, target: Path) -> None:
        """Let the file take the target's place."""
        os.replace(self.file, target)

    def discard(self) -> None:
        """Remove the folder with what is in it, and unlock it."""
        with suppress(OSError):
            _remove(self.folder)
        if self.descriptor is not None:
            os.close(self.descriptor)


def _remove(folder: Path) -> None:
    # Not what is deeper: no save makes that.
    for entry in os.listdir(folder):
        os.unlink(folder / entry)
    folder.rmdir()


def _lock(descriptor: int) -> bool | None:
    """Lock a folder; return False where it is locked already, None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


LONGEST_NAME = 200
"""Of 255 bytes that file systems allow, the rest is for what temporary names have besides."""


def _prefix(target: Path) -> str:
    """Return how the temporary names for a target start."""
    name = target.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


def _clear_leftovers(target: Path) -> None:
    """Remove the temporary folders of saves of the same target that were killed."""
    if fcntl is None:
        return
    pattern = re.compile(re.escape(_prefix(target)) + r"[0-9a-f]{16}\.tmp")
    names: list[str] = []
    with suppress(OSError):  # one may write into a folder and not look
        names = os.listdir(target.parent)
    for name in filter(pattern.fullmatch, names):
        with suppress(OSError):  # not ours to remove, or gone already
            _clear(target.parent / name)


def _clear(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if _lock(descriptor):
            _remove(folder)
    finally:
        os.close(descriptor)


def _permissions(temporary: _Temporary, target: Path) -> int:
    """Return the mode that a file is to have: the replaced one's, or what a new one would get.

    The owner is made the replaced one's too, as far as that is allowed.
    """
    if not target.exists():
        return temporary.folder.stat().st_mode & 0o666
    old, new = target.stat(), temporary.file.stat()
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        with suppress(OSError):
            os.chown(temporary.file, old.st_uid, old.st_gid)
    return old.st_mode & 0o777


def _sync(path: Path) -> None:
    """Let a file, or a folder with its names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Let the names in a folder reach the disk, where a folder can be asked to."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise AdapterIOError(
                f"saved to {folder}, but the disk has not confirmed the new name: "
                f"{error.strerror or error}; save again before you rely on it"
            ) from error
