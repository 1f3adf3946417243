"""Updates cut or padded to a rank."""

import copy

import pytest
import torch
from torch import nn

import disha
from disha import ArgumentTypeError
from disha.functional import method_of
from disha.interop import lora, low_rank
from tests.conftest import Layered
from tests.functional.updates import MATRIX, bone_delta_weight
from tests.language_models import llama
from tests.lora_folders import TOKENS, adapted, check_served, served
from tests.peft_models import (
    refused_export,
)


def dense(layer):
    """dW (out, in) of a linear layer, in float64."""
    block = layer.disha["default"]
    if block.method.name == "bat":
        wide = layer.base_weight.detach().double(), block.block.detach().double()
        return method_of("bat").delta_weight(MATRIX, wide[1], wide[0])
    return bone_delta_weight(block.block.detach(), layer.in_features, layer.out_features).double()


@pytest.mark.parametrize(("method", "rank"), [("bat", 1), ("bat", 5), ("bone", 1), ("bone", 3)])
def test_the_cut_is_the_best_one_and_its_error_is_reported(tmp_path, method, rank):
    base = Layered().double()
    ours = adapted(base, "_proj", 4, method=method, scale=2.0)
    report = lora.export(ours, tmp_path, rank=rank)
    theirs = served(base, tmp_path).base_model.model
    for layer in report.layers:
        delta = 2 * dense(ours.get_submodule(layer.name))
        rest = delta - theirs.get_submodule(layer.name).get_delta_weight("default").detach()
        singular = torch.linalg.svdvals(delta)
        assert layer.rank == rank
        assert layer.error == pytest.approx((rest.norm() / delta.norm()).item(), rel=1e-6)
        assert layer.error == pytest.approx(
            (singular[rank:].norm() / singular.norm()).item(), rel=1e-6
        )
    assert 0.01 < report.error == max(layer.error for layer in report.layers)
    assert f"largest error {report.error:.3g}" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bat_at_full_rank_is_exact_to_rounding(tmp_path, dtype):
    base = llama().eval().to(dtype)
    ours = adapted(base, method="bat", r=5)
    report = lora.export(ours, tmp_path, rank=64)
    assert report.error < (1e-5 if dtype == torch.float32 else 1e-12)
    check_served(base, tmp_path, ours, TOKENS, 1e-3 if dtype == torch.float32 else 1e-10)


def test_a_cut_update_of_zero_has_no_error(tmp_path):
    ours = disha.inject_adapters(Layered(), "_proj", 4, method="bat")
    assert lora.export(ours, tmp_path, rank=2).error == 0


def test_errors_count_the_rounding_to_sixteen_bits(tmp_path):
    ours = adapted(llama().eval().to(torch.bfloat16), method="bat", dtype=torch.bfloat16)
    assert 1e-4 < lora.export(ours, tmp_path, rank=64).error < 1e-2


def test_leading_singular_values_of_large_layers(tmp_path, monkeypatch):
    """Beyond some size only these are computed; little is lost by it, and every time the same."""
    ours = adapted(nn.Sequential(nn.Linear(300, 200)), "0", 8, method="bat")
    exact = lora.export(ours, tmp_path / "exact", rank=16).error
    monkeypatch.setattr(low_rank, "LARGEST_EXACT", 100)
    state, seeded = torch.random.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    near = lora.export(ours, tmp_path / "near", rank=16)
    again = lora.export(ours, tmp_path / "again", rank=16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not seeded  # a training on a GPU goes on with its own random numbers
    assert exact < near.error < 1.01 * exact
    assert near.layers == again.layers


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, disha.ArgumentError, "give `rank`"),
        ({"rank": 0}, disha.ArgumentError, "rank must be at least 1, got 0"),
        ({"rank": 2.0}, ArgumentTypeError, "rank must be an int"),
        ({"rank": True}, ArgumentTypeError, "rank must be an int"),
        ({"rank": 2, "adapter": "other"}, disha.ArgumentError, "no adapter 'other'"),
    ],
)
def test_arguments(tmp_path, options, kind, message):
    ours = adapted(Layered(), "_proj", 4, method="bat")
    with refused_export(tmp_path, ours, message, kind=kind):
        lora.export(ours, tmp_path / "lora", **options)


@pytest.mark.parametrize(("r", "padded"), [(4, 8), (8, 8), (18, 32), (40, 64)])
def test_padded_ranks_are_those_that_servers_allow(tmp_path, r, padded):
    base = nn.Sequential(nn.Linear(48, 40), nn.Embedding(48, 40), nn.Conv2d(48, 40, 1))
    ours = adapted(base, "0|1|2", r, scale=0.3)
    report = lora.export(ours, tmp_path, pad=True)
    assert {layer.rank for layer in report.layers} == {padded}
    assert report.error == 0
    theirs = served(copy.deepcopy(base), tmp_path).base_model.model
    x = torch.randn(3, 48)
    torch.testing.assert_close(theirs[0](x), ours[0](x))
    again = copy.deepcopy(base)
    lora.load(again, tmp_path)
    for name in "012":
        found, expected = (one.get_submodule(name).disha["default"] for one in (again, ours))
        assert (found.r, torch.equal(found.block, expected.block)) == (r, True)
        assert found.scale == pytest.approx(0.3)


def test_ranks_beyond_those_of_servers_are_padded_to_the_largest(tmp_path):
    ours = adapted(
        nn.Sequential(nn.Linear(600, 4), nn.Linear(4, 4)), "0|1", 513, rank_pattern={"1": 2}
    )
    report = lora.export(ours, tmp_path / "lora", pad=True)
    assert [layer.rank for layer in report.layers] == [513, 513]
