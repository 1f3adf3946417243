"""Checkpoints that resume training exactly as if it had never stopped.

``output_dir/checkpoint-<step>/`` holds

- ``adapter.safetensors``: the adapter, as `disha.save_adapter` writes it
- ``best.safetensors``: the adapter of the best step so far, if it is wanted and is another one
- ``training.pt``: optimizer state by parameter name, place in the data, random states, history;
  tensors and plain data only
- ``manifest.json``: the SHA-256 of the others, and the time that the chat template saw

A checkpoint is written completely or not at all. If a save is killed, the next one, or resuming,
finishes it or removes what it left. Optimizer states are gathered, so any number of processes can
resume, with any strategy. The files of `torch.distributed.checkpoint` are not used, because their
metadata is a pickle, which can run code.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states

import disha
from disha.files import ADAPTER_NAME, clear_drafts, found_at, remove_folder, write_folder
from disha.finetune.errors import OutputError, SettingsError
from disha.finetune.hashing import file_hash
from disha.finetune.training.loop import Progress
from disha.finetune.training.parallel import Processes, is_sharded, undistributed

__all__ = [
    "Checkpoints",
    "SavedState",
    "adapter_values",
    "random_state",
    "restore_random_state",
    "set_adapter_values",
]

T = TypeVar("T")

TRAINING, MANIFEST = "training.pt", "manifest.json"
BEST = "best.safetensors"
FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+)")
DRAFT = re.compile(r"\.(checkpoint-\d+)\..*\.tmp")
"""A temporary folder of `disha.files`, which a killed process has left."""


@dataclass(frozen=True)
class SavedState:
    """The contents of a checkpoint, after its hashes were checked.

    Args:
        folder: the checkpoint.
        progress: how far training was.
        setup: the caller's data on what the run depends on.
        history: the caller's data, such as the losses so far.
        optimizer: the optimizer's state dict, by parameter names.
        random: the random states of each process, by rank.
    """

    folder: Path
    progress: Progress
    setup: Mapping[str, Any]
    history: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    random: tuple[Mapping[str, Any], ...]


class Checkpoints:
    """The checkpoints of a run. With several processes, call every method on all of them.

    Args:
        folder: the run's output folder.
        limit: how many of the newest to keep; None keeps all.
        processes: the processes that train together.
    """

    def __init__(
        self, folder: Path, limit: int | None = None, processes: Processes | None = None
    ) -> None:
        self._folder, self._limit = folder, limit
        self._processes = processes or Processes.alone()
        self._on_main = self._processes.on_main
        self._newest: Path | None = None  # of this run

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that this run has saved or resumed from."""
        return self._newest

    def save(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        *,
        setup: Mapping[str, Any],
        history: Mapping[str, Any],
        best: Mapping[str, Tensor] | None = None,
        now: float | None = None,
    ) -> Path:
        """Save a checkpoint. Then, with a limit, remove the checkpoints beyond it.

        Checkpoints of later steps are removed too. They must be damaged, because this run has
        resumed from an earlier one.

        Args:
            objective: the objective to train, with an adapter in its model.
            optimizer: the objective's optimizer.
            progress: how far training is.
            setup: plain data on what the run depends on.
            history: plain data to get back when resuming, such as the losses so far.
            best: from `adapter_values`, another adapter to keep with this one.
            now: the time that the chat template sees, for `earlier_now`.

        Returns:
            The folder of the checkpoint.

        Raises:
            OutputError: it can't be written; earlier checkpoints stay as they are.
        """
        final = self._folder / f"checkpoint-{progress.step}"
        # Somebody may have deleted it since.
        if final == self._newest and self._on_main(lambda: found_at(final) == "folder"):
            return final
        state = {
            "progress": dataclasses.asdict(progress),
            "setup": dict(setup),
            "history": dict(history),
            "optimizer": _optimizer_state(objective, optimizer),
            "random": self._processes.gather(random_state()),
        }
        try:
            with ExitStack() as stack:
                folder = self._on_main(lambda: stack.enter_context(self._new_folder(final)))
                self._save_adapter(objective, folder / ADAPTER_NAME)
                if best is not None:
                    with _holding(objective, best):
                        self._save_adapter(objective, folder / BEST)
                self._on_main(lambda: _complete(folder, state, now))
                self._on_main(stack.close)
        except OSError as error:  # every process gets this error
            self._processes.barrier()  # the main process has removed the new folder
            self._give_up(final, error)
        self._newest = final
        self._on_main(lambda: self._remove_beyond_limit(final, later=True))
        return final

    def newest_good(self, report: Callable[[str], None]) -> SavedState | None:
        """Return the newest checkpoint that is not damaged, or None if there are no checkpoints.

        Args:
            report: called on the main process, with each skipped checkpoint and the reason.

        Raises:
            SettingsError: every checkpoint is damaged.
        """
        found: list[SavedState] = []  # so that the main process does not read it twice
        self._newest = self._on_main(lambda: self._search(report, found))
        if self._newest is None:
            return None
        return found[0] if found else _read(self._newest)

    def restore(
        self, saved: SavedState, objective: nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, Tensor]:
        """Restore the model and the optimizer from `saved`.

        The random states are restored too, if the number of processes is the same. Otherwise they
        stay as the caller has set them. Older checkpoints beyond the limit are removed: a run that
        was killed just after it saved has left one too many.

        Args:
            saved: what `newest_good` returned.
            objective: the objective to train, distributed or not; its adapter has the same shape.
            optimizer: a new optimizer, from `make_optimizer`.

        Returns:
            The values of the best adapter so far, or else of the adapter itself.

        Raises:
            SettingsError: the parameters to train are not the same as before.
            AdapterFileError: the adapter does not fit this model.
        """
        _restore_optimizer(saved, objective, optimizer)
        model = undistributed(objective).model
        kept = BEST if found_at(saved.folder / BEST) == "file" else ADAPTER_NAME
        disha.load_adapter(model, saved.folder / kept, replace=True)
        best = adapter_values(objective)
        if kept != ADAPTER_NAME:
            disha.load_adapter(model, saved.folder / ADAPTER_NAME, replace=True)
        if len(saved.random) == self._processes.world_size:
            restore_random_state(saved.random[self._processes.rank])
        self._on_main(lambda: self._remove_beyond_limit(saved.folder))
        return best

    def clear(self) -> None:
        """Remove all checkpoints of an earlier run, before a new run begins.

        Raises:
            OutputError: one can't be removed.
        """
        self._on_main(lambda: self._remove(self.newest_first()))

    # --- on the main process ---------------------------------------------------------------------

    def _new_folder(self, final: Path) -> AbstractContextManager[Path]:
        """Return a context manager of a folder to fill, which takes the place of `final`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._finish_saves()
        # A folder that is already there is damaged, or belongs to an earlier run.
        return write_folder(final, overwrite=True)

    def _save_adapter(self, objective: nn.Module, path: Path) -> None:
        model = undistributed(objective).model
        if is_sharded(objective):  # all processes gather it together
            disha.save_adapter(model, path)
        else:
            self._on_main(lambda: disha.save_adapter(model, path))

    def _give_up(self, final: Path, error: OSError) -> NoReturn:
        """Raise an error that says why a save failed, and where training can resume."""
        good, cause = self._newest, _cause(error)
        remedy = "make room" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else "fix that"
        way_on = "start again" if good is None else f"resume from {good}, the newest, with --resume"
        raise OutputError(
            f"{final} can't be written: {cause.strerror or cause}; {remedy}, and {way_on}"
        ) from error

    def _search(self, report: Callable[[str], None], found: list[SavedState]) -> Path | None:
        self._finish_saves()
        paths = self.newest_first()
        for path in paths:
            try:
                # If the system can't read it, it is not skipped: it may be good, and a new
                # checkpoint would replace it.
                with _explained(f"{path} can't be read", "; fix that, or delete it"):
                    found.append(_read(path))
                return path
            except _DamagedError as error:
                report(f"{path} is skipped: {error}")
        if paths:
            raise SettingsError(
                f"every checkpoint in {self._folder} is damaged; leave --resume out to start over"
            )
        return None

    def newest_first(self) -> list[Path]:
        """Return the checkpoints in the folder, damaged ones too."""
        steps = {path: NAME.fullmatch(path.name) for path in self._listed()}
        found = {
            path: int(match[1])
            for path, match in steps.items()
            if match and found_at(path) == "folder"
        }
        return sorted(found, key=lambda path: found[path], reverse=True)

    def earlier_now(self) -> float | None:
        """Return the time that the chat template saw in the run to resume; None if unknown.

        It is needed before the rows are read, so it is in the manifest, which is small.
        """
        for path in self.newest_first():
            with suppress(_DamagedError, OSError):
                now = _manifest(path).get("now")
                return now if isinstance(now, float) else None
        return None

    def _listed(self) -> list[Path]:
        with _explained(f"{self._folder} can't be read"):
            try:
                return [self._folder / name for name in os.listdir(self._folder)]
            except FileNotFoundError:
                return []

    def _remove_beyond_limit(self, newest: Path, *, later: bool = False) -> None:
        """Keep as many checkpoints up to `newest` as wanted. If asked, remove later ones too."""
        if self._limit is not None:
            found = self.newest_first()
            place = found.index(newest)
            self._remove(found[: place if later else 0] + found[place + self._limit :])

    def _remove(self, checkpoints: Iterable[Path]) -> None:
        self._finish_saves()
        for path in checkpoints:
            with _explained(f"{path} can't be removed"):
                remove_folder(path)

    def _finish_saves(self) -> None:
        """Finish the saves of killed processes, or remove what they have left."""
        drafts = [DRAFT.fullmatch(path.name) for path in self._listed()]
        for name in {match[1] for match in drafts if match}:
            clear_drafts([self._folder / name])


# --- files ---------------------------------------------------------------------------------------


class _DamagedError(disha.DishaError):
    """A file of a checkpoint is not as it was written."""


def _complete(folder: Path, state: Mapping[str, Any], now: float | None) -> None:
    """Write the state of training and the manifest beside the adapter."""
    buffer = io.BytesIO()  # because torch.save hides why a file can't be written
    torch.save(state, buffer)
    (folder / TRAINING).write_bytes(buffer.getbuffer())
    written = sorted(path.name for path in folder.iterdir())
    files = {name: file_hash(folder / name) for name in written}
    manifest = json.dumps({"format": FORMAT, "files": files, "now": now}, indent=2)
    (folder / MANIFEST).write_text(f"{manifest}\n", encoding="utf-8")


@contextmanager
def _explained(problem: str, remedy: str = "") -> Iterator[None]:
    """Raise an `OSError` of the block as an `OutputError` with the cause."""
    try:
        yield
    except OSError as error:
        cause = _cause(error)
        raise OutputError(f"{problem}: {cause.strerror or cause}{remedy}") from error


def _cause(error: OSError) -> OSError:
    """Return the system's own error, which the given error may wrap."""
    while isinstance(error.__cause__, OSError):
        error = error.__cause__
    return error


def _read(folder: Path) -> SavedState:
    """Read a checkpoint, after checking its hashes."""
    try:
        hashes = _manifest(folder)["files"]
        for name in {ADAPTER_NAME, TRAINING, *hashes}:
            if file_hash(folder / name) != hashes.get(name):
                raise _DamagedError(f"{name} is damaged: its SHA-256 is not that of the manifest")
        content = io.BytesIO((folder / TRAINING).read_bytes())  # torch.load hides errors of reading
    except FileNotFoundError as error:
        raise _DamagedError(f"{error.filename} can't be read: {error.strerror}") from error
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
        return SavedState(
            folder=folder,
            progress=Progress(**state["progress"]),
            setup=state["setup"],
            history=state["history"],
            optimizer=state["optimizer"],
            random=tuple(state["random"]),
        )
    except Exception as error:  # torch.load raises anything
        raise _DamagedError(f"{TRAINING} can't be used: {error}") from error


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], dict(manifest["files"])
    except (ValueError, TypeError, KeyError) as error:
        raise _DamagedError(f"{MANIFEST} is damaged") from error
    if version != FORMAT:
        raise _DamagedError(f"its format is {version!r}, and this version reads {FORMAT}")
    return {**manifest, "files": files}


# --- state ---------------------------------------------------------------------------------------


def adapter_values(objective: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the values that are trained; if they are sharded, of this process's part."""
    state = disha.adapter_state_dict(undistributed(objective).model)
    return {name: value.clone() for name, value in state.items()}


def set_adapter_values(objective: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set the values that are trained to those from `adapter_values`."""
    disha.load_adapter_state_dict(undistributed(objective).model, values)


@contextmanager
def _holding(objective: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the trained parameters other values during the block."""
    own = adapter_values(objective)
    try:
        set_adapter_values(objective, values)
        yield
    finally:
        set_adapter_values(objective, own)


def _optimizer_state(objective: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Return the optimizer's state dict by parameter names, gathered on the main process."""
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return states.get_optimizer_state_dict(objective, optimizer, options=options)


def _restore_optimizer(
    saved: SavedState, objective: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    named = undistributed(objective).named_parameters()
    trained = {name for name, parameter in named if parameter.requires_grad}
    before = {name for group in saved.optimizer["param_groups"] for name in group["params"]}
    if trained != before:
        [name, *_] = sorted(trained ^ before)
        raise SettingsError(
            f"{saved.folder} trained other parameters than this run: only "
            f"{'this run' if name in trained else 'it'} trains {name}; use the same flags to resume"
        )
    # A parameter that has had no gradient has no state.
    options = states.StateDictOptions(full_state_dict=True, strict=False)
    own = [{**group} for group in optimizer.param_groups]
    states.set_optimizer_state_dict(objective, optimizer, dict(saved.optimizer), options=options)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)  # those of this run; the caller has compared them with the others


def random_state() -> dict[str, Any]:
    """Return the states of this process's generators, on the CPU and on its own GPU."""
    on_gpu = torch.cuda.is_available()
    return {
        "python": random.getstate(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if on_gpu else None,
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set the generators to states from `random_state`."""
    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
