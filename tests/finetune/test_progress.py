from __future__ import annotations

import io

import pytest

from disha.finetune.progress import showing_progress
from disha.finetune.training.loop import Step


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(monkeypatch, stream, *, every=4, first=0, **options):
    monkeypatch.setattr("sys.stdout", stream)
    with showing_progress(10, every, first=first, **options) as show_step:
        for number in range(first + 1, 11):
            eval_loss = 1.5 if number == 6 else None
            show_step(Step(number, 1, 2.0, 1e-3, 1.0, 40, 123.4, 0.5 * number, eval_loss))
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    lines = show(monkeypatch, io.StringIO()).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "step 1/10",
        "step 4/10",
        "step 6/10",
        "step 8/10",
        "step 10/10",
    ]
    assert lines[1] == "step 4/10: loss 2.000, 123 tokens/s, 3 s left"
    assert lines[2].endswith("held-out loss 1.5000")


def test_the_time_left_where_training_goes_on(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("sys.stdout", shown)
    with showing_progress(1000, 1, first=800) as show_step:
        show_step(Step(801, 1, 2.0, 1e-3, 1.0, 40, 123.4, 801.0, None))
    assert shown.getvalue().strip().endswith("199 s left")


@pytest.mark.parametrize("every", [1, 4])
def test_a_bar_on_a_terminal(monkeypatch, every):
    shown = show(monkeypatch, Terminal(), every=every)
    assert "10/10" in shown
    assert "loss 2.000, 123 tokens/s" in shown
    assert "step 6: held-out loss 1.5000" in shown


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_other_rows_are_called_by_their_name(monkeypatch, stream):
    shown = show(monkeypatch, stream(), checked="first training rows'")
    assert "first training rows' loss 1.5000" in shown
    assert "held-out" not in shown


def test_where_a_run_goes_on_time_left_is_told_by_all_steps(monkeypatch):
    lines = show(monkeypatch, io.StringIO(), first=6).splitlines()
    assert lines[0] == "step 8/10: loss 2.000, 123 tokens/s, 1 s left"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_other_processes_than_the_main_one_show_nothing(monkeypatch, stream):
    assert show(monkeypatch, stream(), shown=False) == ""
