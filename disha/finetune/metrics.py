"""The record of each step of a run: lines of JSON, and reports to other programs."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from disha.files import write_files
from disha.finetune.errors import OutputError
from disha.finetune.folder_lock import FolderLock, is_at
from disha.finetune.report import write_text
from disha.finetune.reports import EVENTS, Report, open_reports
from disha.finetune.training.loop import Step
from disha.text import tell

__all__ = ["METRICS", "Metrics", "recorded_steps", "recording"]

METRICS = "metrics.jsonl"


class Metrics:
    """Records steps and evaluations as they come.

    If a file can't be written, a warning says so once, and training continues without it. If the
    folder was deleted, it is made again with all lines recorded so far.

    Args:
        lock: the lock of the run's output folder.
        lines: the file for lines of JSON, if any.
        reports: the open reports, by their names.
    """

    def __init__(
        self,
        lock: FolderLock,
        lines: FileIO | None,
        reports: Mapping[str, Report] | None = None,
    ) -> None:
        self._lock, self._lines = lock, lines
        self._reports = dict(reports or {})

    def record_step(self, step: Step) -> None:
        """Record an optimizer step, without the values that were not measured."""
        self._record({k: v for k, v in dataclasses.asdict(step).items() if v is not None})

    def record_evaluation(self, step: int, eval_loss: float, **others: float) -> None:
        """Record what was measured before the first step, under its names in `Step`."""
        self._record({"step": step, "eval_loss": eval_loss, **others})

    def close(self) -> None:
        """Close the file, and send what remains to the reports."""
        with self._warning_of_failure(METRICS):
            if self._lines is not None:
                self._lines.close()
        for name, report in list(self._reports.items()):
            with self._warning_of_failure(name):
                report.close()

    def _record(self, values: dict[str, Any]) -> None:
        line = (json.dumps(values) + "\n").encode()
        with self._warning_of_failure(METRICS):
            if self._lines is not None:
                self._lock.keep()
                self._lines = self._in_place(self._lines)
                if self._lines.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, report in list(self._reports.items()):
            if values["step"] > report.reported:
                with self._warning_of_failure(name):
                    report.log(_scalars(values), values["step"])

    def _in_place(self, lines: FileIO) -> FileIO:
        """Return the open file; if it was deleted, record everything again, and return the new."""
        path = self._lock.folder / METRICS
        if is_at(path, lines):
            return lines
        lines.seek(0)
        content = lines.read()
        lines.close()
        write_files({path: lambda temporary: Path(temporary).write_bytes(content)})
        if EVENTS in self._reports:
            self._reports |= open_reports([EVENTS], self._lock.folder, {})
            for values in map(json.loads, content.splitlines()):
                self._reports[EVENTS].log(_scalars(values), values["step"])
        return path.open("a+b", buffering=0)

    @contextmanager
    def _warning_of_failure(self, name: str) -> Iterator[None]:
        """If the block can't write, print a warning, and do not write there again."""
        try:
            yield
        except Exception as error:  # the libraries of reports raise anything
            if name != METRICS:
                del self._reports[name]
            elif isinstance(error, OSError):
                self._lines = None
            else:
                raise
            reason = getattr(error, "strerror", None) or error
            tell(
                f"disha: warning: {name} can't be written: {reason}; training "
                "continues, but is no longer recorded there",
                sys.stderr,
            )


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    """Return what reports show of a record."""
    names = ("loss", "learning_rate", "gradient_norm", "tokens_per_second")
    scalars = {f"train/{name}": values[name] for name in names if name in values}
    if (loss := values.get("eval_loss")) is not None:
        scalars |= {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
    if (exact := values.get("eval_exact_match")) is not None:
        scalars["eval/exact_match"] = exact
    return scalars


@contextmanager
def recording(
    lock: FolderLock,
    *,
    reports: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    after: int | None = None,
    main: bool = True,
) -> Iterator[Metrics]:
    """Yield the record of a run. Each line reaches the disk when it is complete.

    Args:
        lock: the lock of the run's output folder.
        reports: the names of the reports to write too.
        settings: the settings of the run, for the reports.
        after: the step after which the run resumes. Later records are removed, because those steps
            are done again. None starts a new record.
        main: whether this process writes.

    Raises:
        OutputError: the files can't be written.
    """
    if not main:
        yield Metrics(lock, None)
        return
    path = lock.folder / METRICS
    before = () if after is None else _records(path, sys.maxsize)
    recorded = max((values["step"] for values in before), default=-1)
    with _open_lines(path, after) as lines:
        opened = open_reports(reports, lock.folder, settings or {}, after=after, recorded=recorded)
        metrics = Metrics(lock, lines, opened)
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
