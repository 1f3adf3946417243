"""Reports: the libraries of other programs send them what a run records.

Each program is a row of `OPENERS`. Its library is imported only if its report is asked for. It is
set up as usual, such as by ``WANDB_MODE`` or ``MLFLOW_TRACKING_URI``.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from disha import DishaError
from disha.files import read_text
from disha.finetune.errors import OutputError
from disha.finetune.report import write_text

__all__ = ["EVENTS", "Report", "open_reports"]

EVENTS = "tensorboard"
RUNS = "reports.json"
"""The file with the names that other programs gave to this run. A resumed run needs them."""

PROJECT = "disha"
LONGEST_VALUE = 500
"""How many characters of a setting are sent to MLflow."""


@dataclass(frozen=True)
class Report:
    """An open report.

    Args:
        log: takes numbers by their names, and the step.
        close: sends what remains.
        run: the program's name of the run; None if the program needs only the folder.
        reported: the last step that is already reported. Steps up to it are not reported again.
    """

    log: Callable[[dict[str, float], int], object]
    close: Callable[[], object]
    run: str | None = None
    reported: int = -1


Opener: TypeAlias = Callable[[Path, Mapping[str, Any], "str | None", "int | None"], Report]
"""Opens a report. It takes the output folder, the settings, and the run and step to go on from."""


def open_reports(
    names: Iterable[str],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    after: int | None = None,
    recorded: int = -1,
) -> dict[str, Report]:
    """Open reports, and go on with those of the same run.

    Args:
        names: the names of the reports, from `OPENERS`.
        folder: the output folder.
        settings: the settings of the run.
        after: the step after which the run resumes; None for a new run.
        recorded: the last step that was recorded before the run resumed. The steps from `after` to
            this one are done again with the same result, and are not reported twice.

    Raises:
        OutputError: a report can't be opened.
    """
    path = folder / RUNS
    runs = _earlier_runs(path, after)
    opened: dict[str, Report] = {}
    for name in names:
        run = runs.get(name)
        try:
            report = OPENERS[name](folder, settings, run, after)
        except Exception as error:  # other libraries raise anything
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise OutputError(f"the report to {name} can't be written: {reason}") from error
        reported = -1 if run is None else recorded
        opened[name] = Report(report.log, report.close, report.run, reported)
    runs |= {name: report.run for name, report in opened.items() if report.run}
    if runs:
        write_text(path, json.dumps(runs))
    return opened


def _earlier_runs(path: Path, after: int | None) -> dict[str, Any]:
    """Return the runs to go on with. For a new run, remove what an earlier one has left."""
    try:
        if after is not None:
            return dict(json.loads(read_text(path))) if path.exists() else {}
        # TensorBoard would show an earlier run and this one as a single run.
        for stale in (path, *(path.parent / EVENTS).glob("events.out.tfevents.*")):
            stale.unlink(missing_ok=True)
    except (OSError, DishaError, ValueError, TypeError) as error:
        raise OutputError(f"{path} can't be used: {error}; remove it") from error
    return {}


def _tensorboard(
    folder: Path, settings: Mapping[str, Any], run: str | None, after: int | None
) -> Report:
    from torch.utils.tensorboard import SummaryWriter

    events = folder / EVENTS
    # Purging removes later steps, which are reported again.
    writer = SummaryWriter(str(events), purge_step=0 if after is None else after + 1)
    if after is None:
        lines = "\n".join(f"    {name}: {value}" for name, value in settings.items())
        writer.add_text("settings", lines)

    def log(scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return Report(log, writer.close)


def _wandb(folder: Path, settings: Mapping[str, Any], run: str | None, after: int | None) -> Report:
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    key = run or uuid.uuid4().hex[:8]
    config = dict(settings) if run is None else None
    opened = wandb.init(project=project, name=folder.name, id=key, config=config, resume="allow")
    return Report(lambda scalars, step: opened.log(scalars, step=step), opened.finish, key)


def _trackio(
    folder: Path, settings: Mapping[str, Any], run: str | None, after: int | None
) -> Report:
    import trackio

    key = run or f"{folder.name}-{uuid.uuid4().hex[:8]}"
    # Without settings, a resumed run would lose those that it has.
    config = dict(settings)
    opened = trackio.init(project=PROJECT, name=key, config=config, resume="allow", embed=False)
    return Report(lambda scalars, step: opened.log(scalars, step=step), opened.finish, key)


def _mlflow(
    folder: Path, settings: Mapping[str, Any], run: str | None, after: int | None
) -> Report:
    import mlflow

    opened = mlflow.start_run(run_id=run, run_name=folder.name)
    if run is None:
        mlflow.log_params({name: str(value)[:LONGEST_VALUE] for name, value in settings.items()})
    return Report(
        lambda scalars, step: mlflow.log_metrics(scalars, step=step),
        mlflow.end_run,
        opened.info.run_id,
    )


OPENERS: Mapping[str, Opener] = {
    EVENTS: _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
