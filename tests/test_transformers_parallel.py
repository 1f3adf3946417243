"""Parallel models and trainers of `transformers`, `disha finetune` and DeepSpeed, on two ranks."""

from __future__ import annotations

import importlib.util
import json

import pytest

from disha.finetune import main
from tests.conftest import once
from tests.distributed import (
    deepspeed_zero,
    finetune,
    quantised,
    trainer_fsdp,
    transformers_parallel,
)
from tests.test_distributed import checks_in, launch

SCRIPTS = [transformers_parallel, trainer_fsdp, quantised, finetune]
if importlib.util.find_spec("deepspeed") is not None:  # not each platform has it
    SCRIPTS.append(deepspeed_zero)


@pytest.fixture
def launched(shared_folder):
    """Return the folder of the ranks, the checks that have passed, and the output."""
    name = "ranks_of_transformers"
    folder, found = once(shared_folder, name, lambda folder: launch(SCRIPTS, folder))
    return folder, set(found["passed"]), found["output"]


@pytest.mark.parametrize("check", checks_in(SCRIPTS))
def test_on_two_ranks(check, launched):
    _, passed, output = launched
    assert check in passed, output


def test_two_processes_give_the_losses_of_one(launched):
    folder = launched[0] / "finetune" / "check_a_run"
    assert main(finetune.words(folder, "one")) == 0
    expected, found = (
        json.loads((folder / name / "report.json").read_text())["training_losses"]
        for name in ("one", "two")
    )
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)
