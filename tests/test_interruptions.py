"""What is left when an operation is interrupted; `python -m tests.fuzzing` does so at every point.

The points in these tests are spread evenly over each operation.
"""

import dataclasses

import pytest

from tests.fuzzing.interrupting import OPERATIONS, interrupt

TRIES = 10


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, one in OPERATIONS.items() for kind in one.kinds]
)
def test_the_model_and_its_files_are_as_before_or_as_after(name, kind):
    outcome = interrupt(OPERATIONS[name], kind, TRIES)
    assert not outcome.failures, "\n".join(outcome.failures)
    assert outcome.points > 100
    assert outcome.tried == TRIES
    assert outcome.before > 0


def test_a_half_change_is_noticed():
    def change(model, _):
        for layer in (model.first, model.last):
            layer.requires_grad_(False)

    operation = dataclasses.replace(OPERATIONS["inject, plain"], run=change)
    outcome = interrupt(operation)
    assert any("half: first.weight" in failure for failure in outcome.failures)
