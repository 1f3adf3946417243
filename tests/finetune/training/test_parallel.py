"""Two processes under torchrun, and one without it. What the two do is in `two_processes.py`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from disha.finetune.errors import SettingsError
from disha.finetune.training.parallel import (
    Processes,
    deferred_reduction,
    distribute,
    is_sharded,
    joined_processes,
    undistributed,
)
from tests.conftest import once
from tests.distributed.harness import checks_of
from tests.finetune.training import failing, two_processes
from tests.finetune.training.tiny import objective
from tests.test_distributed import ROOT, launch

ALONE = Processes.alone(torch.device("cpu"))


@pytest.mark.parametrize("check", checks_of(vars(two_processes)))
def test_on_two_processes(check, shared_folder):
    script = two_processes.__name__
    _, found = once(shared_folder, script, lambda folder: launch(script, folder))
    assert check in found["passed"], found["output"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("fail_on_memory", "error: there is not enough memory"),
        ("fail_alike", "error: --learning_rate must be greater than 0"),
    ],
)
def test_what_fails_on_one_process_stops_all_with_one_message(case, message):
    finished = run_failing(case)
    said = [line for line in finished.stdout.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert said[0].startswith(message)
    assert finished.returncode == 1


def test_nothing_of_the_processes_is_left_at_the_end():
    finished = run_failing("end_well")
    assert "error" not in finished.stdout
    assert finished.returncode == 0, finished.stderr


def run_failing(case):
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", "-m", failing.__name__, case),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_one_process_needs_nothing_of_torch_distributed(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_processes() as processes:
        assert not torch.distributed.is_initialized()
    assert (processes.rank, processes.world_size, processes.is_main) == (0, 1, True)
    assert processes.sum([1.5, 2.0]) == [1.5, 2.0]
    assert processes.broadcast("a") == "a"
    assert processes.gather("a") == ["a"]
    processes.barrier()


def test_an_incomplete_environment_is_named(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(SettingsError, match=r"not RANK, LOCAL_RANK.*torchrun --nproc-per-node"),
        joined_processes(),
    ):
        pass


@pytest.mark.parametrize("found", ["two", "0"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch, found):
    monkeypatch.setenv("WORLD_SIZE", found)
    with pytest.raises(SettingsError, match=f"WORLD_SIZE.*got '{found}'"), joined_processes():
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "2"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(SettingsError, match=r"process 3 of this machine, which has 2; lower"),
        joined_processes(),
    ):
        pass


def test_alone_nothing_is_wrapped():
    plain = objective()
    assert distribute(plain, "fsdp", ALONE) is plain
    assert undistributed(plain) is plain
    assert not is_sharded(plain)
    with deferred_reduction(plain):
        pass


def test_only_objectives_are_distributed():
    with pytest.raises(TypeError, match="an Objective is expected, not Linear"):
        undistributed(torch.nn.Linear(1, 1))
