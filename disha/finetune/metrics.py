"""What a run records step by step: lines of JSON, and events for TensorBoard."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from disha.finetune.errors import OutputError
from disha.finetune.report import write_file
from disha.finetune.training.loop import Step

__all__ = ["METRICS", "Metrics", "recorded_steps", "recording"]

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"


class Metrics:
    """Records steps and evaluations as they come.

    Where the disk takes no more, that is said once, and training goes on without: what is learned
    is worth more than the record of it.

    Args:
        lines: where lines of JSON go, if anywhere.
        events: TensorBoard's writer, if asked for.
    """

    def __init__(self, lines: FileIO | None, events: Any = None) -> None:
        self._lines, self._events = lines, events

    def record_step(self, step: Step) -> None:
        """Record an optimiser step, without what was not measured."""
        values = {k: v for k, v in dataclasses.asdict(step).items() if v is not None}
        self._line(values)
        for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second"):
            self._event(f"train/{name}", values[name], step.step)
        if step.eval_loss is not None:
            self._evaluation_events(step.step, step.eval_loss)

    def record_evaluation(self, step: int, loss: float) -> None:
        """Record the held-out loss before the first step."""
        self._line({"step": step, "eval_loss": loss})
        self._evaluation_events(step, loss)

    def close(self) -> None:
        """Bring the events to the disk."""
        if self._events is not None:
            _managed(EVENTS, self._events.close)

    def _line(self, values: dict[str, Any]) -> None:
        if self._lines is not None and not _managed(METRICS, lambda: self._write(values)):
            self._lines = None

    def _write(self, values: dict[str, Any]) -> None:
        assert self._lines is not None
        line = (json.dumps(values) + "\n").encode()
        if self._lines.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _evaluation_events(self, step: int, loss: float) -> None:
        self._event("eval/loss", loss, step)
        self._event("eval/perplexity", math.exp(min(loss, 700.0)), step)

    def _event(self, name: str, value: float, step: int) -> None:
        events = self._events
        if events is not None and not _managed(
            EVENTS, lambda: events.add_scalar(name, value, step)
        ):
            self._events = None


@contextmanager
def recording(
    folder: Path, *, tensorboard: bool = False, after: int | None = None, main: bool = True
) -> Iterator[Metrics]:
    """Yield what records a run; each line reaches the disk when it is complete.

    Args:
        folder: where the run writes.
        tensorboard: whether to write events too.
        after: the step after which the run goes on: what was recorded later is cut off, as those
            steps are done again; None for a run from its beginning.
        main: whether this process is the one that writes.

    Raises:
        OutputError: the files can't be written.
    """
    if not main:
        yield Metrics(None)
        return
    with _lines(folder / METRICS, after) as lines:
        if after is None:
            _remove_events(folder / EVENTS)
        metrics = Metrics(lines, _events(folder / EVENTS, after) if tensorboard else None)
        with _event_thread_quiet():
            try:
                yield metrics
            finally:
                metrics.close()


def recorded_steps(folder: Path, last: int) -> list[Step]:
    """The steps that were recorded, up to the last of a checkpoint; for the report only.

    Raises:
        OutputError: they can't be read.
    """
    names = {field.name for field in dataclasses.fields(Step)}
    records = ({"eval_loss": None, **values} for values in _records(folder / METRICS, last))
    return [Step(**values) for values in records if values.keys() == names]


def _managed(name: str, write: Callable[[], object]) -> bool:
    try:
        write()
    except OSError as error:
        print(
            f"disha: warning: {name} can't be written: {error.strerror or error}; training goes "
            "on, but is no longer recorded there",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True


def _lines(path: Path, after: int | None) -> FileIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if after is None:
            return path.open("wb", buffering=0)
        kept = [json.dumps(values) + "\n" for values in _records(path, after)]
        write_file(path, "".join(kept).encode())
        return path.open("ab", buffering=0)
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror or error}") from error


def _records(path: Path, last: int) -> Iterator[dict[str, Any]]:
    """What was recorded up to a step, and up to a line that the end of a process has cut."""
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


def _remove_events(folder: Path) -> None:
    """Remove what an earlier run recorded, which TensorBoard would show as one with this one."""
    for path in folder.glob("events.out.tfevents.*"):
        try:
            path.unlink()
        except OSError as error:
            raise OutputError(f"{path} can't be removed: {error.strerror}") from error


@contextmanager
def _event_thread_quiet() -> Iterator[None]:
    """Keep the traceback of TensorBoard's thread from being printed.

    The error that ends the thread is raised again where the next event is recorded, and said there.
    """
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        of_events = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (of_events and issubclass(arguments.exc_type, OSError)):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _events(folder: Path, after: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    purged = 0 if after is None else after + 1
    try:
        return SummaryWriter(str(folder), purge_step=purged)
    except OSError as error:
        raise OutputError(f"{folder} can't be written: {error.strerror or error}") from error
