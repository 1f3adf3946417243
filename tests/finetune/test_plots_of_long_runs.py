from __future__ import annotations

import time

import pytest

from disha.finetune import plots
from disha.finetune.plots import loss_plot
from disha.finetune.training.loop import Step


def steps(count):
    return [Step(n, 1, 2.0, 1e-4, 1.0, 40, 200.0, 0.2 * n, None) for n in range(1, count + 1)]


@pytest.mark.parametrize("count", [1, 11, 12, 13, 1000])
def test_the_first_and_the_last_loss_are_written_out_and_not_too_many(count):
    points = [(number, 2.0) for number in range(count)]
    shown = plots._spread(points)
    assert (shown[0], shown[-1]) == (points[0], points[-1])
    assert list(shown) == sorted(set(shown))
    assert len(shown) == min(count, plots.MOST_NUMBERS)


def test_an_evaluation_after_every_step_of_a_long_run_takes_no_time():
    run = steps(5000)
    loss_plot(run[:1], {0: 2.0}, "a title", "held-out")
    begun = time.process_time()
    loss_plot(run, {step.step: 2.0 for step in run}, "a title", "held-out")
    assert time.process_time() - begun < 10  # with a number at each, it is a minute


def test_a_run_without_records_has_a_plot():
    assert loss_plot([], {0: 2.0, 5: 1.0}, "a title", "held-out").startswith(b"\x89PNG")
    assert plots.learning_rate_plot([], "a title").startswith(b"\x89PNG")
