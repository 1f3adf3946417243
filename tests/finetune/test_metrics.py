from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys

import pytest

from disha.finetune.errors import OutputError
from disha.finetune.folder_lock import FolderLock
from disha.finetune.metrics import recorded_steps, recording
from disha.finetune.training.loop import Step
from tests.fuzzing.faults import Faults


def step(number, eval_loss=None):
    return Step(number, 1, 3.0 / number, 1e-3, 1.5, 40, 200.0, 0.2 * number, eval_loss)


def lines_in(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars_in(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


def test_metrics_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match=r"metrics\.jsonl can't be written"),
        recording(FolderLock(tmp_path / "file")),
    ):
        pass


def test_a_line_is_on_disk_when_it_is_complete(tmp_path):
    folder = tmp_path / "new"
    with recording(FolderLock(folder)) as metrics:
        metrics.record_evaluation(0, 3.5)
        metrics.record_step(step(1))
        metrics.record_step(step(2, eval_loss=2.5))
        before, first, second = lines_in(folder)
    assert before == {"step": 0, "eval_loss": 3.5}
    assert first["step"] == 1
    assert "eval_loss" not in first
    assert second["eval_loss"] == 2.5
    assert {"loss", "learning_rate", "tokens_per_second", "seconds"} <= second.keys()


def test_an_error_at_any_operation_is_ours_or_a_warning(tmp_path, capsys):
    def record(folder, at=None):
        faults = Faults(folder, at, errno.EIO)
        lock = FolderLock(folder)
        with lock.held(), faults(), recording(lock) as metrics:
            metrics.record_step(step(1))
        return faults.done

    refused = 0
    for at in range(len(record(tmp_path / "whole"))):
        folder = tmp_path / str(at)
        try:
            record(folder, at)
        except OutputError:
            refused += 1
        else:
            is_there = len(lines_in(folder)) == 1
            assert is_there or "metrics.jsonl can't be written: Input" in capsys.readouterr().err
    assert refused


def test_a_new_run_starts_a_new_file(tmp_path):
    for number in (1, 2):
        with recording(FolderLock(tmp_path)) as metrics:
            metrics.record_step(step(number))
    assert [line["step"] for line in lines_in(tmp_path)] == [2]


def test_going_on_cuts_off_what_is_done_again_and_what_was_cut(tmp_path):
    with recording(FolderLock(tmp_path)) as metrics:
        metrics.record_evaluation(0, 3.5)
        for number in range(1, 6):
            metrics.record_step(step(number))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with recording(FolderLock(tmp_path), after=3) as metrics:
        metrics.record_step(step(4, eval_loss=1.5))
    found = lines_in(tmp_path)
    assert [line["step"] for line in found] == [0, 1, 2, 3, 4]
    assert found[-1]["eval_loss"] == 1.5


def test_going_on_without_a_file_starts_one(tmp_path):
    with recording(FolderLock(tmp_path), after=3) as metrics:
        metrics.record_step(step(4))
    assert [line["step"] for line in lines_in(tmp_path)] == [4]


def test_other_processes_than_the_main_one_write_nothing(tmp_path):
    with recording(FolderLock(tmp_path), reports=["tensorboard"], main=False) as metrics:
        metrics.record_evaluation(0, 3.5)
        metrics.record_step(step(1))
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_what_was_recorded(tmp_path):
    with recording(FolderLock(tmp_path), reports=["tensorboard"]) as metrics:
        metrics.record_evaluation(0, 3.5)
        metrics.record_step(step(1))
        metrics.record_step(step(2, eval_loss=2.5))
    assert scalars_in(tmp_path, "train/loss") == [(1, 3.0), (2, 1.5)]
    assert scalars_in(tmp_path, "train/learning_rate") == [(1, 1e-3), (2, 1e-3)]
    assert scalars_in(tmp_path, "train/gradient_norm") == [(1, 1.5), (2, 1.5)]
    assert scalars_in(tmp_path, "train/tokens_per_second") == [(1, 200.0), (2, 200.0)]
    assert scalars_in(tmp_path, "eval/loss") == [(0, 3.5), (2, 2.5)]
    assert scalars_in(tmp_path, "eval/perplexity") == [(0, math.exp(3.5)), (2, math.exp(2.5))]


def test_tensorboard_shows_no_step_twice_where_a_run_goes_on(tmp_path):
    with recording(FolderLock(tmp_path), reports=["tensorboard"]) as metrics:
        for number in range(1, 6):
            metrics.record_step(step(number))
    with recording(FolderLock(tmp_path), reports=["tensorboard"], after=3) as metrics:
        metrics.record_step(step(4))
    assert [number for number, _ in scalars_in(tmp_path, "train/loss")] == [1, 2, 3, 4]


def test_tensorboard_shows_nothing_of_an_earlier_run_where_one_begins_anew(tmp_path):
    for last in (5, 2):
        with recording(FolderLock(tmp_path), reports=["tensorboard"]) as metrics:
            for number in range(1, last + 1):
                metrics.record_step(step(number))
    assert [number for number, _ in scalars_in(tmp_path, "train/loss")] == [1, 2]


# --- what can't be written or read ----------------------------------------------------------------

RECORD_WITHOUT_ROOM = """
import resource, signal, sys
from pathlib import Path
from disha.finetune.folder_lock import FolderLock
from disha.finetune.metrics import recording
from disha.finetune.training.loop import Step

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
reports = ["tensorboard"] if sys.argv[2] == "True" else []
with recording(FolderLock(Path(sys.argv[1])), reports=reports) as metrics:
    for number in range(1, 2000):
        metrics.record_step(Step(number, 1, 3.0 / number, 1e-3, 1.5, 40, 200.0, 0.2 * number, None))
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
"""
"""Run in a process of its own: the limit is for all its files, the record of tests too."""


@pytest.mark.parametrize("tensorboard", [False, True])
def test_without_room_training_goes_on_and_says_so_once(tmp_path, tensorboard):
    done = subprocess.run(
        [sys.executable, "-c", RECORD_WITHOUT_ROOM, str(tmp_path), str(tensorboard)],
        capture_output=True,
        text=True,
        check=True,
    )
    rest = "training continues, but is no longer recorded there"
    for name, reason, times in (
        ("metrics.jsonl", "No space left on device", 1),
        ("tensorboard", "File too large", int(tensorboard)),
    ):
        warning = f"disha: warning: {name} can't be written: {reason}; {rest}"
        assert done.stderr.count(warning) == times
    # What was cut in the middle is left out when the run goes on.
    assert [step.step for step in recorded_steps(tmp_path, 3)] == [1]


def test_a_full_device_is_a_full_device(tmp_path, capsys):
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    with recording(FolderLock(tmp_path)) as metrics:
        metrics.record_step(step(1))
        metrics.record_step(step(2))
    assert capsys.readouterr().err == (
        "disha: warning: metrics.jsonl can't be written: No space left on device; training "
        "continues, but is no longer recorded there\n"
    )


def test_steps_come_back_as_they_were_recorded(tmp_path):
    steps = [step(1), step(2, eval_loss=2.5), step(3)]
    with recording(FolderLock(tmp_path)) as metrics:
        metrics.record_evaluation(0, 3.5)
        for one in steps:
            metrics.record_step(one)
    assert recorded_steps(tmp_path, 2) == steps[:2]
    assert recorded_steps(tmp_path, 9) == steps


def test_where_nothing_was_recorded_there_are_no_steps(tmp_path):
    assert recorded_steps(tmp_path, 9) == []


@pytest.mark.parametrize(
    "damaged", ["[]", '{"step": "x"}', '{"loss": 1.0}', "", '"', '{"step": 4, "loss": 1.0']
)
def test_what_is_damaged_ends_what_was_recorded(tmp_path, damaged):
    with recording(FolderLock(tmp_path)) as metrics:
        metrics.record_step(step(1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(damaged + "\n" + json.dumps({"step": 2}) + "\n")
    assert recorded_steps(tmp_path, 9) == [step(1)]
    with recording(FolderLock(tmp_path), after=9):
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_record_of_other_things_is_no_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert recorded_steps(tmp_path, 9) == []


def test_events_that_can_not_be_written_are_named(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with (
        pytest.raises(OutputError, match="tensorboard can't be written"),
        recording(FolderLock(tmp_path), reports=["tensorboard"]),
    ):
        pass
