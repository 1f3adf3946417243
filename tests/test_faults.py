"""Reading and saving while operations on files fail, or the process dies, at every one of them."""

import pytest

from tests.fuzzing.faults import CODES
from tests.fuzzing.operations import JOBS, Trials


@pytest.mark.parametrize("name", JOBS)
def test_an_error_is_ours_and_nothing_is_lost(name, tmp_path):
    """`python -m tests.fuzzing` tries each operation with each code."""
    trials = Trials(JOBS[name], tmp_path)
    stride = max(1, trials.operations // JOBS[name].points)
    for turn, at in enumerate(range(0, trials.operations, stride)):
        trials.fail(at, CODES[turn % len(CODES)])
        trials.fail(at, CODES[(turn + 1) % len(CODES)], lasting=True)
        trials.kill(at)
