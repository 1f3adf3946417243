"""Write files and folders completely or not at all.

New content is written to a temporary folder beside its target, synced to the disk, and renamed to
the target. A temporary folder is locked while its writer lives. So the next write to the same
target can recognise the leftovers of a killed writer, and clears them. Without locks (Windows, some
network file systems), nothing is cleared.

Replacing a folder, or a set of files, takes more than one rename. The last target is then first
moved to `old`, beside `new`. A writer that is killed in between leaves a complete `new` and no
target. In that case, the next write first moves `new` to the target.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from disha.errors import AdapterIOError, ArgumentTypeError, DishaError

__all__ = ["PathLike", "Write", "checked_path", "write_files", "write_folder"]

PathLike = str | os.PathLike[str]

Write = Callable[[str], object]
"""Writes a file at the given path; raises OSError if it can't."""


def checked_path(path: object) -> Path:
    """Return a path as a `Path`; raise if its type or name is invalid."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ArgumentTypeError(
            f"path must be a str or a pathlib.Path, got {path!r} of type {type(path).__name__}"
        )
    try:
        os.fspath(path).encode()  # safetensors reads no other names
        with suppress(FileNotFoundError):  # the caller reports a missing file
            os.stat(path)
    except (OSError, ValueError) as error:
        raise AdapterIOError(f"{str(path)[:80]!r} can't be a file here: {error}") from error
    return Path(path)


def write_files(files: Mapping[PathLike, Write]) -> None:
    """Write one or several files. No target is replaced before all new files are complete.

    Several files are replaced in the given order, and the last one is absent meanwhile. So give the
    file last by which a reader finds the others. Then a killed process never leaves this file
    beside files of another save.

    Args:
        files: path -> function that writes the file. It gets a temporary path as str. Folders must
            exist. A symbolic link stays, and its target is replaced; a replaced file keeps its
            permissions and its owner.

    Raises:
        AdapterIOError: a file can't be written. What was there is unchanged, or the error says
            what has changed.

    Examples:
        >>> import pathlib, tempfile
        >>> from disha.files import write_files
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "notes.txt")
        ...     write_files({path: lambda temporary: pathlib.Path(temporary).write_text("done")})
        ...     path.read_text()
        'done'
    """
    targets = [_resolved(path) for path in files]
    with _replacing(targets, _check_file, take_away=len(targets) > 1) as temporaries:
        for temporary, write in zip(temporaries, files.values(), strict=True):
            write(str(temporary.new))
            _set_permissions(temporary)
            _sync(temporary.new)


@contextmanager
def write_folder(target: PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder: yield an empty temporary folder, which the block fills.

    At the end of the block, the new folder replaces `target`. If the block raises, the new folder
    is deleted, and `target` is unchanged.

    Args:
        target: path of the folder. Its parent must exist.
        overwrite: replace a folder that is not empty, with everything in it.

    Raises:
        AdapterIOError: the folder can't be written, or is not empty and `overwrite` is not set.
            What was there is unchanged.

    Examples:
        >>> import pathlib, tempfile
        >>> from disha.files import write_folder
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with write_folder(pathlib.Path(parent, "run")) as folder:
        ...         _ = (folder / "notes.txt").write_text("done")
        ...     pathlib.Path(parent, "run", "notes.txt").read_text()
        'done'
    """

    def check(path: Path) -> None:
        _check_folder(path, overwrite)

    with _replacing([_resolved(target)], check, take_away=overwrite) as [temporary]:
        temporary.new.mkdir()
        yield temporary.new
        if temporary.target.exists():
            temporary.new.chmod(temporary.target.stat().st_mode & 0o777)
        for folder, _, names in os.walk(temporary.new):
            for name in names:
                _sync(Path(folder, name))
            _sync_names(Path(folder))


def _resolved(path: PathLike) -> Path:
    return Path(os.path.realpath(checked_path(path)))


def _check_file(target: Path) -> None:
    if target.is_dir():
        raise AdapterIOError(f"can't save to {target}: it is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise AdapterIOError(f"can't save to {target}: it is not a regular file; name another")
    _check_writable(target)


def _check_folder(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise AdapterIOError(f"can't save to {target}: it is a file; name a folder")
    _check_writable(target)
    if not overwrite and target.exists() and any(target.iterdir()):
        raise AdapterIOError(
            f"can't save to {target}: it is not empty; name another folder, or allow overwriting"
        )


def _check_writable(target: Path) -> None:
    if not target.parent.is_dir():
        raise AdapterIOError(
            f"can't save to {target}: the folder {target.parent} does not exist; create it first"
        )
    if target.exists() and not os.access(target, os.W_OK):
        raise AdapterIOError(
            f"can't save to {target}: it is read-only; allow writing, or name another"
        )


# --- replacing targets ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Temporary:
    """The temporary folder of one target; writers of several targets share one key."""

    target: Path
    key: str

    @property
    def folder(self) -> Path:
        return self.target.parent / f"{_prefix(self.target)}{self.key}.tmp"

    @property
    def new(self) -> Path:
        """The content that will replace the target."""
        return self.folder / "new"

    @property
    def old(self) -> Path:
        """The former target, moved away while other targets are replaced."""
        return self.folder / "old"

    @property
    def between(self) -> bool:
        """Whether the target is missing because it was moved away."""
        return os.path.lexists(self.old) and not os.path.lexists(self.target)


LONGEST_NAME = 200
"""Longest name of a target, in bytes. File systems allow 255, and temporary names add 22."""


def _prefix(target: Path) -> str:
    name = target.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


@contextmanager
def _replacing(
    targets: Sequence[Path], check: Callable[[Path], None], take_away: bool
) -> Iterator[list[_Temporary]]:
    """Yield a temporary folder for each target, whose `new` replaces the target at the end.

    Args:
        targets: paths without symbolic links.
        check: raises if a target can't be replaced.
        take_away: move the last target away before the first one is replaced.
    """
    _clear_leftovers(targets)
    key = secrets.token_hex(8)
    temporaries = [_Temporary(target, key) for target in targets]
    last, placed = temporaries[-1], list[Path]()
    with ExitStack() as locks:
        try:
            for target in targets:
                check(target)
            for temporary in temporaries:
                locks.callback(_make_locked(temporary))
            yield temporaries
            if take_away and last.target.exists():
                os.rename(last.target, last.old)
                _sync_names(last.target.parent)
            for temporary in temporaries:
                os.replace(temporary.new, temporary.target)
                placed.append(temporary.target)
                _sync_names(temporary.target.parent)
        except BaseException as error:
            _put_back(temporaries)
            if isinstance(error, DishaError) or not isinstance(error, OSError):
                raise
            raise AdapterIOError(
                f"can't save to {last.target}: {error.strerror or error}; "
                f"{_outcome(temporaries, placed)}"
            ) from error
        finally:
            if not last.between:  # otherwise the next write needs these folders
                for temporary in temporaries:
                    shutil.rmtree(temporary.folder, ignore_errors=True)


def _put_back(temporaries: Sequence[_Temporary]) -> None:
    """Put the last target back if it was moved away and no target is replaced yet."""
    last = temporaries[-1]
    if last.between and all(temporary.new.exists() for temporary in temporaries):
        with suppress(OSError):
            os.rename(last.old, last.target)


def _outcome(temporaries: Sequence[_Temporary], placed: Sequence[Path]) -> str:
    if not placed and not temporaries[-1].between:
        return "what was there is unchanged"
    new = f"{', '.join(map(str, placed))} already replaced" if placed else "nothing replaced"
    gone = f", {temporaries[-1].target} missing" if temporaries[-1].between else ""
    return f"{new}{gone}; save again"


def _make_locked(temporary: _Temporary) -> Callable[[], None]:
    """Make a temporary folder and lock it; return a function that unlocks it."""
    # No other user may read new content before it has the permissions of the old content.
    mode = 0o700 if temporary.target.exists() else 0o777
    while True:
        temporary.folder.mkdir(mode)
        if fcntl is None:
            return lambda: None
        # Before it is locked, another writer may think it is a leftover and clear it.
        try:
            descriptor = _opened(temporary.folder)
        except FileNotFoundError:
            continue
        except OSError:
            temporary.folder.rmdir()
            raise
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.folder.exists():
            return lambda: os.close(descriptor)
        os.close(descriptor)


def _opened(folder: Path) -> int:
    """Open a folder; refuse a link or a pipe of that name."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _clear_leftovers(targets: Sequence[Path]) -> None:
    """Remove the leftovers of killed writers of these targets, or finish their replacement."""
    for target in targets if fcntl is not None else ():
        pattern = re.compile(re.escape(_prefix(target)) + r"([0-9a-f]{16})\.tmp")
        names: list[str] = []
        with suppress(OSError):  # a folder that may be written but not listed
            names = os.listdir(target.parent)
        for match in filter(None, map(pattern.fullmatch, names)):
            with suppress(OSError):  # a file of another user, or gone already
                _clear([_Temporary(one, match[1]) for one in targets], _Temporary(target, match[1]))


def _clear(temporaries: Sequence[_Temporary], leftover: _Temporary) -> None:
    """Clear the leftover of one target; first finish the replacement if it was complete."""
    descriptor = _opened(leftover.folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its writer is alive
        if temporaries[-1].between and all(one.folder.is_dir() for one in temporaries):
            for one in temporaries:
                if os.path.lexists(one.new):
                    os.replace(one.new, one.target)
        shutil.rmtree(leftover.folder)
    finally:
        os.close(descriptor)


def _set_permissions(temporary: _Temporary) -> None:
    """Give a new file the permissions and the owner of the one it replaces."""
    if not temporary.target.exists():  # some writers create files that only their owner can read
        os.chmod(temporary.new, temporary.folder.stat().st_mode & 0o666)
        return
    old, new = temporary.target.stat(), temporary.new.stat()
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        with suppress(OSError):  # only root may give a file away
            os.chown(temporary.new, old.st_uid, old.st_gid)
    os.chmod(temporary.new, old.st_mode & 0o777)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Sync the names in a folder to the disk, if the system supports it."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise
