from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import re
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import disha
from disha.finetune.errors import OutputError, SettingsError
from disha.finetune.hashing import file_hash
from disha.finetune.training import checkpoints
from disha.finetune.training.checkpoints import Checkpoints
from disha.finetune.training.loop import Progress, make_optimizer, training_steps
from tests.finetune.training.tiny import (
    PackedPairs,
    blocks,
    examples,
    objective,
    plan,
    same,
    source,
)
from tests.fuzzing.faults import Faults, Killed

SETUP = {"seed": 0, "learning_rate": 0.01}


class Run:
    """A training with checkpoints in a folder."""

    def __init__(self, folder, rows=None, choices=None, limit=None, **options):
        self.rows = source(13) if rows is None else rows
        self.plan = plan(num_train_epochs=3.0) if choices is None else choices
        self.objective = objective(dropout=0.2, **options)
        self.optimizer = make_optimizer(self.objective, self.plan)
        self.checkpoints = Checkpoints(folder, limit)
        self.losses = []
        torch.manual_seed(3)

    def restore(self, report=pytest.fail):
        saved = self.checkpoints.newest_good(report)
        self.checkpoints.restore(saved, self.objective, self.optimizer)
        self.losses = list(saved.history["losses"])
        return saved

    def train(self, start=None, steps=None, save=True):
        """Train some steps, or to the end, saving after each; return the losses so far."""
        training = training_steps(
            self.objective, self.rows, self.plan, optimizer=self.optimizer, start=start
        )
        for step in itertools.islice(training, steps):
            self.losses.append(step.loss)
            if save:
                self.save(step.progress)
        return self.losses

    def save(self, progress):
        return self.checkpoints.save(
            self.objective,
            self.optimizer,
            progress,
            setup=SETUP,
            history={"losses": self.losses},
        )


def saved_steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.iterdir())


def is_good(folder):
    try:
        return checkpoints._read(folder) is not None
    except checkpoints._DamagedError:
        return False


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Checkpoints of three steps."""
    folder = tmp_path_factory.mktemp("three")
    Run(folder).train(steps=3)
    return folder


@pytest.fixture
def copied(three, tmp_path):
    return shutil.copytree(three, tmp_path / "copied")


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 11])
@pytest.mark.parametrize(
    ("rows", "choices"),
    [
        (source(13), plan(num_train_epochs=3.0)),
        (PackedPairs(examples(13), 2, 0), plan(num_train_epochs=6.0, lr_scheduler_type="linear")),
        (source(5, size=1), plan(num_train_epochs=4.0, gradient_accumulation_steps=3, bf16=True)),
    ],
    ids=["apart", "packed", "odd"],
)
def test_training_goes_on_bit_for_bit(tmp_path, rows, choices, steps):
    straight = Run(tmp_path / "straight", rows, choices)
    expected = straight.train(save=False)
    steps = min(steps, len(expected) - 1)
    Run(tmp_path / "parted", rows, choices).train(steps=steps)
    resumed = Run(tmp_path / "parted", rows, choices)
    torch.manual_seed(99)  # which is not what counts
    saved = resumed.restore()
    assert saved.progress.step == steps
    assert resumed.train(saved.progress, save=False) == expected
    assert same(blocks(resumed.objective), blocks(straight.objective))


def test_a_checkpoint_holds_what_it_says(three):
    newest = three / "checkpoint-3"
    assert sorted(path.name for path in newest.iterdir()) == [
        *("adapter.safetensors", "manifest.json", "training.pt")
    ]
    run = Run(three)
    saved = run.restore()
    assert saved.folder == newest
    assert saved.setup == SETUP
    assert saved.progress == Progress(3, 1, 6, saved.progress.seconds)
    loaded = disha.load_adapter(objective().model, newest / "adapter.safetensors", replace=True)
    assert len(loaded.matched) == len(blocks(run.objective))
    names = {name for name, p in run.objective.named_parameters() if p.requires_grad}
    assert saved.optimizer["state"].keys() == names
    assert {key for state in saved.optimizer["state"].values() for key in state} == {
        *("exp_avg", "exp_avg_sq", "step")
    }


def test_the_newest_is_the_one_of_the_most_steps(copied):
    shutil.copytree(copied / "checkpoint-3", copied / "checkpoint-12")  # after 3, not before it
    (copied / "checkpoint-x").mkdir()
    (copied / "checkpoint-99").touch()
    assert Checkpoints(copied).newest_good(pytest.fail).folder == copied / "checkpoint-12"


def test_nothing_to_resume_from(tmp_path):
    assert Checkpoints(tmp_path).newest_good(pytest.fail) is None
    assert Checkpoints(tmp_path / "absent").newest_good(pytest.fail) is None


def test_other_parameters_to_train_are_named(three):
    run = Run(three)
    run.objective.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(SettingsError, match=r"only this run trains model\.model\.norm\.weight"):
        run.restore()


# --- damage --------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_other_version(path):
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 9}))


def holding(content):
    """A training.pt of something else, for which the manifest is right."""

    def damage(path):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        path.write_bytes(buffer.getvalue())
        described = {
            name: file_hash(path.parent / name) for name in ("adapter.safetensors", "training.pt")
        }
        (path.parent / "manifest.json").write_text(json.dumps({"format": 1, "files": described}))

    return damage


def writing(content):
    return lambda path: path.write_bytes(content)


DAMAGES = [
    ("adapter.safetensors", cut, "adapter.safetensors is damaged: its SHA-256"),
    ("adapter.safetensors", flip, "adapter.safetensors is damaged: its SHA-256"),
    ("adapter.safetensors", os.remove, "adapter.safetensors can't be read: No such file"),
    ("training.pt", cut, "training.pt is damaged: its SHA-256"),
    ("training.pt", flip, "training.pt is damaged: its SHA-256"),
    ("training.pt", os.remove, "training.pt can't be read: No such file"),
    ("training.pt", holding({"progress": {}}), "training.pt can't be used"),
    ("training.pt", holding(nn.Linear(1, 1)), "training.pt can't be used"),
    ("manifest.json", os.remove, "manifest.json can't be read: No such file"),
    ("manifest.json", writing(b"garbage"), "manifest.json is damaged"),
    ("manifest.json", writing(b"[]"), "manifest.json is damaged"),
    ("manifest.json", writing(b'{"format": 1, "files": 3}'), "manifest.json is damaged"),
    ("manifest.json", writing(b"\xff"), "manifest.json is damaged"),
    ("manifest.json", of_other_version, "its format is 9, and this version reads 1"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(copied, name, damage, message):
    damage(copied / "checkpoint-3" / name)
    said = []
    saved = Checkpoints(copied).newest_good(said.append)
    assert saved.folder == copied / "checkpoint-2"
    [line] = said
    assert line.startswith(f"{copied / 'checkpoint-3'} is skipped: ")
    assert re.search(message, line)


def test_several_damaged_checkpoints_are_passed_over(copied):
    cut(copied / "checkpoint-3" / "training.pt")
    shutil.rmtree(copied / "checkpoint-2")
    (copied / "checkpoint-2").mkdir()
    said = []
    saved = Checkpoints(copied).newest_good(said.append)
    assert (saved.progress.step, len(said)) == (1, 2)


def test_no_whole_checkpoint_is_refused(copied):
    for step in (1, 2, 3):
        cut(copied / f"checkpoint-{step}" / "training.pt")
    with pytest.raises(
        SettingsError, match=r"every checkpoint in .* is damaged; leave --resume out"
    ):
        Checkpoints(copied).newest_good(lambda line: None)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(["adapter.safetensors", "training.pt"]), st.data())
def test_any_changed_byte_is_noticed(copied, name, data):
    path = copied / "checkpoint-3" / name
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        assert not is_good(copied / "checkpoint-3")
    finally:
        path.write_bytes(whole)
    assert is_good(copied / "checkpoint-3")


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(copied):
    straight = Run(copied.parent / "straight")
    expected = straight.train(steps=4)
    cut(copied / "checkpoint-3" / "training.pt")
    run = Run(copied)
    saved = run.restore(report=lambda line: None)
    assert run.train(saved.progress, steps=2) == expected
    assert saved_steps(copied) == [1, 2, 3, 4]
    assert Run(copied).restore().progress.step == 4
    assert is_good(copied / "checkpoint-3")


# --- which are kept ------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4]), (1, [4]), (2, [3, 4])])
def test_the_oldest_are_removed(tmp_path, limit, kept):
    Run(tmp_path, limit=limit).train(steps=4)
    assert saved_steps(tmp_path) == kept


def test_the_oldest_goes_only_once_the_newest_is_complete(tmp_path, monkeypatch):
    run = Run(tmp_path, limit=1)
    run.train(steps=1)
    seen = []
    original = os.rename

    def rename(old, new):
        seen.append((saved_steps_of_good(tmp_path), os.path.basename(new).split(".")[0]))
        original(old, new)

    monkeypatch.setattr(os, "rename", rename)
    run.train(Progress(1, 1, 2), steps=1)
    assert seen == [([1, 2], "")]


def saved_steps_of_good(folder):
    paths = folder.glob("checkpoint-*")
    return sorted(int(path.name.split("-")[1]) for path in paths if is_good(path))


def test_a_limit_removes_what_this_run_has_gone_back_behind(copied):
    """Of the three, the newest is damaged: training goes on from the second, and saves step 3."""
    cut(copied / "checkpoint-3" / "training.pt")
    os.rename(copied / "checkpoint-3", copied / "checkpoint-9")
    run = Run(copied, limit=2)
    run.train(run.restore(report=lambda line: None).progress, steps=1)
    assert saved_steps(copied) == [2, 3]


def test_saving_a_step_again_changes_nothing(tmp_path):
    run = Run(tmp_path)
    run.train(steps=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-1").iterdir()}
    assert run.save(Progress(1, 1, 2)) == tmp_path / "checkpoint-1"
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoint-1").iterdir()}


def test_the_time_that_templates_saw_is_known_before_the_rest_is_read(copied):
    assert Checkpoints(copied).earlier_now() is None
    run = Run(copied)
    run.restore()
    history = {"losses": run.losses}
    run.checkpoints.save(
        run.objective, run.optimizer, Progress(4, 1, 7), setup=SETUP, history=history, now=12.5
    )
    assert Checkpoints(copied).earlier_now() == 12.5
    (copied / "checkpoint-9").mkdir()  # damaged
    assert Checkpoints(copied).earlier_now() == 12.5
    assert Checkpoints(copied / "absent").earlier_now() is None


def test_a_step_whose_checkpoint_was_deleted_is_saved_again(tmp_path):
    run = Run(tmp_path)
    run.train(steps=1)
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert run.save(Progress(1, 1, 2)) == tmp_path / "checkpoint-1"
    assert is_good(tmp_path / "checkpoint-1")


def test_checkpoints_of_an_earlier_run_can_be_removed(copied):
    (copied / "adapter.safetensors").touch()
    (copied / "checkpoint-notes").mkdir()
    Checkpoints(copied).clear()
    assert sorted(path.name for path in copied.iterdir()) == [
        *("adapter.safetensors", "checkpoint-notes")
    ]
    Checkpoints(copied / "absent").clear()


def test_a_checkpoint_that_can_not_be_removed_is_named(copied, monkeypatch):
    def refuse(old, new):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OutputError, match=r"checkpoint-3 can't be removed: Permission denied"):
        Checkpoints(copied).clear()


def test_the_newest_is_known_after_saving_and_resuming(copied):
    run = Run(copied)
    assert run.checkpoints.newest is None
    run.restore()
    assert run.checkpoints.newest == copied / "checkpoint-3"


def test_a_parameter_without_a_gradient_has_no_state_and_goes_on(tmp_path):
    def spare(run):
        run.objective.model.spare = nn.Parameter(torch.ones(3))
        run.optimizer = make_optimizer(run.objective, run.plan)
        return run

    expected = spare(Run(tmp_path / "straight")).train(save=False)
    spare(Run(tmp_path / "parted")).train(steps=2)
    resumed = spare(Run(tmp_path / "parted"))
    assert resumed.train(resumed.restore().progress, save=False) == expected


# --- saves that fail or die ----------------------------------------------------------------------


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_newest_good_one(copied, monkeypatch):
    before = saved_steps(copied)
    run = Run(copied)
    saved = run.restore()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="checkpoint-4 can't be written: No space") as raised:
        run.train(saved.progress, steps=1)
    assert f"make room, and resume from {copied / 'checkpoint-3'}" in str(raised.value)
    assert ".tmp" not in str(raised.value)
    assert saved_steps(copied) == before  # and no part of a new one


def test_a_full_disk_at_the_first_save(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_complete", full)
    with pytest.raises(OutputError, match="make room, and start again"):
        Run(tmp_path / "new").train(steps=1)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"can't be written: .*; fix that, and start again"):
        Run(tmp_path / "file" / "new").train(steps=1)


def test_a_full_disk_while_the_adapter_is_written(copied, monkeypatch):
    run = Run(copied)
    saved = run.restore()
    monkeypatch.setattr(disha, "save_adapter", full)
    with pytest.raises(OutputError, match=r"resume from .*checkpoint-3, the newest, with --resume"):
        run.train(saved.progress, steps=1)
    assert saved_steps(copied) == [1, 2, 3]


class Death(BaseException):
    """What SIGKILL looks like to the files: nothing is done after it."""


def dying_at(monkeypatch, call):
    """Let the process die at the nth call that changes what is on the disk."""
    calls = itertools.count()
    for name in ("fsync", "rename", "replace", "mkdir", "open"):
        original = getattr(os, name)

        def wrapped(*arguments, original=original, **options):
            if next(calls) == call:
                raise Death
            return original(*arguments, **options)

        monkeypatch.setattr(os, name, wrapped)


def test_a_save_that_dies_anywhere_leaves_a_whole_checkpoint(copied, monkeypatch):
    run = Run(copied, limit=1)
    progress = run.restore().progress
    survivors = set()
    for call in itertools.count():
        with pytest.MonkeyPatch.context() as patch:
            dying_at(patch, call)
            try:
                run.save(Progress(4, progress.epoch, progress.batches))
                break
            except Death:
                run.checkpoints._newest = None
        found = Checkpoints(copied).newest_good(pytest.fail)
        survivors.add(found.progress.step)
    assert call > 8
    assert survivors == {3, 4}
    assert saved_steps(copied) == [4]  # and nothing is left of those that died


@pytest.mark.parametrize("then", ["resume", "save the next step"])
def test_a_save_killed_while_it_replaces_a_damaged_one_is_not_lost(copied, tmp_path, then):
    """Once the new one is complete, it is there after what comes next."""
    cut(copied / "checkpoint-3" / "training.pt")
    run, survivors = Run(copied), []
    progress = run.restore(lambda line: None).progress

    def save_until(at, folder):
        run.checkpoints, faults = Checkpoints(folder), Faults(folder, at)
        with contextlib.suppress(Killed), faults():
            run.save(Progress(3, progress.epoch, progress.batches))
        return faults.done

    done = save_until(None, shutil.copytree(copied, tmp_path / "whole"))
    renames = [at for at, operation in enumerate(done) if operation.startswith(("rena", "repl"))]
    for at in [moment for rename in renames for moment in (rename, rename + 1)]:
        folder = shutil.copytree(copied, tmp_path / str(at))
        save_until(at, folder)
        if then != "resume":
            run.checkpoints = Checkpoints(folder)
            run.save(Progress(4, progress.epoch, progress.batches))
            shutil.rmtree(folder / "checkpoint-4")
        survivors.append(Checkpoints(folder).newest_good(lambda line: None).progress.step)
        assert saved_steps(folder) == [1, 2, 3]  # and nothing is left of the one that died
    assert set(survivors) == {2, 3}
    assert survivors == sorted(survivors)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_checkpoint_that_can_not_be_read_is_not_passed_over(copied, code):
    """It may be good, and training from an earlier one would replace it."""
    faults = Faults(copied)
    with faults():
        Checkpoints(copied).newest_good(pytest.fail)
    opening = [at for at, done in enumerate(faults.done) if done.startswith("open ")]
    assert len(opening) > 3
    says = "checkpoint-3 can't be read: .*; fix that, or delete it"
    for at in opening:
        with Faults(copied, at, code)(), pytest.raises(OutputError, match=says):
            Checkpoints(copied).newest_good(pytest.fail)


def test_leftovers_of_killed_saves_are_cleared_by_the_next(copied):
    (copied / ".checkpoint-2.0123456789abcdef.tmp").mkdir()
    (copied / ".checkpoint-2.0123456789abcdef.tmp" / "training.pt").touch()
    (copied / ".other.tmp").mkdir()
    run = Run(copied)
    run.train(run.restore().progress, steps=1)
    assert sorted(path.name for path in copied.iterdir()) == [
        ".other.tmp",
        *(f"checkpoint-{step}" for step in (1, 2, 3, 4)),
    ]
