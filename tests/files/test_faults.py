"""A fault at each file operation of a writer leaves what is whole: the old, or the new."""

import pytest

from tests import faults

FAILED = (faults.AdapterFile(), faults.NewFolder(), faults.Peft(), faults.Merged())
KILLED = (faults.AdapterFile(),)
"""The writers that are tried here; `python -m tests.faults` tries all of them."""

IN_TURN = {"new beside old": 1}
"""Two files of PEFT are whole, each of them, but between two moves they are not of one version."""


def assert_whole(writer, found):
    assert found.operations > 10
    assert found.standing.keys() <= {"old", "new"} | IN_TURN.keys()
    assert found.standing["new beside old"] == isinstance(writer, faults.Peft) * (
        not isinstance(writer, faults.NewPeft)
    )
    assert found.after_next == {"new": found.operations}
    assert found.drafts == 0


@pytest.mark.parametrize("writer", FAILED, ids=lambda writer: writer.name)
def test_an_operation_that_fails(writer, tmp_path):
    found = faults.fail_everywhere(writer, tmp_path / "files")
    assert_whole(writer, found)
    assert found.raised.keys() == {"DishaError", "done"}


@pytest.mark.parametrize("writer", KILLED, ids=lambda writer: writer.name)
def test_a_writer_that_is_killed(writer, tmp_path):
    found = faults.kill_everywhere(writer, tmp_path / "files")
    assert_whole(writer, found)
    assert found.raised == {"killed": found.operations}
