"""What a plan says, and that making one changes nothing."""

import math

import pytest
import torch
from torch import nn

import disha
from disha import ArgumentError, TargetError
from tests.conftest import Layered, assert_unchanged, snapshot
from tests.layers.test_kinds import Raw


class TestPlan:
    def test_counts_are_what_injection_gives(self, model):
        arguments = {"r": 2, "also_train": "norm", "method": "bat", "exclude": "head"}
        plan = disha.plan_adapters(model, "all-linear", **arguments)
        disha.inject_adapters(model, "all-linear", **arguments)
        summary = disha.summary(model)
        assert (plan.trainable, plan.total) == (summary.trainable, summary.total)
        assert plan.percent == summary.percent
        assert [layer.name for layer in plan.layers] == [row.name for row in summary.layers]
        assert plan.added == sum(layer.parameters for layer in summary.layers)

    def test_counts_beside_another_adapter(self, model):
        disha.inject_adapters(model, "q_proj", 2, adapter="a", also_train="norm")
        plan = disha.plan_adapters(model, "head", 3)
        disha.inject_adapters(model, "head", 3)
        summary = disha.summary(model)
        assert (plan.trainable, plan.total) == (summary.trainable, summary.total)

    def test_changes_nothing(self, model):
        before = snapshot(model)
        text = str(disha.plan_adapters(model, ".", 2, also_train="embed"))
        assert_unchanged(model, before)
        assert "skipped layers.0.attn.norm: no layer kind adapts LayerNorm" in text
        assert "also trained: embed.weight" in text

    def test_works_on_meta(self):
        with torch.device("meta"):
            model = Layered()
        assert disha.plan_adapters(model, "all-linear", 2).added == 2 * (8 * 4 + 12)
        disha.inject_adapters(model, "all-linear", 2)
        assert all(p.is_meta for p in disha.adapter_parameters(model))


def test_unknown_layouts_are_listed_with_the_way_to_adapt_them():
    plan = disha.plan_adapters(Raw(), "all-linear", 2)
    assert [(one.name, one.shape) for one in plan.unknown] == [("mix", (3, 6, 4))]
    assert "declare its layout, such as layouts={'^mix$': 'expert out in'}" in str(plan)
    raw = Raw()
    del raw.proj
    with pytest.raises(TargetError, match=r"selects no layer; mix: .* declare it, such as"):
        disha.plan_adapters(raw, "all-linear", 2)


def test_a_plan_lists_what_r_does_not_fit():
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(8, 4), nn.Linear(8, 0))
    plan = disha.plan_adapters(model, "all-linear", 4)
    assert [one.name for one in plan.layers] == ["1"]
    assert [(one.name, one.reason) for one in plan.skipped] == [
        ("2", "its weight is empty"), ("0", "r=4 is larger than in_features=2")
    ]  # fmt: skip
    with pytest.raises(ArgumentError, match="0: r=4 is larger than in_features=2"):
        disha.inject_adapters(model, "all-linear", 4)


def test_the_rate_is_that_of_the_layers_and_not_of_new_rows():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4))
    rate = disha.plan_adapters(model, "1", 2).rate
    assert disha.plan_adapters(model, "1", 2, also_train_rows={"0": [3]}).rate == rate
    assert math.isnan(disha.plan_adapters(model, "1", 5).rate)


def test_tied_weights_are_named():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Embedding(6, 4))
    model[1].weight = model[0].weight
    plan = disha.plan_adapters(model, ".", 2)
    assert plan.tied == (("0.weight", "1.weight"),)
    assert "one shared parameter: 0.weight, 1.weight" in str(plan)
