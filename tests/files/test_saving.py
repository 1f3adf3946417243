"""What a save takes out of a model."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import disha
from disha import (
    AdapterStateError,
    ArgumentError,
    ArgumentTypeError,
    MergeError,
)
from tests.adapter_files import base, trained
from tests.conftest import Layered, assert_same, perturb


class TestWhatTrainsIsSaved:
    def test_a_head_that_was_replaced_or_unfrozen(self, path, model, tokens):
        other = copy.deepcopy(model)
        other.head = nn.Linear(8, 5)
        disha.inject_adapters(model, "q_proj", 2)
        model.head = nn.Linear(8, 5)
        model.embed.requires_grad_(True)
        model.layers[0]["attn"].norm.bias.requires_grad_(True)
        perturb(model)
        trained = {id(one) for one in model.parameters() if one.requires_grad}
        assert {id(one) for one in disha.adapter_parameters(model)} == trained
        says = (
            r"holds 4 parameters .*: embed\.weight, .*, and 1 more\. To save without them, freeze"
        )
        with pytest.warns(UserWarning, match=says):
            disha.save_adapter(model, path)
        disha.load_adapter(other, path)
        assert torch.equal(other(tokens), model(tokens))


class TestSaving:
    def test_dropouts_of_which_a_file_has_one_are_named(self, path):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        for part, dropout in zip(model, (0.5, 0.1), strict=True):
            disha.inject_adapters(part, "all-linear", r=4, dropout=dropout)
        with pytest.warns(UserWarning, match=r"have dropouts of 0\.1 and 0\.5") as warned:
            disha.save_adapter(model, path)
        assert warned[0].filename == __file__

    def test_values_that_are_not_finite_are_not_written(self, saved, path):
        block = saved.head.disha["default"].block.data
        block.fill_(torch.finfo(torch.float32).max)  # whose sum is not finite
        disha.save_adapter(saved, path)
        old = path.read_bytes()
        block[0, 0] = float("nan")
        with pytest.raises(AdapterStateError, match=r"not finite.*head.bone_block"):
            disha.save_adapter(saved, path)
        assert path.read_bytes() == old

    def test_tensors_that_share_memory(self, path):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        model[2].weight = nn.Parameter(model[1].weight.data)
        model[2].running_mean = model[1].running_mean
        loaded = copy.deepcopy(model)
        disha.inject_adapters(model, "0", 2, also_train=r"[12]\.weight")
        model[1].weight.data.fill_(2.0)
        model[1].running_mean.fill_(3.0)
        disha.save_adapter(model, path)
        disha.load_adapter(loaded, path)
        assert_same(loaded.state_dict(), model.state_dict())

    def test_a_conjugated_parameter_is_saved_as_it_reads(self, path):
        model = nn.Linear(4, 4)
        model.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64).conj())
        disha.save_adapter(disha.inject_adapters(model, "", 2, also_train="phase"), path)
        other = nn.Linear(4, 4)
        other.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        other.load_state_dict(model.state_dict(), strict=False)
        other.phase.data.zero_()
        disha.load_adapter(other, path)
        assert torch.equal(other.phase, model.phase)

    def test_a_weight_that_holds_a_merge_is_not_taken_for_the_adapters(self, path):
        model = disha.inject_adapters(base(), "head", 2, also_train=r"head\.weight")
        disha.merge_adapters(model)
        with pytest.raises(MergeError, match=r"use head.weight as part of the adapter"):
            disha.save_adapter(model, path)
        assert not path.exists()

    def test_blocks_without_values(self, path):
        with torch.device("meta"):
            model = disha.inject_adapters(Layered(), "head", 2)
        with pytest.raises(AdapterStateError, match="meta device"):
            disha.save_adapter(model, path)

    def test_unknown_adapter(self, path):
        with pytest.raises(ArgumentError, match="no adapter 'x'"):
            disha.save_adapter(trained(), path, "x")
        assert not path.exists()

    @pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}])
    def test_metadata_that_is_not_text(self, path, metadata):
        with pytest.raises(ArgumentTypeError, match="str -> str"):
            disha.save_adapter(trained(), path, metadata=metadata)
        assert not path.exists()

    @pytest.mark.parametrize("named", ["new/", "there", "there/"])
    def test_into_a_folder(self, tmp_path, named):
        (tmp_path / "there").mkdir()
        path = f"{tmp_path}/{named}"
        disha.save_adapter(trained(), path)
        assert Path(path, "adapter.safetensors").is_file()
        assert disha.load_adapter(base(), path).complete
        assert disha.inspect_adapter(path).path == Path(path, "adapter.safetensors")


def test_the_work_grows_with_the_layers_not_with_their_square(path):
    few, many = (_calls_of_a_save(path, layers) / layers for layers in (32, 128))
    assert many < 1.2 * few


def _calls_of_a_save(path, layers):
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])
    disha.inject_adapters(model, "all-linear", r=2)
    disha.save_adapter(model, path)  # what only the first save does
    events = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        disha.save_adapter(model, path)
    finally:
        sys.setprofile(None)
    return len(events)
