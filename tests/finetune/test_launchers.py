"""The command under each launcher, as its users start it, on two processors.

Each rank is a `python -m tests.forks` where users have `python -m disha`: the same command, without
importing torch again.
"""

import importlib.util
import json
import socket
import sys
from pathlib import Path

import pytest

from tests.forks import preloaded
from tests.processes import ended, started

SECONDS = 900
"""Thirty times what a launch takes on two idle cores."""
FLAGS = ["--rank", 8, "--max_steps", 3, "--save_steps", 3, "--logging_steps", 1, "--samples", 0]
FLAGS += ["--learning_rate", 0.01, "--disable_tqdm", True]
ENGINES = {
    "torchrun": (["--fsdp", "full_shard"], "pytorch_model_fsdp.bin"),
    "accelerate": ([], "optimizer.pt"),
    "deepspeed": (["--deepspeed", "zero3.json"], "global_step3"),
}
"""A launcher -> the flags of the engine that it starts, and what this leaves in a checkpoint."""

ZERO3 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
WARNING = "find_unused_parameters"
"""Of this, torch would warn in the first step, once on each rank."""


def launcher_words(launcher, module):
    """Return the words that start two processes, each with `python -m` and the module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    two = {
        "torchrun": ["--standalone", "--nproc-per-node", "2", "-m"],
        "accelerate": ["launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
        "deepspeed": ["--num_gpus", "2", "--no_local_rank", "--master_port", port, "--module"],
    }
    words = [str(Path(sys.executable).with_name(launcher)), *two[launcher]]
    if launcher == "accelerate":
        words += [port, "-m"]
    return [*words, *module]


def launch(launcher, module, folder, tiny, data):
    """Run the command on two processors, and return how it ended."""
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    flags, _ = ENGINES[launcher]
    given = ["--base", tiny, "--data", data, "--output_dir", folder / "out", *FLAGS, *flags]
    given += ["--per_device_train_batch_size", 2]
    words = [*launcher_words(launcher, module), "finetune", *map(str, given)]
    return ended(started(words, folder), SECONDS)


@pytest.fixture(scope="module")
def forks():
    """The words after `python -m` that run the command without importing torch again."""
    with preloaded() as address:
        yield ["tests.forks", address]


@pytest.fixture(scope="module")
def losses_of_one_process(finetune, tmp_path_factory):
    result = finetune(tmp_path_factory.mktemp("one") / "out", *FLAGS)
    return list(result.report["training_losses"].values())


@pytest.mark.parametrize("launcher", ENGINES)
def test_two_processors_have_the_losses_of_one(
    launcher, forks, tiny, data, tmp_path, losses_of_one_process
):
    if importlib.util.find_spec(launcher) is None and launcher != "torchrun":
        pytest.skip(f"{launcher} is not installed")
    done = launch(launcher, forks, tmp_path, tiny, data)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    losses = list(report["training_losses"].values())
    assert losses == pytest.approx(losses_of_one_process, rel=1e-3)
    assert report["proof"]["loaded"] == pytest.approx(report["proof"]["trained"], abs=1e-5)
    _, left = ENGINES[launcher]
    assert (tmp_path / "out" / "checkpoint-3" / left).exists(), output
    assert WARNING not in output
    assert output.count("on cpu: --bits fp32") == 1
