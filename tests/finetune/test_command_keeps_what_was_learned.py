from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import disha
from disha.finetune import command
from disha.finetune.base_model import open_base_model
from disha.finetune.errors import OutputError
from disha.finetune.settings import (
    AdapterSettings,
    DataSettings,
    FinetuneSettings,
    ModelSettings,
    OutputSettings,
    TrainingSettings,
)

MODELS = """
import torch
from torch import nn

def of_chance():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory with a module of models and some rows of numbers."""
    monkeypatch.chdir(tmp_path)
    Path("models_of_chance.py").write_text(MODELS)
    rows = [{"x": [i % 5 + 0.5, i % 3 - 1.0, i % 7 * 0.1, 1.0], "y": i % 3} for i in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield tmp_path
    sys.modules.pop("models_of_chance", None)


def settings(**output):
    return FinetuneSettings(
        model=ModelSettings(model="models_of_chance:of_chance", bits="fp32"),
        adapter=AdapterSettings(bone_r=2),
        data=DataSettings(data_path=Path("rows.jsonl"), dataset_field=("x", "y")),
        training=TrainingSettings(max_steps=6, learning_rate=0.05),
        output=OutputSettings(output_dir=Path("out"), **output),
    )


def test_a_model_of_chance_is_the_same_in_every_process(folder):
    model = ModelSettings(model="models_of_chance:of_chance", bits="fp32")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = open_base_model(model).load(torch.device("cpu")).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second = open_base_model(model).load(torch.device("cpu")).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_adapter_gives_the_same_loss_elsewhere_in_spite_of_statistics(folder):
    report = command.finetune(settings(verify=True))
    assert report["verification"]["agrees"]
    assert report["loss"]["after"] < report["loss"]["before"]


def test_an_output_folder_that_was_removed_is_made_again(folder, monkeypatch):
    trained = command.train

    def removing(*arguments):
        course = trained(*arguments)
        shutil.rmtree("out")
        return course

    monkeypatch.setattr(command, "train", removing)
    command.finetune(settings())
    assert Path("out", "adapter.safetensors").is_file()


def test_an_adapter_that_has_no_place_is_saved_elsewhere(folder, monkeypatch):
    trained = command.train

    def blocking(*arguments):
        course = trained(*arguments)
        shutil.rmtree("out")
        Path("out").write_text("")
        return course

    monkeypatch.setattr(command, "train", blocking)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(OutputError, match=r"the adapter was saved as .* instead"):
        command.finetune(settings())
    [saved] = folder.glob("disha-*/adapter.safetensors")
    assert disha.inspect_adapter(saved).layers


@pytest.mark.parametrize("name", ["loss.png", "report.json"])
def test_a_result_that_can_not_be_written_says_where_the_adapter_is(folder, monkeypatch, name):
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match=rf"{name}.*No space.*the adapter is complete in out"):
        command.finetune(settings())
    assert disha.inspect_adapter("out/adapter.safetensors").layers


def test_a_run_that_is_over_goes_on_to_its_end_without_a_record(folder):
    options = {"save_strategy": "steps", "save_steps": 6}
    before = command.finetune(settings(**options))
    Path("out", "metrics.jsonl").unlink()
    after = command.finetune(settings(resume=True, **options))
    assert after["loss"] == before["loss"]
    assert after["training"]["tokens_per_second"] is None


def test_of_two_processes_one_says_what_is_wrong(folder):
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", "-m", "disha", "finetune", "--learning_rate", "-1"),
            *("--model", "models_of_chance:of_chance", "--data_path", "rows.jsonl"),
            *("--output_dir", "out"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.stderr.count("disha: --learning_rate must be greater than 0") == 1
