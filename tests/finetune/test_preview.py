"""`--dry_run`: what a run would do, and nothing of it done."""

from __future__ import annotations

import re

import pytest

from tests.finetune import tiny_gguf
from tests.finetune.command_line import ROWS, write_rows

LAYERS = 2 * 8 * (64 + 32 + 32 + 64 + 96 + 96 + 64)


def test_nothing_is_written_and_no_weight_is_read(finetune, monkeypatch):
    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr("disha.finetune.models.gguf.GGUFCheckpoint.load_model", read)
    done = finetune("--dry_run")
    assert (done.code, done.err) == (0, "")
    assert not finetune.output.exists()


def test_layers_and_parameters_are_those_of_the_run(finetune):
    shown = finetune("--dry_run").out
    assert "model.layers.1.mlp.down_proj" in shown
    assert f"14 layers, {LAYERS:,} parameters; trainable {LAYERS:,} of " in shown
    report = finetune.good(max_steps=1)
    assert report["parameters"]["trainable"] == LAYERS
    assert f" of {report['parameters']['total']:,} " in shown


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_steps": None}, "10 steps of 4 rows, 1.00 passes over the data"),
        ({"max_steps": 5}, "5 steps of 4 rows, 0.50 passes"),
        ({"max_steps": None, "num_train_epochs": 2.5}, "25 steps of 4 rows, 2.50 passes"),
        ({"max_steps": None, "gradient_accumulation_steps": 5}, "2 steps of 20 rows, 1.00 passes"),
        ({"eval_fraction": 0.25}, "30 rows to train on; 10 held out"),
        ({"dataset_split": "train[:50%]"}, "20 rows to train on; 0 held out"),
        ({"streaming": True, "packing": True}, "6 steps of 4 rows\n"),
    ],
)
def test_steps_and_rows_are_told(finetune, changes, expected):
    assert expected in finetune("--dry_run", **changes).out


def test_rows_that_are_cut_or_left_out_are_counted(finetune, tmp_path):
    rows = [*ROWS, {"query": "x" * 400, "response": "y"}, {"query": "x", "response": "y" * 400}]
    data = write_rows(tmp_path / "long.jsonl", [*rows, {}])
    shown = finetune("--dry_run", "--skip_bad_rows", data_path=data).out
    assert "43 rows to train on; 0 held out; 1 of them cut to fit; " in shown
    assert "1 left out as too long; 1 left out as unusable, such as: " in shown


def test_memory_grows_with_what_is_asked_for(finetune):
    def memory(**changes):
        found = re.search(
            r"memory of each process: some ([\d.]+) MiB", finetune("--dry_run", **changes).out
        )
        return float(found[1])

    usual = memory(per_device_train_batch_size=64)
    assert memory(per_device_train_batch_size=128) > 1.5 * usual
    assert memory(per_device_train_batch_size=64, gradient_checkpointing=True) < usual


def test_what_does_not_fit_is_told_here_too(finetune):
    done = finetune("--dry_run", target="no_such_layer")
    assert done.code == 2
    assert "no_such_layer" in done.complaint
    assert finetune("--dry_run", max_seq_length=tiny_gguf.CONTEXT + 1).code == 2
