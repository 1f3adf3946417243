"""Checkpoints from which training goes on exactly as if it had never stopped.

``output_dir/checkpoint-<step>/`` holds

- ``adapter.safetensors``: the adapter, as `disha.save_adapter` writes it
- ``training.pt``: optimiser state by parameter name, place in the data, random states, history;
  tensors and plain data only
- ``manifest.json``: size and SHA-256 of both

A checkpoint is filled in a temporary folder beside its place, brought to the disk, and renamed into
its place: it is there whole, or not at all. What a killed save has left is cleared by the next.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import random
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import disha
from disha.finetune.errors import OutputError, SettingsError
from disha.finetune.training.loop import Progress
from disha.finetune.training.parallel import (
    Processes,
    is_sharded,
    shared_like,
    undistributed,
    whole,
)

__all__ = ["Checkpoints", "SavedState"]

T = TypeVar("T")

ADAPTER, TRAINING, MANIFEST = "adapter.safetensors", "training.pt", "manifest.json"
FORMAT = 1
PIECE = 1 << 20
"""How much of a file is read at a time."""

NAME = re.compile(r"checkpoint-(\d+)")
TEMPORARY = re.compile(r"\.checkpoint-\d+\.[0-9a-f]{16}\.tmp")


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint holds, checked whole.

    Args:
        folder: the checkpoint.
        progress: how far training was.
        settings: the caller's, which must agree.
        history: the caller's, such as the losses so far.
        optimizer: tensors and numbers by parameter name.
        random: the random states of each process, by rank.
    """

    folder: Path
    progress: Progress
    settings: Mapping[str, str]
    history: Mapping[str, Any]
    optimizer: Mapping[str, Mapping[str, Any]]
    random: tuple[Mapping[str, Any], ...]

    def require_agreement(self, settings: Mapping[str, str]) -> None:
        """Check that training goes on under the settings that it began with.

        Args:
            settings: those of now, what follows from others after these.

        Raises:
            SettingsError: one of them differs; the first is named.
        """
        for name in dict.fromkeys([*settings, *self.settings]):
            saved, given = self.settings.get(name), settings.get(name)
            if saved != given:
                raise SettingsError(
                    f"{self.folder} was saved with {_setting(name, saved)}, but now there is "
                    f"{_setting(name, given)}; give the same again to resume, or leave "
                    "--resume out to begin anew"
                )


def _setting(name: str, value: str | None) -> str:
    return f"no {name}" if value is None else f"{name} {value}"


class Checkpoints:
    """The checkpoints of a run. With several processes, call every method on all of them.

    Args:
        folder: the run's output folder.
        limit: how many to keep, the newest; None: all.
        processes: those that train together.
    """

    def __init__(
        self, folder: Path, limit: int | None = None, processes: Processes | None = None
    ) -> None:
        self._folder, self._limit = folder, limit
        self._processes = processes or Processes.alone()
        self._newest: Path | None = None  # of this run

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that this run has saved or gone on from."""
        return self._newest

    def save(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        *,
        settings: Mapping[str, str],
        history: Mapping[str, Any],
    ) -> Path:
        """Save a checkpoint whole; then, with a limit, remove those beyond it.

        Those of later steps go first: this run has gone back behind them, as they were damaged.

        Args:
            objective: what is trained, with an adapter in its model.
            optimizer: its optimiser.
            progress: how far training is.
            settings: what must agree for training to go on.
            history: plain data to get back, such as the losses so far.

        Returns:
            The folder of the checkpoint.

        Raises:
            OutputError: it can't be written; the earlier ones are untouched.
        """
        final = self._folder / f"checkpoint-{progress.step}"
        if final == self._newest:
            return final
        state = {
            "progress": dataclasses.asdict(progress),
            "settings": dict(settings),
            "history": dict(history),
            "optimizer": _optimizer_state(objective, optimizer),
            "random": self._processes.gather(_random_state()),
        }
        try:
            temporary = self._on_main(lambda: self._prepared(final))
            self._save_adapter(objective, temporary)
            self._on_main(lambda: _complete(temporary, final, state))
        except OSError as error:  # on all processes alike
            self._on_main(functools.partial(self._give_up, final, error))
        self._newest = final
        self._on_main(lambda: self._remove_beyond_limit(final))
        return final

    def newest_good(self, report: Callable[[str], None]) -> SavedState | None:
        """Return the newest checkpoint that is whole; None where there are no checkpoints.

        Args:
            report: is told of each one that is passed over, and why; on the main process.

        Raises:
            SettingsError: there are some, and none is whole.
        """
        self._newest = self._on_main(lambda: self._search(report))
        return None if self._newest is None else _read(self._newest)

    def restore(
        self, saved: SavedState, objective: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Bring model, optimiser and random states to what they were when `saved` was saved.

        Args:
            saved: what `newest_good` returned.
            objective: what is trained, distributed or not, with an adapter of the same shape.
            optimizer: a new one, from `make_optimizer`.

        Raises:
            SettingsError: the number of processes or what is trained has changed.
            AdapterFileError: the adapter is not that of this model.
        """
        if len(saved.random) != self._processes.world_size:
            raise SettingsError(
                f"{saved.folder} was saved by {len(saved.random)} processes, and now there are "
                f"{self._processes.world_size}; start as many to resume, by --nproc-per-node"
            )
        disha.load_adapter(undistributed(objective).model, saved.folder / ADAPTER, replace=True)
        _restore_optimizer(saved, objective, optimizer)
        _restore_random_state(saved.random[self._processes.rank])

    def clear(self) -> None:
        """Remove all checkpoints: they are of an earlier run, and a new one begins.

        Raises:
            OutputError: one can't be removed.
        """
        self._on_main(self._clear)

    # --- on the main process ---------------------------------------------------------------------

    def _on_main(self, action: Callable[[], T]) -> T:
        """Do something on the main process; return the result, or raise the error, on all."""
        result: Any = None
        if self._processes.is_main:
            try:
                result = action()
            except (OSError, disha.DishaError) as error:
                result = error
        result = self._processes.broadcast(result)
        if isinstance(result, (OSError, disha.DishaError)):
            raise result
        return result  # type: ignore[no-any-return]

    def _prepared(self, final: Path) -> Path:
        """Make the folder that is to be filled."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._clear_leftovers()
        temporary = _temporary(final)
        temporary.mkdir()
        return temporary

    def _save_adapter(self, objective: nn.Module, temporary: Path) -> None:
        model = undistributed(objective).model
        if is_sharded(objective):  # which all processes gather together
            disha.save_adapter(model, temporary / ADAPTER)
        else:
            self._on_main(lambda: disha.save_adapter(model, temporary / ADAPTER))

    def _give_up(self, final: Path, error: OSError) -> None:
        """Remove what is there of a checkpoint, and say from where training can go on."""
        self._clear_leftovers()
        good = next((path for path in self._newest_first() if _fault(path) is None), None)
        cause = _cause(error)
        remedy = "make room" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        way_on = "start again" if good is None else f"go on from {good}, the newest, by --resume"
        raise OutputError(
            f"{final} can't be written: {cause.strerror or cause}; {remedy}, and {way_on}"
        ) from error

    def _search(self, report: Callable[[str], None]) -> Path | None:
        faults = 0
        for path in self._newest_first():
            fault = _fault(path)
            if fault is None:
                return path
            faults += 1
            report(f"{path} is passed over: {fault}")
        if faults:
            raise SettingsError(
                f"none of the {faults} checkpoints in {self._folder} is whole; leave --resume out "
                "to begin anew"
            )
        return None

    def _newest_first(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        steps = {path: NAME.fullmatch(path.name) for path in self._folder.iterdir()}
        found = {path: int(match[1]) for path, match in steps.items() if match and path.is_dir()}
        return sorted(found, key=lambda path: found[path], reverse=True)

    def _remove_beyond_limit(self, newest: Path) -> None:
        if self._limit is not None:
            found = self._newest_first()
            place = found.index(newest)
            self._remove(found[:place] + found[place + self._limit :])
        self._clear_leftovers()

    def _clear(self) -> None:
        self._remove(self._newest_first())
        self._clear_leftovers()

    def _remove(self, checkpoints: Iterable[Path]) -> None:
        """Remove checkpoints, each whole: what is left if this is killed is no checkpoint."""
        for path in checkpoints:
            try:
                os.rename(path, _temporary(path))
            except OSError as error:
                raise OutputError(f"{path} can't be removed: {error.strerror}") from error

    def _clear_leftovers(self) -> None:
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if TEMPORARY.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)


# --- files ---------------------------------------------------------------------------------------


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(8)}.tmp")


def _complete(temporary: Path, final: Path, state: Mapping[str, Any]) -> None:
    """Fill a checkpoint that has its adapter, and bring it to its place."""
    buffer = io.BytesIO()  # as torch.save hides what the disk says
    torch.save(state, buffer)
    _write(temporary / TRAINING, buffer.getbuffer())
    sizes = {name: _described(temporary / name) for name in (ADAPTER, TRAINING)}
    manifest = {"format": FORMAT, "files": sizes}
    _write(temporary / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    _sync(temporary)
    if final.exists():  # damaged, or of an earlier run
        os.rename(final, _temporary(final))
    os.rename(temporary, final)
    _sync(final.parent)


def _cause(error: OSError) -> OSError:
    """Return what the disk said, without what was made of it on the way."""
    while isinstance(error.__cause__, OSError):
        error = error.__cause__
    return error


def _write(path: Path, content: bytes | memoryview) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _described(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        files = _manifest_files(folder)
        for name in (ADAPTER, TRAINING):
            fault = _file_fault(folder / name, files[name])
            if fault is not None:
                return fault
        _read(folder)
    except OSError as error:
        return f"{error.filename} can't be read: {error.strerror}"
    except _UnfitError as error:
        return str(error)
    return None


class _UnfitError(disha.DishaError):
    """A file of a checkpoint is not as it was written."""


def _manifest_files(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        version, files = manifest["format"], manifest["files"]
        described = {name: dict(files[name]) for name in (ADAPTER, TRAINING)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _UnfitError(f"{MANIFEST} is damaged") from error
    if version != FORMAT:
        raise _UnfitError(f"its format is {version!r}, and this version reads {FORMAT}")
    return described


def _file_fault(path: Path, described: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != described.get("size"):
        return f"{path.name} has {size} bytes in place of {described.get('size')}"
    if _described(path) != described:
        return f"{path.name} is damaged: its SHA-256 is not that of the manifest"
    return None


def _read(folder: Path) -> SavedState:
    try:
        state = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
        return SavedState(
            folder=folder,
            progress=Progress(**state["progress"]),
            settings=state["settings"],
            history=state["history"],
            optimizer=state["optimizer"],
            random=tuple(state["random"]),
        )
    except OSError:
        raise
    except Exception as error:  # torch.load raises anything
        raise _UnfitError(f"{TRAINING} can't be used: {error}") from error


# --- state ---------------------------------------------------------------------------------------


def _trained(objective: nn.Module) -> dict[str, nn.Parameter]:
    named = undistributed(objective).named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def _optimizer_state(
    objective: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Any]]:
    """Return the optimiser's state by parameter name; of sharded parameters, gathered whole."""
    return {
        name: {key: _on_cpu(value) for key, value in optimizer.state.get(parameter, {}).items()}
        for name, parameter in _trained(objective).items()
    }


def _on_cpu(value: Any) -> Any:
    return whole(value).cpu() if isinstance(value, Tensor) else value


def _restore_optimizer(
    saved: SavedState, objective: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    trained = _trained(objective)
    if trained.keys() != saved.optimizer.keys():
        [name, *_] = sorted(trained.keys() ^ saved.optimizer.keys())
        raise SettingsError(
            f"{saved.folder} was saved while other parameters were trained: {name} is trained only "
            f"{'now' if name in trained else 'there'}; give the same flags again to resume"
        )
    state = {
        parameter: {
            key: shared_like(parameter, value) for key, value in saved.optimizer[name].items()
        }
        for name, parameter in trained.items()
    }
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.load_state_dict(
        {
            "state": {index: state[p] for index, p in enumerate(order) if state[p]},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


def _random_state() -> dict[str, Any]:
    """The states of this process's generators; of its own GPU only."""
    on_gpu = torch.cuda.is_available()
    return {
        "python": random.getstate(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if on_gpu else None,
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
