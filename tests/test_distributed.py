"""Two processes under torchrun. Each script of `tests/distributed` is launched once.

A launch takes seconds to import torch on both ranks, so that all checks of a script share it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn

import disha
from disha import ModeError
from tests.distributed import ddp, fsdp
from tests.distributed.harness import RANKS, checks_of

ROOT = Path(__file__).parent.parent
SECONDS = 240
"""Ten times what a launch takes on two slow cores."""

CHECKS = [(script.__name__, check) for script in (ddp, fsdp) for check in checks_of(vars(script))]


@dataclass(frozen=True)
class Launch:
    """What became of a script."""

    passed: frozenset[str]
    output: str


@cache
def launch(script: str) -> Launch:
    """Run a script on two ranks, once."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(RANKS), "-m", script),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",  # where there is a device, fully_shard takes it, and gloo can't
    }
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*command, folder],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too
            output, _ = process.communicate()
            output += f"\n{script} took more than {SECONDS} s"
        passed = frozenset(path.parent.name for path in Path(folder).glob("*/passed"))
    return Launch(passed, output)


@pytest.mark.parametrize(("script", "check"), CHECKS)
def test_on_two_ranks(script, check):
    result = launch(script)
    assert check in result.passed, result.output


@pytest.mark.parametrize("script", [ddp.__name__, fsdp.__name__])
def test_every_check_has_run(script):
    expected = {check for of, check in CHECKS if of == script}
    assert launch(script).passed == expected, launch(script).output


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
