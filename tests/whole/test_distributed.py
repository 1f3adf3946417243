"""Two ranks. The scripts of `tests/distributed` are launched together, and once.

A launch takes seconds to import torch, so that all checks of all scripts share it.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import disha
from disha import ModeError
from tests.conftest import needs_fully_shard, once
from tests.distributed import ddp, four_ranks, fsdp, tensor_parallel
from tests.distributed.harness import checks_of
from tests.processes import ROOT, ended, started

SECONDS = 240
"""Ten times what a script takes on two slow cores."""

SCRIPTS = (ddp, fsdp, tensor_parallel, four_ranks)


def checks_in(scripts: Sequence[ModuleType]) -> list[str]:
    """Return the checks of scripts, each as `script-check`."""
    return [f"{name_of(script)}-{check}" for script in scripts for check in checks_of(vars(script))]


def name_of(script: ModuleType) -> str:
    return script.__name__.rpartition(".")[2]


def launch(scripts: Sequence[ModuleType], folder: Path) -> dict[str, object]:
    """Run scripts on two ranks, in a folder that is made."""
    folder.mkdir()
    words = ["-m", "tests.distributed", str(folder), *map(name_of, scripts)]
    done = ended(started(words, ROOT), SECONDS * len(scripts))
    passed = [path.parent.relative_to(folder) for path in folder.glob("*/*/passed")]
    output = done.stdout + done.stderr
    return {"passed": ["-".join(path.parts) for path in passed], "output": output}


@pytest.fixture
def launched(shared_folder):
    """Return the checks that have passed, and the output."""
    _, found = once(shared_folder, "ranks", lambda folder: launch(SCRIPTS, folder))
    return set(found["passed"]), found["output"]


MARKS = {"fsdp": needs_fully_shard}
CHECKS = [
    pytest.param(check, marks=MARKS.get(check.partition("-")[0], ()))
    for check in checks_in(SCRIPTS)
]


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(check, launched):
    passed, output = launched
    assert check in passed, output


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
