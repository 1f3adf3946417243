"""Tensor parallelism in two processes under torchrun, of which each check is one."""

from __future__ import annotations

import pytest

from tests.conftest import once
from tests.distributed import tensor_parallel
from tests.distributed.harness import checks_of
from tests.test_distributed import launch

SCRIPT = tensor_parallel.__name__
CHECKS = list(checks_of(vars(tensor_parallel)))


@pytest.fixture
def launched(shared_folder):
    """Return the checks that the script has passed, and its output; it runs once."""
    _, found = once(shared_folder, SCRIPT, lambda folder: launch(SCRIPT, folder))
    return set(found["passed"]), found["output"]


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(check, launched):
    passed, output = launched
    assert check in passed, output


def test_every_check_has_run(launched):
    passed, output = launched
    assert passed == set(CHECKS), output
