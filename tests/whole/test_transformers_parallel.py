"""Parallel models and trainers of `transformers`, `disha finetune` and DeepSpeed, on two ranks.

All scripts share one launch, because importing a trainer takes longer than most checks.
"""

import importlib.util
import json

import pytest

from disha.finetune import main
from tests.conftest import once
from tests.distributed import (
    deepspeed_zero,
    finetune,
    loading,
    quantized,
    trainers,
    transformers_parallel,
)
from tests.whole.test_distributed import checks_in, launch

SCRIPTS = [transformers_parallel, quantized, loading, trainers, finetune]
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
    folder, _, _ = launched
    runs = folder / "finetune"
    given = runs / "check_ddp"
    assert main(finetune.words(given, "one")) == 0
    reports = [given / "one", *runs.glob("*/two")]
    assert len(reports) == 1 + len(checks_in([finetune]))
    expected, *others = (json.loads((one / "report.json").read_text()) for one in reports)
    for found in others:
        for name in ("training_losses", "losses", "proof"):
            values = list(found[name].values())
            assert values == pytest.approx(list(expected[name].values()), rel=1e-4)
