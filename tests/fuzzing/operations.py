"""Everything that reads or writes files, to be broken at each of its operations on them."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from disha.finetune.training.checkpoints import Checkpoints
from disha.finetune.training.loop import Progress, make_optimizer, training_steps
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import nn

import disha
from disha.cli import main
from disha.finetune.report import write_figure, write_text
from disha.interop import lora, peft
from disha.interop.checkpoints import merge_into_checkpoint, verify_against
from tests.finetune.training.tiny import PLAN, blocks, objective, source
from tests.fuzzing.faults import Faults, Killed

__all__ = ["JOBS", "Job", "Trials"]

SHARDS = "model-0000{}-of-00002.safetensors"


def base() -> nn.Module:
    """Return a model of two layers, with names that llama.cpp knows."""
    torch.manual_seed(0)
    mlp = nn.ModuleDict({"up_proj": nn.Linear(8, 12), "down_proj": nn.Linear(12, 8)})
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": mlp})])})


@functools.cache
def adapted(seed: int) -> nn.Module:
    """Return the base with an adapter of its own values."""
    model = disha.inject_adapters(base(), "_proj$", 4)
    torch.manual_seed(seed)
    with torch.no_grad():
        for block in disha.adapter_parameters(model):
            block.normal_()
    return model


def write_inputs(folder: Path) -> None:
    """Write a checkpoint of two shards, two adapters for it, and one in the form of PEFT."""
    checkpoint = folder / "base"
    checkpoint.mkdir()
    weights = base().state_dict()
    shards = {name: SHARDS.format(1 if "up_proj" in name else 2) for name in weights}
    for shard in set(shards.values()):
        held = {name: weights[name] for name in weights if shards[name] == shard}
        save_file(held, checkpoint / shard, {"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": shards})
    (checkpoint / "model.safetensors.index.json").write_text(index)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "tokenizer").mkdir()
    (checkpoint / "tokenizer" / "vocabulary.txt").write_text("hello\n")
    for name, seed in (("old", 1), ("new", 2)):
        disha.save_adapter(adapted(seed), folder / f"{name}.safetensors")
    peft.export(adapted(2), folder / "peft")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files in a folder by name, without those of drafts."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: path.read_bytes()
        for name, path in sorted(found.items())
        if path.is_file() and ".tmp/" not in name
    }


@dataclass(frozen=True)
class Job:
    """One use of files.

    Args:
        run: does it in a folder; returns what must be the same every time.
        before: fills the folder.
        writes: whether it changes the folder.
        contents: returns the files that it writes.
        points: at how many of its operations the regular tests break it.
    """

    run: Callable[[Path], Any]
    before: Callable[[Path], object] = write_inputs
    writes: bool = True
    contents: Callable[[Path], dict[str, bytes]] = contents
    points: int = 12


def command(words: str) -> Callable[[Path], None]:
    """Return a function that runs `disha`, and raises the one line that it prints if it fails."""

    def run(folder: Path) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words.format(folder).split())
        if code:
            assert err.getvalue().startswith("disha: "), err.getvalue()
            assert err.getvalue().count("\n") == 1, err.getvalue()
            raise disha.DishaError(err.getvalue())

    return run


def saving(write: Callable[[nn.Module, Path], object], target: str, old: bool = True) -> Job:
    """Return the job of writing an adapter, over an older one or where nothing is."""

    def before(folder: Path) -> None:
        if old:
            write(adapted(1), folder / target)

    def run(folder: Path) -> None:
        write(adapted(2), folder / target)

    return Job(run, before)


def converting(form: str) -> Job:
    words = "convert {0}/%s.safetensors {0}/out --overwrite --to " + form

    def before(folder: Path) -> None:
        write_inputs(folder)
        command(words % "old")(folder)

    return Job(command(words % "new"), before, points=3)


def merging(target: str) -> Job:
    def merge(name: str, folder: Path) -> None:
        adapter = folder / f"{name}.safetensors"
        merge_into_checkpoint(folder / "base", adapter, folder / target, overwrite=True)

    def before(folder: Path) -> None:
        write_inputs(folder)
        merge("old", folder)

    return Job(functools.partial(merge, "new"), before)


def combining(folder: Path) -> None:
    write_inputs(folder)
    disha.save_adapter(adapted(1), folder / "out")


def loaded(folder: Path) -> list[Any]:
    model = base()
    disha.load_adapter(model, folder / "new.safetensors")
    return [block.tolist() for block in disha.adapter_parameters(model)]


def loaded_from_peft(folder: Path) -> list[Any]:
    model = base()
    peft.load(model, folder / "peft")
    return [block.tolist() for block in disha.adapter_parameters(model)]


JOBS = {
    "save_adapter": saving(disha.save_adapter, "out"),
    "save_adapter, first": saving(disha.save_adapter, "out", old=False),
    "peft.export": saving(peft.export, "out"),
    "peft.export, first": saving(peft.export, "out", old=False),
    "lora.export": saving(lora.export, "out"),
    "lora.export_gguf": saving(lora.export_gguf, "out"),
    "merge_into_checkpoint": merging("out"),
    "merge_into_checkpoint, a file": merging("out.safetensors"),
    "disha convert --to disha": converting("disha"),
    "disha convert --to peft": converting("peft"),
    "disha merge": Job(
        command("merge {0}/base {0}/new.safetensors {0}/out --overwrite"),
        merging("out").before,
        points=3,
    ),
    "disha combine": Job(
        command("combine --adapter {0}/new.safetensors=0.5 {0}/out --overwrite"),
        combining,
        points=3,
    ),
    "inspect_adapter": Job(
        lambda folder: disha.inspect_adapter(folder / "new.safetensors").layers, writes=False
    ),
    "load_adapter": Job(loaded, writes=False),
    "peft.load": Job(loaded_from_peft, writes=False),
    "verify_against": Job(
        lambda folder: verify_against(folder / "base", folder / "new.safetensors").ok,
        writes=False,
    ),
}


# --- fine-tuning --------------------------------------------------------------------------------


@functools.cache
def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return an objective and its optimizer, after a step."""
    trained = objective()
    optimizer = make_optimizer(trained, PLAN)
    next(training_steps(trained, source(), PLAN, optimizer=optimizer))
    return trained, optimizer


def save_checkpoint(folder: Path, step: int = 3, limit: int | None = 1) -> None:
    torch.manual_seed(0)
    random.seed(0)
    Checkpoints(folder, limit).save(
        *training(), Progress(step), setup={"seed": 0}, history={"losses": [step]}
    )


def checkpoints(folder: Path) -> None:
    """Save three checkpoints, and damage the last."""
    for step in (1, 2, 3):
        save_checkpoint(folder, step, limit=None)
    os.truncate(folder / "checkpoint-3" / "training.pt", 100)


def resumed(folder: Path) -> object:
    checkpoints = Checkpoints(folder)
    saved = checkpoints.newest_good(lambda line: None)
    assert saved is not None
    trained = objective()
    checkpoints.restore(saved, trained, make_optimizer(trained, PLAN))
    return saved.progress, [block.tolist() for block in blocks(trained)]


def figure(*losses: float) -> Figure:
    drawn = Figure()
    drawn.add_subplot().plot(losses)
    return drawn


JOBS |= {
    "Checkpoints.save": Job(
        save_checkpoint, checkpoints, contents=lambda folder: contents(folder / "checkpoint-3")
    ),
    "Checkpoints.restore": Job(resumed, checkpoints, writes=False),
    "Checkpoints.clear": Job(lambda folder: Checkpoints(folder).clear(), save_checkpoint),
    "write_text": Job(
        lambda folder: write_text(folder / "report.json", "{}"),
        lambda folder: write_text(folder / "report.json", "[]"),
    ),
    "write_figure": Job(
        lambda folder: write_figure(folder / "loss.png", figure(1, 2)),
        lambda folder: write_figure(folder / "loss.png", figure(2, 1)),
    ),
}


# --- trials --------------------------------------------------------------------------------------


class Trials:
    """Runs a job in copies of its folder, and lets operations fail.

    Args:
        job: the job.
        folder: an empty folder for the copies.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self._job, self._folder = job, folder
        self._template = folder / "template"
        self._template.mkdir()
        job.before(self._template)
        self._old = job.contents(self._template)
        with self._copy() as folder:
            with Faults(folder)() as faults:
                self._result = job.run(folder)
            self._new = job.contents(folder)
        self.operations = len(faults.done)
        """How many operations on files the job has."""
        assert self.operations
        assert job.writes == (self._old != self._new)

    def fail(self, at: int, code: int, lasting: bool = False) -> None:
        """Let one operation fail.

        Args:
            at: its number.
            code: the number of the error.
            lasting: let all later ones fail too.

        Raises:
            AssertionError: something is lost, or left behind.
            Exception: the job raised something other than a `DishaError`.
        """
        says = ""
        with self._copy() as folder:
            faults = Faults(folder, at, code, lasting)
            try:
                with faults():
                    assert self._job.run(folder) == self._result
            except disha.DishaError as error:
                says = str(error)
            what = f"{errno.errorcode[code]} at {faults.failed}: {says}"
            if not lasting:
                left = self._job.contents(folder)
                assert left == self._new or (says and left == self._old), what
                # A draft stays only if it is the draft that can't be removed.
                assert left == self._new or not _drafts(folder), what
            self._check(folder, what)

    def kill(self, at: int) -> None:
        """Let the process die before one of the operations.

        Args:
            at: its number.

        Raises:
            AssertionError: something is lost, or left behind.
        """
        with self._copy() as folder:
            faults = Faults(folder, at)
            with contextlib.suppress(Killed), faults():
                self._job.run(folder)
            self._check(folder, f"killed at {faults.failed}")

    def _check(self, folder: Path, what: str) -> None:
        """Check that the old files are there or the new ones, and that the job works now."""
        there = {path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert any(there.issuperset(whole.values()) for whole in (self._old, self._new)), what
        with mock.patch.object(os, "fsync"):
            assert self._job.run(folder) == self._result, what
        assert self._job.contents(folder) == self._new, what
        assert not _drafts(folder), what

    @contextlib.contextmanager
    def _copy(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            yield Path(shutil.copytree(self._template, Path(name, "copy")))


def _drafts(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
