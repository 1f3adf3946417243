from __future__ import annotations

import json
import math

import pytest

from disha.finetune.errors import OutputError
from disha.finetune.metrics import recording
from disha.finetune.training.loop import Step


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
        recording(tmp_path / "file"),
    ):
        pass


def test_a_line_is_on_disk_when_it_is_complete(tmp_path):
    folder = tmp_path / "new"
    with recording(folder) as metrics:
        metrics.record_evaluation(0, 3.5)
        metrics.record_step(step(1))
        metrics.record_step(step(2, eval_loss=2.5))
        before, first, second = lines_in(folder)
    assert before == {"step": 0, "eval_loss": 3.5}
    assert first["step"] == 1
    assert "eval_loss" not in first
    assert second["eval_loss"] == 2.5
    assert {"loss", "learning_rate", "tokens_per_second", "seconds"} <= second.keys()


def test_a_new_run_starts_a_new_file(tmp_path):
    for number in (1, 2):
        with recording(tmp_path) as metrics:
            metrics.record_step(step(number))
    assert [line["step"] for line in lines_in(tmp_path)] == [2]


def test_going_on_cuts_off_what_is_done_again_and_what_was_cut(tmp_path):
    with recording(tmp_path) as metrics:
        metrics.record_evaluation(0, 3.5)
        for number in range(1, 6):
            metrics.record_step(step(number))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with recording(tmp_path, after=3) as metrics:
        metrics.record_step(step(4, eval_loss=1.5))
    found = lines_in(tmp_path)
    assert [line["step"] for line in found] == [0, 1, 2, 3, 4]
    assert found[-1]["eval_loss"] == 1.5


def test_going_on_without_a_file_starts_one(tmp_path):
    with recording(tmp_path, after=3) as metrics:
        metrics.record_step(step(4))
    assert [line["step"] for line in lines_in(tmp_path)] == [4]


def test_other_processes_than_the_main_one_write_nothing(tmp_path):
    with recording(tmp_path, tensorboard=True, main=False) as metrics:
        metrics.record_evaluation(0, 3.5)
        metrics.record_step(step(1))
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_what_was_recorded(tmp_path):
    with recording(tmp_path, tensorboard=True) as metrics:
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
    with recording(tmp_path, tensorboard=True) as metrics:
        for number in range(1, 6):
            metrics.record_step(step(number))
    with recording(tmp_path, tensorboard=True, after=3) as metrics:
        metrics.record_step(step(4))
    assert [number for number, _ in scalars_in(tmp_path, "train/loss")] == [1, 2, 3, 4]


def test_tensorboard_shows_nothing_of_an_earlier_run_where_one_begins_anew(tmp_path):
    for last in (5, 2):
        with recording(tmp_path, tensorboard=True) as metrics:
            for number in range(1, last + 1):
                metrics.record_step(step(number))
    assert [number for number, _ in scalars_in(tmp_path, "train/loss")] == [1, 2]
