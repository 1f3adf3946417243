"""Writing files whole or not at all: no path ever leads to a part of one.

A file is filled in a temporary folder beside its place, brought to the disk, and renamed into its
place. A folder, because what fills the file may use temporary files of its own.
It is locked as long as its process lives. So the next save of the same file can tell what a killed
one has left behind, and clears it away: however many saves are killed, no more is left than what
one of them leaves. Where there are no locks, nothing is cleared.

`staging` does the same for whole folders, with the same temporary folders.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from disha.errors import AdapterIOError, ArgumentTypeError, DishaError

__all__ = [
    "PathLike",
    "Temporary",
    "checked_path",
    "clear_leftovers",
    "sync_names",
    "write_whole",
    "write_whole_folder",
]

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

    The last-named file is away while the others take their places. So a process that is killed at
    that moment leaves none, and never one that goes with other files than it did.

    Args:
        folder: made if it is not there; its parent exists. Other files in it stay.
        files: name -> what fills it. They take their places in this order: name the one last
            that makes a reader look for the others.

    Raises:
        AdapterIOError: something can't be written; what was there is unchanged, or the error says
            what is not.
    """
    if folder.exists() and not folder.is_dir():
        raise AdapterIOError(f"can't save to {folder}: it is a file; name a folder")
    made = not folder.exists()
    try:
        _make(folder)
        _replace_all({folder / name: write for name, write in files.items()})
    except BaseException:
        if made:
            with suppress(OSError):  # somebody else has put something into it
                folder.rmdir()
        raise


def _make(folder: Path) -> None:
    """Make a folder if it is not there, and let its name reach the disk."""
    if folder.exists():
        return
    try:
        folder.mkdir(exist_ok=True)
        sync_names(folder.parent)
    except OSError as error:
        raise AdapterIOError(f"can't make the folder {folder}: {error.strerror}") from error


def _replace_all(files: Mapping[Path, Write]) -> None:
    targets = {path: _regular_target(path) for path in files}
    staged: dict[Path, Temporary] = {}
    placed: list[Path] = []
    current = next(iter(files))
    try:
        for current, write in files.items():
            clear_leftovers(targets[current])
            staged[current] = temporary = Temporary.beside(targets[current])
            write(str(temporary.new))
            os.chmod(temporary.new, _permissions(temporary))
            _sync(temporary.new)
        _take_last([*staged.values()])
        for current, temporary in staged.items():
            if placed:  # should the power fail, they have come in this order
                sync_names(targets[placed[-1]].parent)
            temporary.become()
            placed.append(current)
    except OSError as error:
        if isinstance(error, DishaError) and not placed:
            raise
        raise AdapterIOError(
            f"can't save to {current}: {error.strerror or error}; what was there is unchanged"
            f"{_changed(staged, placed)}"
        ) from error
    finally:
        _clean_up([*staged.values()])
    for parent in {target.parent for target in targets.values()}:
        _confirm_names(parent)


def _take_last(temporaries: Sequence[Temporary]) -> None:
    """Take the last file away, while others take their places that it does not go with."""
    *others, last = temporaries
    if others and last.target.exists():
        last.take()
        sync_names(last.target.parent)


def _changed(staged: Mapping[Path, Temporary], placed: Sequence[Path]) -> str:
    """Return the exceptions from "what was there is unchanged"."""
    if not placed:
        return ""
    new = f", but for {', '.join(map(str, placed))}, new already"
    gone = [str(path) for path, temporary in staged.items() if temporary.has_taken()]
    return new + (f", and {', '.join(gone)}, gone; save again" if gone else "")


def _clean_up(temporaries: Sequence[Temporary]) -> None:
    """Discard all; but if nothing has taken its place yet, put back what was taken away."""
    # As the disk tells it: an interruption may come between a rename and any note of it.
    if all(temporary.new.exists() for temporary in temporaries):
        discard = Temporary.put_back_and_discard
    else:
        discard = Temporary.discard
    for temporary in temporaries:
        discard(temporary)


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
class Temporary:
    """A folder for what is being filled, locked as long as this process lives.

    Attributes:
        target: the file or folder that is to be.
        folder: beside it.
        descriptor: what holds the lock; None where there are no locks.
    """

    target: Path
    folder: Path
    descriptor: int | None

    @classmethod
    def beside(cls, target: Path) -> Temporary:
        """Make one for a target; raise OSError if that can't be."""
        # What takes the place of another file is nobody else's business until it has that one's
        # permissions.
        mode = 0o700 if target.exists() else 0o777
        while True:
            folder = target.parent / f"{_prefix(target)}{secrets.token_hex(8)}.tmp"
            folder.mkdir(mode)
            if fcntl is None:
                return cls(target, folder, None)
            # As long as it is not locked, another save may take it for a dead one's and clear it.
            try:
                descriptor = _opened(folder)
            except FileNotFoundError:
                continue
            except OSError:
                folder.rmdir()
                raise
            if _lock(descriptor) is not False and folder.exists():
                return cls(target, folder, descriptor)
            os.close(descriptor)

    @property
    def new(self) -> Path:
        """Where it is to be filled."""
        return self.folder / "new"

    @property
    def former(self) -> Path:
        """Where that goes which is taken away."""
        return self.folder / "former"

    def take(self) -> None:
        """Take what is in the target's place away."""
        os.rename(self.target, self.former)

    def has_taken(self) -> bool:
        """Whether the target's place is empty because it was taken away."""
        return os.path.lexists(self.former) and not os.path.lexists(self.target)

    def become(self) -> None:
        """Let what is new take the target's place."""
        os.replace(self.new, self.target)

    def put_back(self) -> None:
        """Put back what was taken away, if its place is empty."""
        if self.has_taken():
            os.rename(self.former, self.target)
            sync_names(self.target.parent)

    def put_back_and_discard(self) -> None:
        """Put back what was taken away if its place is empty, and discard the rest.

        Raises:
            AdapterIOError: it can't be put back; it stays where it was taken to.
        """
        try:
            self.put_back()
        except OSError as error:
            if self.has_taken():
                self.unlock()
                raise AdapterIOError(
                    f"can't put {self.target} back: {error.strerror}; it is whole, move it there "
                    f"from {self.former}"
                ) from error
        self.discard()

    def discard(self) -> None:
        """Remove the folder with what is in it, and unlock it."""
        with suppress(OSError):
            self.remove()
        self.unlock()

    def remove(self) -> None:
        """Remove the folder with what is in it; raise OSError if that can't be."""
        if os.path.lexists(self.former):  # killed meanwhile, a part of it must not be put back
            os.rename(self.former, self.folder / "removed")
        shutil.rmtree(self.folder)

    def unlock(self) -> None:
        """Leave the folder to the next one that clears."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _opened(folder: Path) -> int:
    """Open a folder, and nothing that has taken its place: no link, no pipe."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


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


def clear_leftovers(target: Path, *, is_folder: bool = False) -> None:
    """Remove what those have left that were killed while they wrote to the same target.

    Args:
        target: where they were to write.
        is_folder: the target is a folder. Where it is not there because one was killed while it
            replaced it, the former one is put back. Without this, no folders are removed.
    """
    if fcntl is None:
        return
    pattern = re.compile(re.escape(_prefix(target)) + r"[0-9a-f]{16}\.tmp")
    names: list[str] = []
    with suppress(OSError):  # one may write into a folder and not look
        names = os.listdir(target.parent)
    for name in filter(pattern.fullmatch, names):
        with suppress(OSError):  # not ours to remove, or gone already
            _clear(target.parent / name, target if is_folder else None)


def _clear(leftover: Path, target_folder: Path | None = None) -> None:
    descriptor = _opened(leftover)
    try:
        if not _lock(descriptor):
            return
        if target_folder is None:
            _remove(leftover)
        else:
            temporary = Temporary(target_folder, leftover, None)
            temporary.put_back()
            temporary.remove()
    finally:
        os.close(descriptor)


def _remove(leftover: Path) -> None:
    # Not what is deeper: no save of a file makes that.
    for entry in os.listdir(leftover):
        os.unlink(leftover / entry)
    leftover.rmdir()


def _permissions(temporary: Temporary) -> int:
    """Return the mode that a file is to have: the replaced one's, or what a new one would get.

    The owner is made the replaced one's too, as far as that is allowed.
    """
    if not temporary.target.exists():
        return temporary.folder.stat().st_mode & 0o666
    old, new = temporary.target.stat(), temporary.new.stat()
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        with suppress(OSError):
            os.chown(temporary.new, old.st_uid, old.st_gid)
    return old.st_mode & 0o777


def _sync(path: Path) -> None:
    """Let a file, or a folder with its names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_names(folder: Path) -> None:
    """Let the names in a folder reach the disk, where a folder can be asked to.

    Raises:
        OSError: they don't.
    """
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise


def _confirm_names(folder: Path) -> None:
    try:
        sync_names(folder)
    except OSError as error:
        raise AdapterIOError(
            f"saved to {folder}, but the disk has not confirmed the new name: "
            f"{error.strerror or error}; save again before you rely on it"
        ) from error
