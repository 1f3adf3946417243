"""The record of each step of a run: lines of JSON, and events for TensorBoard."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from disha.files import write_files
from disha.finetune.errors import OutputError
from disha.finetune.folder_lock import FolderLock, is_at
from disha.finetune.report import write_text
from disha.finetune.training.loop import Step

__all__ = ["METRICS", "Metrics", "recorded_steps", "recording"]

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"


class Metrics:
    """Records steps and evaluations as they come.

    If a file can't be written, a warning says so once, and training continues without it. If the
    folder was deleted, it is made again with all lines recorded so far.

    Args:
        lock: the lock of the run's output folder.
        lines: the file for lines of JSON, if any.
        events: TensorBoard's writer, if asked for.
    """

    def __init__(self, lock: FolderLock, lines: FileIO | None, events: Any = None) -> None:
        self._lock, self._lines, self._events = lock, lines, events

    def record_step(self, step: Step) -> None:
        """Record an optimiser step, without the values that were not measured."""
        self._record({k: v for k, v in dataclasses.asdict(step).items() if v is not None})

    def record_evaluation(self, step: int, eval_loss: float, **others: float) -> None:
        """Record what was measured before the first step, by its names in `Step`."""
        self._record({"step": step, "eval_loss": eval_loss, **others})

    def close(self) -> None:
        """Write the remaining events to the disk, and close the files."""
        with self._warning_of_failure("_lines", METRICS):
            if self._lines is not None:
                self._lines.close()
        with self._warning_of_failure("_events", EVENTS):
            if self._events is not None:
                self._events.close()

    def _record(self, values: dict[str, Any]) -> None:
        line = (json.dumps(values) + "\n").encode()
        with self._warning_of_failure("_lines", METRICS):
            if self._lines is not None:
                self._lock.keep()
                self._lines = self._in_place(self._lines)
                if self._lines.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with self._warning_of_failure("_events", EVENTS):
            self._add_events(values)

    def _add_events(self, values: dict[str, Any]) -> None:
        if self._events is not None:
            for name, value in _scalars(values).items():
                self._events.add_scalar(name, value, values["step"])

    def _in_place(self, lines: FileIO) -> FileIO:
        """Return the open file; if it was deleted, record everything again, and return the new."""
        path = self._lock.folder / METRICS
        if is_at(path, lines):
            return lines
        lines.seek(0)
        content = lines.read()
        lines.close()
        write_files({path: lambda temporary: Path(temporary).write_bytes(content)})
        if self._events is not None:
            self._events = _open_events(self._lock.folder / EVENTS, None, True)
            for line in content.splitlines():
                self._add_events(json.loads(line))
        return path.open("a+b", buffering=0)

    @contextmanager
    def _warning_of_failure(self, attribute: str, name: str) -> Iterator[None]:
        """If the block can't write, print a warning, and do not write there again."""
        try:
            yield
        except OSError as error:
            setattr(self, attribute, None)
            print(
                f"disha: warning: {name} can't be written: {error.strerror or error}; training "
                "continues, but is no longer recorded there",
                file=sys.stderr,
                flush=True,
            )


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    """Return what TensorBoard shows of a record."""
    names = ("loss", "learning_rate", "gradient_norm", "tokens_per_second")
    scalars = {f"train/{name}": values[name] for name in names if name in values}
    if (loss := values.get("eval_loss")) is not None:
        scalars |= {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
    if (exact := values.get("eval_exact_match")) is not None:
        scalars["eval/exact_match"] = exact
    return scalars


@contextmanager
def recording(
    lock: FolderLock, *, tensorboard: bool = False, after: int | None = None, main: bool = True
) -> Iterator[Metrics]:
    """Yield the record of a run. Each line reaches the disk when it is complete.

    Args:
        lock: the lock of the run's output folder.
        tensorboard: whether to write events too.
        after: the step after which the run resumes. Later records are removed, because those steps
            are done again. None starts a new record.
        main: whether this process writes.

    Raises:
        OutputError: the files can't be written.
    """
    if not main:
        yield Metrics(lock, None)
        return
    with _open_lines(lock.folder / METRICS, after) as lines:
        metrics = Metrics(lock, lines, _open_events(lock.folder / EVENTS, after, tensorboard))
        try:
            yield metrics
        finally:
            metrics.close()


def _open_lines(path: Path, after: int | None) -> FileIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if after is None:
            return path.open("w+b", buffering=0)
        kept = [json.dumps(values) + "\n" for values in _records(path, after)]
        write_text(path, "".join(kept))
        return path.open("a+b", buffering=0)
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror or error}") from error


def _open_events(folder: Path, after: int | None, wanted: bool) -> Any:
    try:
        if after is None:
            # TensorBoard would show an earlier run and this one as a single run.
            for path in folder.glob("events.out.tfevents.*"):
                path.unlink()
        if not wanted:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=0 if after is None else after + 1)
    except OSError as error:
        raise OutputError(f"{folder} can't be written: {error.strerror or error}") from error


def recorded_steps(folder: Path, last: int) -> list[Step]:
    """Return the recorded steps up to the last one of a checkpoint, for the report.

    Raises:
        OutputError: they can't be read.
    """
    names = {field.name for field in dataclasses.fields(Step)}
    unmeasured = {"eval_loss": None, "eval_exact_match": None}
    records = ({**unmeasured, **values} for values in _records(folder / METRICS, last))
    return [Step(**values) for values in records if values.keys() == names]


def _records(path: Path, last: int) -> Iterator[dict[str, Any]]:
    """Yield the records up to a step, or up to a line that a killed process left incomplete."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path} can't be read: {error.strerror}") from error
    for line in lines:
        try:
            values = json.loads(line)
            is_wanted = values["step"] <= last
        except (ValueError, KeyError, TypeError):
            return
        if is_wanted:
            yield values
