"""Two processes under torchrun. Each script of `tests/distributed` is launched once.

A launch takes seconds to import torch on both ranks, so that all checks of a script share it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import disha
from disha import ModeError
from tests.conftest import needs_fully_shard, once
from tests.distributed import ddp, fsdp
from tests.distributed.harness import checks_of
from tests.processes import ROOT, TORCHRUN, ended, started

SECONDS = 240
"""Ten times what a launch takes on two slow cores."""

NEEDS = {
    ddp.__name__: (),
    fsdp.__name__: needs_fully_shard,
}
SCRIPTS = [pytest.param(script, marks=marks) for script, marks in NEEDS.items()]
CHECKS = [
    pytest.param(script.__name__, check, marks=NEEDS[script.__name__])
    for script in (ddp, fsdp)
    for check in checks_of(vars(script))
]


@pytest.fixture
def launched(script, shared_folder):
    """Return the checks that a script has passed, and its output; each script runs once."""
    _, found = once(shared_folder, script, lambda folder: launch(script, folder))
    return set(found["passed"]), found["output"]


def launch(script: str, folder: Path) -> dict[str, object]:
    """Run a script on two ranks, in a folder that is made."""
    folder.mkdir()
    done = ended(started((*TORCHRUN, "-m", script, str(folder)), ROOT), SECONDS)
    output = done.stdout + done.stderr
    return {"passed": [path.parent.name for path in folder.glob("*/passed")], "output": output}


@pytest.mark.parametrize(("script", "check"), CHECKS)
def test_on_two_ranks(script, check, launched):
    passed, output = launched
    assert check in passed, output


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_check_has_run(script, launched):
    passed, output = launched
    assert passed == {param.values[1] for param in CHECKS if param.values[0] == script}, output


class TestDataParallel:
    def test_without_replicas_it_works(self, model, tokens):
        disha.inject_adapters(model, "all-linear", 2, init="kaiming")
        assert torch.equal(nn.DataParallel(model)(tokens), model(tokens))

    def test_replicas_are_refused(self, model):
        """On several devices, DataParallel makes of every module a copy without parameters."""
        disha.inject_adapters(model, "head", 2)
        with pytest.raises(ModeError, match=r"use torch\.nn\.parallel\.DistributedDataParallel"):
            model.head._replicate_for_data_parallel()
        disha.remove_adapters(model)
        model.head._replicate_for_data_parallel()
