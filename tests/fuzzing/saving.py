"""Saves that are killed, run out of room, or meet each other: what is left must be whole.

Every version of the adapter is one number in all of its values, and its file always has the same
bytes: so a file is whole if, and only if, it is one of the versions' files.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import disha
from tests.processes import FORKED

__all__ = [
    "entries",
    "files_of",
    "kill_saves",
    "meet",
    "save_under_limits",
    "save_without_room",
    "version",
]

VERSIONS = range(8)


def version(number: int) -> nn.Module:
    """Return the model with a version of the adapter, half a megabyte large."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    disha.inject_adapters(model, "all-linear", 64)
    _become(model, number)
    return model


def _become(model: nn.Module, number: int) -> None:
    with torch.no_grad():
        for block in disha.adapter_parameters(model):
            block.fill_(number)


def files_of(numbers: Iterable[int] = VERSIONS) -> dict[bytes, int]:
    """Return the bytes of each version's file -> its number."""
    files, model = {}, version(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            _become(model, number)
            disha.save_adapter(model, Path(folder, "file"))
            files[Path(folder, "file").read_bytes()] = number
    return files


def entries(path: Path) -> list[str]:
    """Return what is in a file's folder besides it."""
    return sorted(name for name in os.listdir(path.parent) if name != path.name)


def _save_in_turn(
    path: Path, numbers: Sequence[int], times: int | None, first: bool, ready: Connection
) -> None:
    torch.set_num_threads(1)
    model = version(0)
    for turn in itertools.count() if times is None else range(times):
        if turn == int(first):
            ready.send("saving")
        _become(model, numbers[turn % len(numbers)])
        disha.save_adapter(model, path)


def _start_saving(
    path: Path, numbers: Sequence[int], times: int | None = None, first: bool = False
) -> Any:
    """Start a process that saves versions to a path, one after another.

    Args:
        path: the file.
        numbers: the versions, again and again.
        times: how many saves; None for no end.
        first: return only after the first of them.
    """
    ours, theirs = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=_save_in_turn, args=(path, numbers, times, first, theirs))
    process.start()
    assert ours.recv() == "saving"
    return process


# --- killed --------------------------------------------------------------------------------------


def kill_saves(path: Path, times: int, seed: int = 0) -> Iterator[int | None]:
    """Kill a process that saves to a path, again and again; yield the version that is left.

    Args:
        path: the file, in a folder of its own.
        times: how often.
        seed: of the moments.

    Raises:
        AssertionError: what is left is not whole, or temporary files pile up.
    """
    files, rng, model = files_of(), random.Random(seed), version(0)
    for _ in range(times):
        numbers = rng.sample(VERSIONS, len(VERSIONS))
        warm = rng.random() < 0.7
        if not warm:
            path.unlink(missing_ok=True)
        process = _start_saving(path, numbers, first=warm)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        left = files.get(path.read_bytes()) if path.exists() else None
        if path.exists():
            assert left is not None, "the file is none of the versions"
            disha.load_adapter(model, path, replace=True)
            assert all((block == left).all() for block in disha.adapter_parameters(model))
        assert len(entries(path)) <= 1, f"killed saves pile up: {entries(path)}"
        yield left
    disha.save_adapter(version(VERSIONS[0]), path)
    assert entries(path) == [], f"the next save has left {entries(path)}"


# --- meeting -------------------------------------------------------------------------------------


def meet(path: Path, times: int) -> tuple[int, set[int]]:
    """Let two processes save to one path while this one loads from it.

    Args:
        path: the file, in a folder of its own.
        times: how often each saves.

    Returns:
        How often it was loaded, and which versions were seen.

    Raises:
        AssertionError: what was loaded is not one whole version, or something is left behind.
    """
    files, model = files_of(), version(0)
    disha.save_adapter(version(VERSIONS[0]), path)
    half = len(VERSIONS) // 2
    writers = [_start_saving(path, part, times) for part in (VERSIONS[:half], VERSIONS[half:])]
    loads, seen = 0, set()
    while any(writer.is_alive() for writer in writers) or loads == 0:
        disha.load_adapter(model, path, replace=True)
        values = {block[0, 0].item() for block in disha.adapter_parameters(model)}
        whole = all((b == b[0, 0]).all() for b in disha.adapter_parameters(model))
        assert len(values) == 1, f"loaded parts of the versions {values}"
        assert whole, "loaded a part of a version"
        assert path.read_bytes() in files
        seen |= {int(value) for value in values}
        loads += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0, "a save has failed because of the other"
    assert entries(path) == []
    return loads, seen


# --- without room --------------------------------------------------------------------------------


def save_under_limits(path: Path, limits: Iterable[int]) -> list[str]:
    """Save where no file may be longer than a limit, in a process of its own; return the errors."""
    model, hard = version(1), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    messages = []
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        messages.append(_error_of_saving(model, path))
    return messages


def _error_of_saving(model: nn.Module, path: Path) -> str:
    try:
        disha.save_adapter(model, path)
    except disha.AdapterIOError as error:
        return str(error)
    return ""


def save_without_room(folder: Path) -> dict[str, object] | None:
    """Save on a disk of two megabytes that is full, in a process of its own.

    Returns:
        What came of it; None where the system lets nobody mount a disk.
    """
    try:
        _mount_small_disk(folder, "2m")
    except OSError:
        return None
    path = folder / "adapter.safetensors"
    disha.save_adapter(version(0), path)
    (folder / "filler").write_bytes(bytes(1_200_000))
    error = _error_of_saving(version(1), path)
    kept, litter = path.read_bytes(), entries(path)
    (folder / "filler").unlink()
    disha.save_adapter(version(1), path)
    return {"error": error, "kept": kept, "litter": litter, "then": path.read_bytes()}


NEW_NAMES, NEW_USERS = 0x00020000, 0x10000000
RECURSIVE, PRIVATE = 0x4000, 0x40000


def _mount_small_disk(folder: Path, size: str) -> None:
    """Mount a disk that nobody but this process sees."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        flags = NEW_NAMES | (0 if os.geteuid() == 0 else NEW_USERS)
        done = libc.unshare(flags) == 0
        done = done and libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None) == 0
        options = f"size={size}".encode()
        done = done and libc.mount(b"none", bytes(folder), b"tmpfs", 0, options) == 0
    except AttributeError:  # not Linux
        raise OSError(errno.ENOSYS, "no namespaces") from None
    if not done:
        raise OSError(ctypes.get_errno(), "can't mount")
