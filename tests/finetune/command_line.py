"""The command `disha finetune`: rows and arguments for it, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from disha.cli import main
from disha.finetune import course
from disha.finetune.settings import FinetuneSettings

ROWS: Sequence[Mapping[str, Any]] = [
    {
        "query": f"say {word} {number}",
        "response": f"{word} " * 3 + "hello",
        "type": "GSM_Rephrased",
        "original_question": f"what is {word}?",
    }
    for word in ("hello", "world", "well", "yellow", "hollow")
    for number in range(8)
]
"""In the fields of MetaMathQA."""

FILES = {
    "adapter.safetensors",
    "learning_rate.png",
    "loss.png",
    "metrics.jsonl",
    "report.json",
    "samples.md",
}
"""What a plain run writes."""

TIMES = {"seconds", "tokens_per_second"}
"""What differs between runs that are the same otherwise."""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]] = ROWS) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments(model: Path, data: Path | None, output: Path, /, **changes: Any):
    """The words of a short run, after `disha`. A flag with the value None is left out."""
    flags = {
        "base_model_name_or_path": model,
        "data_path": data,
        "output_dir": output,
        "bone_r": 8,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "max_seq_length": 96,
        **changes,
    }
    words = ["finetune"]
    for name, value in flags.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if value is not None:
            words += [f"--{name}", *map(str, values)]
    return words


def with_values(settings: FinetuneSettings, **values: Any) -> FinetuneSettings:
    """Return settings with other values for some, named as flags are."""
    changes: dict[str, Any] = {}
    for one in dataclasses.fields(settings):
        group = getattr(settings, one.name)
        if dataclasses.is_dataclass(group):
            known = {inner.name for inner in dataclasses.fields(group)}
            of_group = {name: values.pop(name) for name in known & values.keys()}
            changes[one.name] = dataclasses.replace(group, **of_group)
    return dataclasses.replace(settings, **changes, **values)


@dataclass(frozen=True)
class Done:
    """What a command has left: its exit code and what it has printed."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on stderr."""
        assert self.err.startswith("disha"), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err


class Runner:
    """Runs `disha finetune` in this process.

    Args:
        capsys: pytest's.
        folder: where rows and results go, unless said otherwise.
        model: the base model, unless said otherwise.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path, model: Path) -> None:
        self._capsys = capsys
        self.model = model
        self.data = write_rows(folder / "rows.jsonl")
        self.output = folder / "out"

    def __call__(self, *words: str, **changes: Any) -> Done:
        """Run with other flags than the usual, and more words."""
        return self.other(*arguments(self.model, self.data, self.output, **changes), *words)

    def other(self, *words: object) -> Done:
        """Run any command of `disha`."""
        self._capsys.readouterr()
        code = main([str(word) for word in words])
        return Done(code, *self._capsys.readouterr())

    def good(self, *words: str, **changes: Any) -> dict[str, Any]:
        """Run, which must go well, and return the report."""
        done = self(*words, **changes)
        assert done.code == 0, done.err
        return report_of(Path(changes.get("output_dir", self.output)))


def report_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


def metrics_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def adapter_of(output: Path) -> bytes:
    return (output / "adapter.safetensors").read_bytes()


def losses_of(output: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(output) if "loss" in line]


def timeless(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without what differs between runs that are the same otherwise."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def result_of(output: Path) -> dict[str, Any]:
    """Everything that must be equal where two runs are the same."""
    report = report_of(output)
    return {
        "adapter": adapter_of(output),
        "metrics": timeless(metrics_of(output)),
        "loss": report["loss"],
        "samples": report["samples"],
    }


def after_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Let something happen right after an optimizer step, before a checkpoint is saved."""
    showing = course.showing_progress

    @contextmanager
    def showing_and_acting(*arguments: Any, **options: Any):
        with showing(*arguments, **options) as show:

            def show_and_act(step: Any) -> None:
                show(step)
                if step.step == number:
                    action()

            yield show_and_act

    monkeypatch.setattr(course, "showing_progress", showing_and_acting)


class Killed(BaseException):
    """The process is gone; nothing of the command catches this."""


def killed_after(step: int, run: Callable[[], Any]) -> None:
    """Run until a step is done, and then no further."""

    def kill() -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, step, kill)
        with pytest.raises(Killed):
            run()


def interrupted_after(step: int, run: Callable[[], Done], number: int = signal.SIGINT) -> Done:
    """Run, and send a signal after a step; the next one notices."""
    # A test run that was started in the background has been told to ignore Ctrl-C.
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            after_step(patch, step, lambda: signal.raise_signal(number))
            return run()
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
