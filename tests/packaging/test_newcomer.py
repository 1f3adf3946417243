"""A newcomer comes from the wheel to an adapter that works elsewhere, in some twenty lines."""

import pytest

from tests.packaging import newcomer, sections


@pytest.fixture(scope="module")
def walked(installed, tmp_path_factory):
    return newcomer.walk(installed.python, tmp_path_factory.mktemp("newcomer"))


def test_it_takes_some_twenty_lines():
    assert 15 <= newcomer.lines_of_code() <= 22


def test_training_has_worked(walked):
    loss, _ = walked.trained
    assert loss < 0.3  # from 1.1


def test_the_model_elsewhere_computes_what_the_trained_one_does(walked):
    for here, there in zip(walked.trained[1], walked.served[1], strict=True):
        assert there == pytest.approx(here, abs=1e-4)


def test_every_step_is_timed(installed, walked):
    steps = {**installed.seconds, **walked.seconds}
    assert {step.partition(": ")[2] or step for step in steps} == {
        *("make an environment", "install", "import"),
        *("adapt", "train", "save", "load elsewhere", "export", "merge"),
        *("adapt experts", "check"),
    }
    assert all(value > 0 for value in steps.values())


def test_parts_are_told_by_their_comments():
    script = "import a\n\n# one\nx = 1  # not a part\n    # nor this\n# two\ny = 2\n"
    assert sections.parts_of(script) == {
        "import": "import a\n\n",
        "one": "x = 1  # not a part\n    # nor this\n",
        "two": "y = 2\n",
    }
