"""The command under torchrun: two processes do what one does with twice the batches."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from disha.cli import main
from disha.finetune.folder_lock import FolderLock
from disha.finetune.training.checkpoints import Checkpoints
from tests.finetune.command_line import (
    FILES,
    arguments,
    losses_of,
    metrics_of,
    report_of,
    write_rows,
)
from tests.finetune.together import run_together
from tests.processes import TORCHRUN, ended, started

SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
USUAL = {"bone_r": 4, "eval_fraction": 0.2, "eval_steps": 2, "per_device_train_batch_size": 2}


def torchrun(words):
    return started((*TORCHRUN, "-m", "disha", *words))


def finished(process):
    done = ended(process, 240)
    return done.returncode, done.stdout, done.stderr


def complaints_in(err):
    return [line for line in err.splitlines() if line.startswith(("disha:", "disha finetune:"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_path):
    folder = tmp_path_factory.mktemp("alone")
    data = write_rows(folder / "rows.jsonl")
    accumulated = {"gradient_accumulation_steps": 4}
    assert main(arguments(tiny_path, data, folder / "out", **USUAL, **accumulated)) == 0
    return data, folder / "out"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(tmp_path, tiny_path, alone, strategy):
    data, expected = alone
    output = tmp_path / "out"
    words = arguments(
        tiny_path, data, output, strategy=strategy, gradient_accumulation_steps=2, **USUAL, **SAVING
    )
    out = run_together(2, words, tmp_path / "log")
    assert losses_of(output) == pytest.approx(losses_of(expected), rel=1e-5)
    assert [line["step"] for line in metrics_of(output)] == list(range(7))
    report, other = report_of(output), report_of(expected)
    for name in ("before", "after", "by_step"):
        assert report["loss"][name] == pytest.approx(other["loss"][name], rel=1e-5)
    assert report["training"]["tokens"] == other["training"]["tokens"]
    found, wanted = (load_file(f / "adapter.safetensors") for f in (output, expected))
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)
    missing = {"samples.md"} if strategy == "fsdp" else set()
    assert {path.name for path in output.iterdir()} == FILES - missing | {"checkpoint-6"}
    assert out.count("step 6/6") == 1
    assert out.count("adapter.safetensors") == 1


def test_two_processes_that_are_stopped_go_on_to_the_same_end(tmp_path, tiny_path, alone):
    """Ctrl-C reaches every process of a terminal, and torchrun sends it on to them once more."""
    data, _ = alone
    straight, output, other = (tmp_path / name for name in ("straight", "out", "other"))
    changes = {**USUAL, "max_steps": 200, "eval_steps": 100}
    process = torchrun(arguments(tiny_path, data, output, **changes))
    try:
        metrics = output / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 5):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        code, _, err = finished(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert code != 0
    told = complaints_in(err)
    assert len(told) == 1, err
    assert told[0].startswith("disha: interrupted after step ")
    assert err.count("saving a checkpoint") == 1
    assert "terminate called" not in err
    assert len(list(output.glob("checkpoint-*"))) == 1
    by_one = {**changes, "gradient_accumulation_steps": 2}
    shutil.copytree(output, other)
    words = [*arguments(tiny_path, data, output, **changes), "--resume"]
    run_together(2, words, tmp_path / "log")
    assert main([*arguments(tiny_path, data, other, **by_one), "--resume"]) == 0
    assert main(arguments(tiny_path, data, straight, **by_one)) == 0
    for folder in (output, other):
        assert [line["step"] for line in metrics_of(folder)] == list(range(201))
        assert losses_of(folder) == pytest.approx(losses_of(straight), rel=1e-3)


# --- other processes than before -----------------------------------------------------------------

DONE = 2
WAYS = {"one": (1, "ddp"), **{f"{s} {n}": (n, s) for s in ("ddp", "fsdp") for n in (2, 3)}}
"""Name -> how many processes, and by which strategy."""


@pytest.fixture(scope="module")
def run_by(tmp_path_factory, tiny_path):
    """Return a folder with the files of a run on some processes; not to be changed."""
    made = {}

    def run(way):
        if way not in made:
            folder = made[way] = tmp_path_factory.mktemp("run")
            write_rows(folder / "rows.jsonl")
            run_on(way, tiny_path, folder)
        return made[way]

    return run


def run_on(way, model, folder, *words, **changes):
    """Run with two batches on each process, unless said otherwise, and a checkpoint half-way."""
    processes, strategy = WAYS[way]
    changes = {
        "bone_r": 4,
        "max_steps": 2 * DONE,
        "save_strategy": "steps",
        "save_steps": DONE,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        **changes,
    }
    run = arguments(model, folder / "rows.jsonl", folder / "out", strategy=strategy, **changes)
    run_together(processes, [*run, *words], folder / "log.txt")


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ("one", "ddp 2", {}),
        ("one", "fsdp 3", {}),
        ("one", "ddp 2", {"gradient_accumulation_steps": 1}),
        ("ddp 2", "one", {}),
        ("ddp 2", "fsdp 2", {}),
        ("ddp 2", "ddp 3", {}),
        ("fsdp 3", "one", {}),
        ("fsdp 3", "ddp 2", {"gradient_accumulation_steps": 3}),
    ],
)
def test_other_processes_go_on_with_the_same_batches(
    tmp_path, tiny_path, run_by, before, after, changes
):
    """Two batches a step on three processes, and four on three, can't be divided equally."""
    straight = run_by(before) / "out"
    folder = shutil.copytree(straight.parent, tmp_path / "moved")
    output = folder / "out"
    shutil.rmtree(output / f"checkpoint-{2 * DONE}")
    (output / "adapter.safetensors").unlink()
    run_on(after, tiny_path, folder, "--resume", **changes)
    assert report_of(output)["training"]["resumed_from"] == str(output / f"checkpoint-{DONE}")
    found, expected = metrics_of(output), metrics_of(straight)
    for name in ("step", "epoch", "tokens", "learning_rate"):
        assert [line.get(name) for line in found] == [line.get(name) for line in expected]
    assert losses_of(output) == pytest.approx(losses_of(straight), rel=1e-5)
    found, expected = (load_file(one / "adapter.safetensors") for one in (output, straight))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    # The checkpoint that this run has saved goes on in the same way.
    saved = Checkpoints(output).newest_good(pytest.fail)
    assert saved.progress.step == 2 * DONE
    assert saved.setup["batches_per_step"] == 2 * WAYS[before][0]


# --- mistakes ------------------------------------------------------------------------------------


def test_bad_input_is_complained_of_once(tmp_path, tiny_path):
    data = write_rows(tmp_path / "rows.jsonl")
    data.write_text(data.read_text() + "{\n")
    code, _, err = finished(torchrun(arguments(tiny_path, data, tmp_path / "out")))
    assert code in (1, 2)
    told = complaints_in(err)
    assert len(told) == 1, err
    assert "line 41 is not JSON" in told[0]
    assert "error_file: <N/A>" not in err, "torchrun knows the error too"
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_complained_of_once(tmp_path, tiny_path):
    """Only the first process asks for the lock, and all of them end."""
    data, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    with FolderLock(output).held():
        code, out, err = finished(torchrun(arguments(tiny_path, data, output)))
        assert code == 1
        told = complaints_in(err)
        assert len(told) == 1, err
        assert f"is in use by another run: process {os.getpid()} on " in told[0]
        assert "reading data" not in out
    assert not output.exists()


def test_wrong_usage_is_complained_of_once(tmp_path, tiny_path):
    data = write_rows(tmp_path / "rows.jsonl")
    code, _, err = finished(torchrun(arguments(tiny_path, data, tmp_path / "out", bits=7)))
    assert code in (1, 2)
    assert err.count("got '7'") == 1, err
    assert not (tmp_path / "out").exists()
