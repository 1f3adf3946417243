"""Write files and folders completely or not at all.

Each target gets a *draft*: a temporary folder beside it. The new content is written there as `new`,
synced to the disk, and renamed to the target. The draft is locked while its writer lives. So the
next write to the same target recognises the draft of a killed writer, and clears it. Without locks
(Windows, some network file systems), nothing is cleared.

Replacing a folder, or a set of files, takes more than one rename. So the last target is first moved
*away*, to `old` in its draft. If the writer is killed before `new` is in its place, the next write
finishes the replacement.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from disha.errors import AdapterIOError, ArgumentTypeError, DishaError
from disha.files.reading import Found, explained, found_at, walked

__all__ = [
    "PathLike",
    "Write",
    "checked_path",
    "clear_drafts",
    "remove_folder",
    "resolved",
    "write_files",
    "write_folder",
]

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


def resolved(path: PathLike) -> Path:
    """Return a checked path as an absolute one without symbolic links.

    Raises:
        AdapterIOError: the system can't tell.
    """
    path = checked_path(path)
    with explained(path):
        # Without `strict`, a link that can't be read would count as the file.
        return Path(os.path.realpath(path, strict=found_at(path) is not None))


def write_files(files: Mapping[PathLike, Write]) -> None:
    """Write one or several files. No target is replaced before all new files are complete.

    Several files are replaced in the given order, and the last one is absent meanwhile. So put last
    the file from which a reader learns of the others. Then a killed process never leaves this file
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
    targets = [resolved(path) for path in files]
    with _replacing(targets, _check_file, take_away=len(targets) > 1) as drafts:
        for draft, write in zip(drafts, files.values(), strict=True):
            write(str(draft.new))
            _set_permissions(draft)
            _sync(draft.new)


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

    with _replacing([resolved(target)], check, take_away=overwrite) as [draft]:
        draft.new.mkdir()
        yield draft.new
        if found_at(draft.target):
            draft.new.chmod(draft.target.stat().st_mode & 0o777)
        for folder, _, names in walked(draft.new):
            for name in names:
                _sync(Path(folder, name))
            _sync_names(Path(folder))


def remove_folder(folder: PathLike) -> None:
    """Remove a folder, completely or not at all.

    If the process is killed meanwhile, `clear_drafts` removes the rest.

    Raises:
        AdapterIOError: it can't be removed, and is unchanged.
    """
    draft = _Draft(resolved(folder), secrets.token_hex(8))
    try:
        os.rename(draft.target, draft.folder)
    except OSError as error:
        raise AdapterIOError(f"can't remove {folder}: {error.strerror or error}") from error
    _discard([draft])


def _check_file(target: Path) -> None:
    found = found_at(target)
    if found == "folder":
        raise AdapterIOError(f"can't save to {target}: it is a folder; name a file in it")
    if found == "other":
        raise AdapterIOError(f"can't save to {target}: it is not a regular file; name another")
    _check_writable(target, found)


def _check_folder(target: Path, overwrite: bool) -> None:
    found = found_at(target)
    if found not in ("folder", None):
        raise AdapterIOError(f"can't save to {target}: it is a file; name a folder")
    _check_writable(target, found)
    if not overwrite and found and os.listdir(target):
        raise AdapterIOError(
            f"can't save to {target}: it is not empty; name another folder, or allow overwriting"
        )


def _check_writable(target: Path, found: Found | None) -> None:
    if found_at(target.parent) != "folder":
        raise AdapterIOError(
            f"can't save to {target}: the folder {target.parent} does not exist; create it first"
        )
    if found and not os.access(target, os.W_OK):
        raise AdapterIOError(
            f"can't save to {target}: it is read-only; allow writing, or name another"
        )


# --- replacing targets ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draft:
    """The temporary folder of one target; the drafts of one write share a key."""

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
    def is_target_away(self) -> bool:
        """Whether the target was moved away, and nothing is in its place."""
        return _is_there(self.old) and not _is_there(self.target)


LONGEST_NAME = 200
"""Longest name of a target, in bytes. File systems allow 255, and drafts add 22."""


def _prefix(target: Path) -> str:
    name = target.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


@contextmanager
def _replacing(
    targets: Sequence[Path], check: Callable[[Path], None], take_away: bool
) -> Iterator[list[_Draft]]:
    """Yield a draft for each target, whose `new` replaces the target at the end.

    Args:
        targets: paths without symbolic links.
        check: raises if a target can't be replaced.
        take_away: move the last target away before the first one is replaced.
    """
    key = secrets.token_hex(8)
    drafts = [_Draft(target, key) for target in targets]
    last, placed = drafts[-1], list[Path]()
    needed = False  # whether the next write needs the drafts, to finish this one
    with ExitStack() as locks:
        try:
            clear_drafts(targets)
            for target in targets:
                check(target)
            for draft in drafts:
                _make_locked(draft, locks)
            yield drafts
            needed = True
            if take_away and _is_there(last.target):
                os.rename(last.target, last.old)
                _sync_names(last.target.parent)
            for draft in drafts:
                os.replace(draft.new, draft.target)
                placed.append(draft.target)
                _sync_names(draft.target.parent)
            needed = False
        except BaseException as error:
            needed = needed and not _settle(drafts, placed)
            if isinstance(error, DishaError) or not isinstance(error, OSError):
                raise
            raise AdapterIOError(
                f"can't save to {last.target}: {error.strerror or error}; "
                f"{_outcome(placed, last.target if needed else None)}"
            ) from error
        finally:
            if not needed:
                _discard(drafts)


def _settle(drafts: Sequence[_Draft], placed: list[Path]) -> bool:
    """Put the last target back, or place the rest if another is in place already.

    Returns:
        True if all targets are old, or all are new. False if that is unknown.
    """
    last = drafts[-1]
    try:
        if last.is_target_away and all(_is_there(draft.new) for draft in drafts):
            os.rename(last.old, last.target)
        elif last.is_target_away:
            _place(drafts, placed)
        return True
    except OSError:
        return False


def _place(drafts: Iterable[_Draft], placed: list[Path]) -> None:
    """Replace the targets that are not replaced yet, and add them to `placed`."""
    for draft in drafts:
        if _is_there(draft.new):
            os.replace(draft.new, draft.target)
            placed.append(draft.target)


def _outcome(placed: Sequence[Path], away: Path | None) -> str:
    if not placed and away is None:
        return "what was there is unchanged"
    new = f"{', '.join(map(str, placed))} already replaced" if placed else "nothing replaced"
    return f"{new}{f', {away} missing' if away else ''}; save again"


def _make_locked(draft: _Draft, locks: ExitStack) -> None:
    """Make the folder of a draft, and lock it until the end of `locks`."""
    # No other user may read new content before it has the permissions of the old content.
    mode = 0o700 if found_at(draft.target) else 0o777
    while True:
        draft.folder.mkdir(mode)
        if fcntl is None:
            return
        # Before it is locked, another writer may think that its own is dead, and clear it.
        try:
            descriptor = _opened(draft.folder)
        except FileNotFoundError:
            continue
        except OSError:
            draft.folder.rmdir()  # rmtree would have to open it
            raise
        locks.callback(_close, descriptor)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_there(draft.folder):
            return


def _close(descriptor: int) -> None:
    with suppress(OSError):  # it is closed nevertheless
        os.close(descriptor)


def _discard(drafts: Iterable[_Draft]) -> None:
    """Remove drafts, as far as the system allows. The next write removes the rest."""
    for draft in drafts:
        with suppress(OSError):  # rmtree raises some errors in spite of `ignore_errors`
            shutil.rmtree(draft.folder, ignore_errors=True)


def _opened(folder: Path) -> int:
    """Open a folder; refuse a link or a pipe of that name."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def clear_drafts(paths: Iterable[PathLike]) -> None:
    """Finish replacements of files or folders that killed writers began, and remove their drafts.

    Args:
        paths: the targets. Those of one write must be given together.

    Raises:
        AdapterIOError: the system can't tell where the paths lead.
    """
    targets = [resolved(path) for path in paths]
    for target in targets if fcntl is not None else ():
        pattern = re.compile(re.escape(_prefix(target)) + r"([0-9a-f]{16})\.tmp")
        names: list[str] = []
        with suppress(OSError):  # a folder that may be written but not listed
            names = os.listdir(target.parent)
        for match in filter(None, map(pattern.fullmatch, names)):
            with suppress(OSError):  # a file of another user, or gone already
                _clear([_Draft(one, match[1]) for one in targets], _Draft(target, match[1]))


def _clear(drafts: Sequence[_Draft], leftover: _Draft) -> None:
    """Clear one of the drafts of a killed writer; first finish the replacement if it had begun."""
    descriptor = _opened(leftover.folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its writer is alive
        if drafts[-1].is_target_away and all(_is_there(draft.folder) for draft in drafts):
            _place(drafts, [])
        shutil.rmtree(leftover.folder)
    finally:
        os.close(descriptor)


def _set_permissions(draft: _Draft) -> None:
    """Give a new file the permissions and the owner of the one it replaces."""
    if not found_at(draft.target):  # some writers create files that only their owner can read
        os.chmod(draft.new, draft.folder.stat().st_mode & 0o666)
        return
    old, new = draft.target.stat(), draft.new.stat()
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        with suppress(OSError):  # only root may give a file away
            os.chown(draft.new, old.st_uid, old.st_gid)
    os.chmod(draft.new, old.st_mode & 0o777)


def _is_there(path: Path) -> bool:
    """Whether there is something of that name; raise if the system can't tell."""
    with suppress(FileNotFoundError):
        os.lstat(path)
        return True
    return False


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
