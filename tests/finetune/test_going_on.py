"""`disha finetune --adapter`: training goes on from an adapter, with the same data or others."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

import disha
from disha.cli import main
from disha.finetune import course
from disha.finetune.models.checkpoint import open_model
from tests.conftest import perturb
from tests.finetune import tiny_gguf
from tests.finetune.command_line import ROWS, arguments, losses_of, report_of, write_rows
from tests.finetune.together import run_together

USUAL = {"max_steps": None, "num_train_epochs": 1, "bone_r": 4}
STATELESS = {"lr_scheduler_type": "constant", "warmup_ratio": 0, "learning_rate": 0.5}


@pytest.fixture
def without_state(monkeypatch):
    """Train by plain gradient descent, which keeps nothing from step to step."""

    def make(objective, settings):
        trained = [one for one in objective.parameters() if one.requires_grad]
        return torch.optim.SGD(trained, lr=settings.learning_rate)

    monkeypatch.setattr(course, "make_optimizer", make)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_path):
    """The folder of a run: BAT, with norms trained with it."""
    folder = tmp_path_factory.mktemp("trained")
    write_rows(folder / "rows.jsonl")
    flags = {"init_weights": "bat", "also_train": "layernorm", "bone_r": 4, "template": "{query}:"}
    flags |= {"target": "q_proj|up_proj", "adapter_dropout": 0.1}
    assert main(arguments(tiny_path, folder / "rows.jsonl", folder / "out", **flags)) == 0
    return folder / "out"


@pytest.mark.parametrize(
    "changes",
    [{}, {"packing": True, "also_train": "norm"}, {"init_weights": "bat", "streaming": True}],
    ids=lambda changes: " ".join(changes),
)
def test_one_epoch_and_one_more_equal_two(finetune, tmp_path, without_state, changes):
    """The order of epoch n is set by the seed plus n, and nothing else is kept between epochs."""
    changes = {**USUAL, **STATELESS, **changes}
    finetune.good(output_dir=tmp_path / "two", **{**changes, "num_train_epochs": 2})
    finetune.good(output_dir=tmp_path / "first", **changes)
    start = tmp_path / "first" / "adapter.safetensors"
    own = {"bone_r": None, "also_train": None, "init_weights": None}
    finetune.good(output_dir=tmp_path / "more", adapter=start, seed=1, **{**changes, **own})
    found, expected = (load_file(tmp_path / n / "adapter.safetensors") for n in ("more", "two"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    both = [*losses_of(tmp_path / "first"), *losses_of(tmp_path / "more")]
    assert both == losses_of(tmp_path / "two")


def test_it_begins_where_the_first_run_has_ended(finetune, tmp_path):
    first = finetune.good(output_dir=tmp_path / "first", also_train="norm")
    more = finetune.good("--verify", adapter=tmp_path / "first" / "adapter.safetensors", bone_r=8)
    assert more["loss"]["before"] == first["loss"]["after"]
    assert more["loss"]["after"] < more["loss"]["before"]
    assert more["verification"]["agrees"]
    # The base's answers are those of the base, also for the parameters that were trained beside.
    assert [one["before"] for one in more["samples"]] == [one["before"] for one in first["samples"]]


def test_settings_and_template_are_those_of_the_file(finetune, trained, tmp_path):
    more = finetune.good(
        adapter=trained / "adapter.safetensors",
        bone_r=None,
        base_model_name_or_path=None,
        data_path=write_rows(tmp_path / "other.jsonl", ROWS[::2]),
    )
    described = [
        disha.inspect_adapter(one / "adapter.safetensors") for one in (trained, finetune.output)
    ]
    first, second = ((one.config, one.layers, one.also_train, one.metadata) for one in described)
    assert first[:3] == second[:3]
    assert first[3]["template"] == second[3]["template"] == "{query}:"
    assert more["settings"]["bone_r"] == 4
    assert more["settings"]["init_weights"] == "bat"
    assert more["loss"]["before"] < report_of(trained)["loss"]["before"]


def test_scales_and_ranks_of_single_layers_are_kept(finetune, tmp_path, tiny_path):
    model = open_model(tiny_path).load_model(torch.float32)
    disha.inject_adapters(
        model, "q_proj|v_proj", 8, rank_pattern={"v_proj": 4}, scale=0.5, dtype=torch.bfloat16
    )
    perturb(model, size=0.01)
    start = tmp_path / "start.safetensors"
    disha.save_adapter(model, start)
    shown = finetune("--dry_run", adapter=start)
    assert shown.code == 0, shown.err
    finetune.good(adapter=start)
    result = finetune.output / "adapter.safetensors"
    layers = [disha.inspect_adapter(one).layers for one in (start, result)]
    assert layers[0] == layers[1]
    assert {(layer.r, layer.scale) for layer in layers[1]} == {(8, 0.5), (4, 0.5)}
    values = load_file(result)
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert f"{sum(value.numel() for value in values.values()):,}" in shown.out


@pytest.mark.parametrize(
    "flags",
    [
        {"bone_r": 8},
        {"bone_r": 64},
        {"init_weights": "True"},
        {"method": "bone"},
        {"target": "q_proj"},
        {"also_train": "norm"},
        {"adapter_dropout": 0.2},
        {"bone_r_out": 2},
    ],
    ids=str,
)
def test_flags_that_contradict_the_file_are_refused(finetune, trained, flags):
    done = finetune(adapter=trained / "adapter.safetensors", **{"bone_r": None, **flags})
    assert done.code == 2
    [(name, value)] = flags.items()
    given = "bone" if value == "True" else value
    assert f"--{name} {given} contradicts --adapter " in done.complaint
    assert not finetune.output.exists()


@pytest.mark.parametrize(
    "flags",
    [{"bone_r": 4}, {"init_weights": "bat"}, {"method": "bat"}, {"target": "q_proj|up_proj"}],
    ids=str,
)
def test_flags_that_repeat_the_file_are_fine(finetune, trained, flags):
    flags = {"bone_r": None, **flags, "dry_run": True}
    done = finetune(adapter=trained / "adapter.safetensors", **flags)
    assert done.code == 0, done.err


def test_an_adapter_of_another_base_is_refused(finetune, trained, tmp_path):
    other = tmp_path / "other.gguf"
    tiny_gguf.write_gguf(other, tiny_gguf.random_state(tied=False, seed=5))
    done = finetune(
        adapter=trained / "adapter.safetensors", bone_r=None, base_model_name_or_path=other
    )
    assert done.code == 2
    assert "was saved from other base weights than the model's" in done.complaint


def test_a_file_that_is_no_adapter_is_refused(finetune, tmp_path):
    for path, words in ((tmp_path / "absent", "absent"), (finetune.data, "rows.jsonl")):
        done = finetune(adapter=path)
        assert done.code == 2
        assert words in done.complaint


def test_the_start_may_be_replaced_by_the_result(finetune):
    finetune.good()
    start = finetune.output / "adapter.safetensors"
    done = finetune(adapter=start)
    assert done.code == 2
    assert "of a finished run" in done.complaint
    before = report_of(finetune.output)["loss"]["after"]
    report = finetune.good("--overwrite_output_dir", adapter=start)
    assert report["loss"]["before"] == before


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_go_on_as_one_does(finetune, tmp_path, tiny_path, strategy):
    finetune.good(output_dir=tmp_path / "first")
    start = tmp_path / "start.safetensors"
    shutil.copy(tmp_path / "first" / "adapter.safetensors", start)
    changes = {"adapter": start, "bone_r": 8, "max_steps": 3}
    finetune.good(**changes, gradient_accumulation_steps=2)
    together = tmp_path / "together"
    words = arguments(tiny_path, finetune.data, together, strategy=strategy, **changes)
    run_together(2, words, tmp_path / "log.txt")
    assert losses_of(together) == pytest.approx(losses_of(finetune.output), rel=1e-5)
