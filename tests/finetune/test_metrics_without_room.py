from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from disha.finetune.errors import OutputError
from disha.finetune.metrics import recorded_steps, recording
from disha.finetune.training.loop import Step


def step(number, eval_loss=None):
    return Step(number, 1, 3.0 / number, 1e-3, 1.5, 40, 200.0, 0.2 * number, eval_loss)


RECORD_WITHOUT_ROOM = """
import resource, signal, sys
from pathlib import Path
from disha.finetune.metrics import recording
from disha.finetune.training.loop import Step

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with recording(Path(sys.argv[1]), tensorboard=sys.argv[2] == "True") as metrics:
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
    rest = "training goes on, but is no longer recorded there"
    assert sorted(done.stderr.splitlines()) == [
        f"disha: warning: metrics.jsonl can't be written: No space left on device; {rest}",
        *([f"disha: warning: tensorboard can't be written: File too large; {rest}"] * tensorboard),
    ]
    # What was cut in the middle is left out when the run goes on.
    assert [step.step for step in recorded_steps(tmp_path, 3)] == [1]


def test_the_error_of_any_other_thread_is_passed_on(tmp_path, monkeypatch):
    def fail():
        raise OSError("of another thread")

    passed_on = []
    monkeypatch.setattr(threading, "excepthook", passed_on.append)
    before = threading.excepthook
    with recording(tmp_path, tensorboard=True):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert [str(arguments.exc_value) for arguments in passed_on] == ["of another thread"]
    assert threading.excepthook is before


def test_a_full_device_is_a_full_device(tmp_path, capsys):
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    with recording(tmp_path) as metrics:
        metrics.record_step(step(1))
        metrics.record_step(step(2))
    assert capsys.readouterr().err == (
        "disha: warning: metrics.jsonl can't be written: No space left on device; training goes "
        "on, but is no longer recorded there\n"
    )


def test_steps_come_back_as_they_were_recorded(tmp_path):
    steps = [step(1), step(2, eval_loss=2.5), step(3)]
    with recording(tmp_path) as metrics:
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
    with recording(tmp_path) as metrics:
        metrics.record_step(step(1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(damaged + "\n" + json.dumps({"step": 2}) + "\n")
    assert recorded_steps(tmp_path, 9) == [step(1)]
    with recording(tmp_path, after=9):
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_record_of_other_things_is_no_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert recorded_steps(tmp_path, 9) == []


def test_events_that_can_not_be_written_are_named(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with (
        pytest.raises(OutputError, match="tensorboard can't be written"),
        recording(tmp_path, tensorboard=True),
    ):
        pass
