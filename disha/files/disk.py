"""Files on disk: save them whole, open safetensors files, and explain why a file is not one.

A save writes a draft, which is a folder beside the target, and then moves what is in it to the
target. A save that is killed leaves its draft, and the next save to that target removes it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from secrets import token_hex
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from disha.errors import (
    AdapterFileError,
    AdapterIOError,
    ArgumentError,
    ArgumentTypeError,
    DishaError,
)
from disha.model.records import Tensors

PathLike = str | os.PathLike[str]

ADAPTER_NAME = "adapter.safetensors"  # in output folders and checkpoints

OF_TORCH = {"format": "pt"}  # metadata that other loaders require
PICKLES = (b"PK\x03\x04", b"\x80")  # how the files of torch.save begin


def check_path(path: Any) -> Path:
    """Return a path as a `Path`."""
    try:
        return Path(path)
    except TypeError as error:
        raise ArgumentTypeError(f"path must be a str or a pathlib.Path, got {path!r}") from error


def file_at(path: PathLike) -> Path:
    """Return the path of an adapter file: the path itself, or `ADAPTER_NAME` in a folder."""
    file = check_path(path)
    ends_with_slash = not os.path.basename(path)
    if ends_with_slash or os.path.isdir(file):
        return file / ADAPTER_NAME
    return file


def require_free(path: Path, overwrite: bool) -> None:
    """Raise if a file or a folder with content is at `path`, unless `overwrite` is set."""
    is_empty_folder = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_empty_folder and not overwrite:
        raise ArgumentError(f"{path} exists; choose another name, or set `overwrite` (--overwrite)")


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

    A symbolic link stays a link. If several save to one path at once, the last one wins: a save
    whose draft another one has removed writes it again.
    """
    save_together({check_path(path): write})


def save_together(writers: Mapping[Path, Writer]) -> None:
    """Save files or folders that belong together: all are complete before the first is replaced.

    They are replaced in the order of the mapping.
    """
    with _explain_failures(next(iter(writers))):
        by_target = {Path(os.path.realpath(path)): write for path, write in writers.items()}
        for target in by_target:
            str(target).encode()  # raises if the name is no UTF-8, which safetensors can't read
            if target.exists() and not (target.is_file() or target.is_dir()):
                raise OSError("it is a device or a pipe")
        while True:
            try:
                _save_once(by_target)
                return
            except _DraftRemovedError:
                continue  # write everything again


@contextmanager
def _explain_failures(target: Path) -> Iterator[None]:
    """Raise `AdapterIOError` if the body can't save to a path."""
    try:
        yield
    except DishaError:  # of a writer, which says what is wrong with what it reads
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterIOError(
            f"can't save to {target}: {_reason_of(error)}; nothing was changed"
        ) from error


class _DraftRemovedError(Exception):
    """Another save, which began later and ended before this one, has removed a draft of it."""


def _save_once(writers: Mapping[Path, Writer]) -> None:
    """Write a draft for each target, then put each in place."""
    # These belong to saves that were killed, or that have begun before this one.
    other_drafts = {target: _drafts_of(target) for target in writers}
    drafts = {target: target.with_name(f".{target.name}.{token_hex(4)}.tmp") for target in writers}
    try:
        for draft in drafts.values():
            draft.mkdir()
        _replace_by_drafts(writers, drafts, other_drafts)
    finally:
        for draft in drafts.values():
            shutil.rmtree(draft, ignore_errors=True)


def _replace_by_drafts(
    writers: Mapping[Path, Writer],
    drafts: Mapping[Path, Path],
    other_drafts: Mapping[Path, Iterable[Path]],
) -> None:
    """Fill every draft, then put each in place, and remove the other drafts."""
    try:
        for target, write in writers.items():
            _write_draft(drafts[target], target, write)
        _swap_all(drafts)
        for target, draft in drafts.items():
            _remove(other_drafts[target], draft)
    except (OSError, ValueError, SafetensorError) as error:
        if not all(draft.exists() for draft in drafts.values()):
            raise _DraftRemovedError from error
        raise


def _write_draft(draft: Path, target: Path, write: Writer) -> None:
    """Write what will take the place of the target, complete and with its permissions."""
    new = draft / target.name
    write(new)
    if new.is_file() and target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    _flush(new)
    # This comes last, because a file that is read-only can't be opened to be flushed.
    _give_permissions(new, target, draft)


def _drafts_of(target: Path) -> list[Path]:
    """Return the drafts of a target that are on the disk now, those of all saves."""
    token = "[0-9a-f]" * 8
    return list(target.parent.glob(f".{escape(target.name)}.{token}.tmp"))


def _files_in(path: Path) -> list[Path]:
    """Return the file itself, or all files in a folder."""
    return [file for file in (path, *path.rglob("*")) if file.is_file()]


def _give_permissions(new: Path, target: Path, draft: Path) -> None:
    """Give the files the permissions of the old file, or else those of any new file."""
    # safetensors makes files that only their owner can read.
    like = target if target.is_file() else draft
    mode = like.stat().st_mode & 0o666
    for file in _files_in(new):
        file.chmod(mode)


def _flush(new: Path) -> None:
    """Wait until the files are on the disk, so that a power cut leaves no empty ones."""
    for file in _files_in(new):
        with file.open("r+b") as written:
            os.fsync(written.fileno())


def _swap_all(drafts: Mapping[Path, Path]) -> None:
    """Put what is in each draft in the place of its target; if that stops halfway, say where."""
    replaced: list[str] = []
    for target, draft in drafts.items():
        try:
            _swap(draft / target.name, target)
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
    # Nothing takes the place of a folder in one step, so the old one moves away first.
    old = new.with_name(f"{target.name}.old")
    target.rename(old)
    try:
        new.replace(target)
    finally:
        if not target.exists():
            old.rename(target)


def _remove(other_drafts: Iterable[Path], draft: Path) -> None:
    """Remove the drafts of other saves: move them into this draft, which is removed later."""
    for other in other_drafts:
        with suppress(OSError):  # it is gone already
            # In one step, so that a save that still runs misses its whole draft, and not a part.
            other.rename(draft / other.name)


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
    start = b""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        str(path).encode()  # raises if the name is no UTF-8, which `safe_open` calls damaged
        with safe_open(path, "pt") as tensors:
            yield tensors
    except DishaError:
        raise
    except (OSError, ValueError) as error:
        advice = explain_peft_folder(path)
        if advice is not None:
            raise AdapterFileError(advice) from error
        raise AdapterIOError(f"can't read {path}: {_reason_of(error)}; check the path") from error
    except SafetensorError as error:
        if start.startswith(PICKLES):
            raise AdapterFileError(
                f"{path} is a pickle, as torch.save writes it; read it with torch.load, and give "
                "the result to load_adapter_state_dict"
            ) from error
        raise AdapterFileError(
            f"{path} is not a complete safetensors file ({error}): it is damaged, cut off, or a "
            "file of another kind; get it again"
        ) from error


def explain_peft_folder(path: Path) -> str | None:
    """Return how to read a folder that PEFT wrote, if the path is in one, and else None."""
    config = path.parent / "adapter_config.json"
    if not os.path.isfile(config):
        return None
    reader = "lora" if '"LORA"' in config.read_text(encoding="utf-8", errors="replace") else "peft"
    return (
        f"{path.parent} is a folder of PEFT; read it with disha.interop.{reader}.load, or make an "
        "adapter file of it with disha convert"
    )
