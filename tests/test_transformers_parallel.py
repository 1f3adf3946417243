"""Parallel models of `transformers` in two processes under torchrun, of which each check is one."""

from __future__ import annotations

import pytest

from tests.conftest import once
from tests.distributed import transformers_parallel
from tests.distributed.harness import checks_of
from tests.test_distributed import launch

SCRIPT = transformers_parallel.__name__
CHECKS = list(checks_of(vars(transformers_parallel)))


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(check, shared_folder):
    _, found = once(shared_folder, SCRIPT, lambda folder: launch(SCRIPT, folder))
    assert check in found["passed"], found["output"]
