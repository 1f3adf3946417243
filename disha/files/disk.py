"""Files on disk: save them whole, open safetensors files, and explain why a file is not one.

A save writes a draft, which is a hidden folder beside the target, and then moves what is in it to
the target. A save that is killed leaves its draft. The next save to the same target deletes it,
because nobody holds its lock any more.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from disha.errors import (
    AdapterFileError,
    AdapterIOError,
    ArgumentError,
    ArgumentTypeError,
    DishaError,
)
from disha.model.state import Tensors
from disha.text import brief

try:
    import fcntl
except ImportError:  # Windows, where the drafts of killed savers stay
    fcntl = None  # type: ignore[assignment]

PathLike = str | os.PathLike[str]

ADAPTER_NAME = "adapter.safetensors"  # in output folders and checkpoints

OF_TORCH = {"format": "pt"}  # metadata that other loaders require


REMEDIES = {
    errno.ENOSPC: "free some space, or save elsewhere",
    errno.EDQUOT: "free some space, or save elsewhere",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "make its folder first",
}
"""What to do where a save fails; otherwise, another name may help."""


def check_path(path: Any) -> Path:
    """Return a path as a `Path`, or raise if it is empty or too long for a file."""
    try:
        checked = Path(path)
    except TypeError as error:
        raise ArgumentTypeError(f"path must be a str or a pathlib.Path, got {path!r}") from error
    if not os.fspath(path):  # which would be the current folder
        raise AdapterIOError("the path is empty; name a file or a folder")
    try:
        os.lstat(checked)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            name = brief(str(checked))
            raise AdapterIOError(f"no file can be at {name}: its name is too long") from None
    except ValueError:  # a null byte, which whoever opens it tells
        pass
    return checked


def file_at(path: PathLike) -> Path:
    """Return the path of an adapter file: the path itself, or `ADAPTER_NAME` in a folder."""
    file = check_path(path)
    ends_with_slash = not os.path.basename(path)
    if ends_with_slash or os.path.isdir(file):
        return file / ADAPTER_NAME
    return file


def require_free(path: Path, overwrite: bool) -> None:
    """Raise if a file or a folder with content is at `path`, unless `overwrite` is set."""
    path = check_path(path)
    is_empty_folder = path.is_dir() and not is_full(path)
    if path.exists() and not is_empty_folder and not overwrite:
        raise ArgumentError(f"{path} exists; choose another name, or set `overwrite` (--overwrite)")


def is_full(path: Path) -> bool:
    """Whether a path is a folder with content."""
    try:
        return path.is_dir() and any(path.iterdir())
    except OSError as error:
        raise AdapterIOError(f"can't read {path}: {_reason_of(error)}; check the path") from error


@contextmanager
def folder_for(path: Path) -> Iterator[None]:
    """Make a folder and those around it for the body, and remove the new ones if it raises."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with _explain_failures(path):
            path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in new:  # from the inside outwards
            with suppress(OSError):
                folder.rmdir()
        raise


Writer = Callable[[Path], object]
"""Writes a file or a folder to the path that it gets."""


def save(path: PathLike, write: Writer) -> None:
    """Save a file or a folder.

    A symbolic link stays a link. If several save to one path at once, the last one wins.
    """
    save_together({check_path(path): write})


def save_together(writers: Mapping[Path, Writer]) -> None:
    """Save files or folders that belong together: all are complete before the first is replaced.

    They are replaced in the order of the mapping, and not between those of another saver.
    """
    with ExitStack() as drafts, _explain_failures(next(iter(writers))):
        ready = {}
        for path, write in writers.items():
            target = Path(os.path.realpath(path))
            str(target).encode()  # raises if the name is no UTF-8, which safetensors can't read
            if target.exists() and not (target.is_file() or target.is_dir()):
                raise OSError("it is a device or a pipe")
            draft = drafts.enter_context(_draft_of(target))
            ready[target] = _write_draft(draft, target, write)
        _lock(next(iter(ready)).parent, drafts)
        _swap_all(ready)


@contextmanager
def _explain_failures(target: Path) -> Iterator[None]:
    """Raise `AdapterIOError` if the body can't save to a path."""
    try:
        yield
    except DishaError:  # of a writer, which says what is wrong with what it reads
        raise
    except (OSError, ValueError, SafetensorError) as error:
        remedy = REMEDIES.get(getattr(error, "errno", None) or 0, "choose another name")
        raise AdapterIOError(
            f"can't save to {target}: {_reason_of(error)}; nothing was changed; {remedy}"
        ) from error


@contextmanager
def _draft_of(target: Path) -> Iterator[Path]:
    """Make a folder beside a target for the body, and remove it then."""
    draft = target.with_name(f".{target.name}.{token_hex(4)}.tmp")
    with ExitStack() as held:
        with ExitStack() as around:  # so that no other saver sweeps the draft before its lock
            _lock(target.parent, around)
            _sweep(target)
            draft.mkdir()
            held.callback(shutil.rmtree, draft, ignore_errors=True)
            _lock(draft, held)
        yield draft


def _sweep(target: Path) -> None:
    """Remove the drafts of savers that were killed; a living saver holds the lock of its own."""
    for draft in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.tmp"):
        with ExitStack() as held:
            if not _lock(draft, held, waits=False):
                continue
            old = draft / _name_of_old(target)
            if old.exists() and not target.exists():  # killed between two moves
                old.rename(target)
            shutil.rmtree(draft, ignore_errors=True)


def _lock(folder: Path, held: ExitStack, *, waits: bool = True) -> bool:
    """Lock a folder until `held` closes or this process ends, and return whether that was possible.

    A file system without locks makes no save fail: drafts just stay there.
    """
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        held.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _write_draft(draft: Path, target: Path, write: Writer) -> Path:
    """Write what will take the place of the target, complete and with its permissions."""
    new = draft / target.name
    write(new)
    if new.is_file() and target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    files = [file for file in (new, *new.rglob("*")) if file.is_file()]
    for file in files:
        with file.open("r+b") as written:
            os.fsync(written.fileno())  # so that a power cut leaves no empty files
    # safetensors makes files that only their owner can read. This comes last, because a file that
    # is read-only can't be opened.
    like = target if target.is_file() else draft
    for file in files:
        file.chmod(like.stat().st_mode & 0o666)
    return new


def _swap_all(ready: Mapping[Path, Path]) -> None:
    """Put what is ready in the place of each target; if that stops halfway, say where."""
    replaced: list[str] = []
    for target, new in ready.items():
        try:
            _swap(new, target)
        except OSError as error:
            if not replaced:
                raise
            raise AdapterIOError(
                f"can't save to {target}: {_reason_of(error)}. It is the old one still, but "
                f"{', '.join(replaced)} is replaced already, and they belong together; save again"
            ) from error
        replaced.append(str(target))


def _swap(new: Path, target: Path) -> None:
    """Put the new file or folder in the place of the old one."""
    if not (new.is_dir() and target.exists()):
        new.replace(target)
        return
    if _exchange(new, target):
        return
    # Nothing takes the place of a folder in one step here, so the old one moves away first.
    old = new.with_name(_name_of_old(target))
    target.rename(old)
    try:
        new.replace(target)
    finally:
        if not target.exists():
            old.rename(target)


def _name_of_old(target: Path) -> str:
    return f"{target.name}.old"


def _exchange(new: Path, target: Path) -> bool:
    """Exchange two folders in one step, and return whether this system can do that."""
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    try:
        rename = ctypes.CDLL(None).renameat2
    except (
        OSError,
        AttributeError,
        TypeError,
    ):  # TypeError: Windows has no library of this process
        return False
    return rename(here, os.fsencode(new), here, os.fsencode(target), exchange) == 0


def _reason_of(error: Exception) -> object:
    """Return what an error of the operating system says, or else the error."""
    return getattr(error, "strerror", None) or error


def save_tensors(path: PathLike, tensors: Tensors, metadata: dict[str, str] = OF_TORCH) -> None:
    """Save tensors as a safetensors file."""
    save(path, lambda new: write_tensors(new, tensors, metadata))


def write_tensors(new: Path, tensors: Tensors, metadata: dict[str, str] = OF_TORCH) -> None:
    """Write tensors to the draft of a safetensors file."""
    whole = {}
    storages = set()
    for key, tensor in tensors.items():
        values = tensor.resolve_conj().resolve_neg().contiguous()  # a file has no such flags
        storage = values.untyped_storage().data_ptr()
        if storage in storages:  # safetensors refuses tensors that share memory
            values = values.clone()
        storages.add(storage)
        whole[key] = values
    save_file(whole, new, metadata)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file by `safe_open`; the tensors are read when asked for."""
    try:
        path.open("rb").close()  # raises what the system says, where `safe_open` says less
        str(path).encode()  # raises if the name is no UTF-8, which `safe_open` calls damaged
        with safe_open(path, "pt") as tensors:
            yield tensors
    except DishaError:
        raise
    except (OSError, ValueError) as error:
        raise AdapterIOError(f"can't read {path}: {_reason_of(error)}; check the path") from error
    except SafetensorError as error:
        raise AdapterFileError(
            f"{path} is not a complete safetensors file ({error}): it is damaged, cut off, or of "
            "another kind; get it again. A file of torch.save is for torch.load, whose result is "
            "for load_adapter_state_dict"
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, and its metadata.

    The tensors are mapped: their values are read when they are used.
    """
    with torch.device("cpu"), open_tensors(path) as file:  # torch 2.8 maps to the default device
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    try:
        return dict(json.loads(path.read_bytes()))
    except OSError as error:
        raise AdapterIOError(f"can't read {path}: {_reason_of(error)}; check the path") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{path} is no JSON object ({error}); get it again") from error
