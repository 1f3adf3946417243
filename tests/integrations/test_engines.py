"""What the engines of trainers write of an adapted model."""

import pytest
from accelerate import Accelerator
from torch import nn

import disha
from disha.integrations.accelerate import keep_adapter_only
from disha.integrations.engines import kept_keys, leave_out_base
from disha.integrations.transformers import AdapterCheckpoints
from disha.model.view import ModelView
from tests.conftest import refused


def test_a_state_keeps_the_buffers_that_training_may_change(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].register_buffer("mean", model[2].bias.detach().clone())
    model[2].register_buffer("scratch", model[2].bias.detach().clone())
    disha.inject_adapters(model, "0", 2, also_train="mean")
    leave_out_base(model, kept_keys(model, "default"), "FSDP")
    monkeypatch.setattr(ModelView, "is_sharded", True)
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert model.state_dict().keys() == {"0.disha.default.bone_block", "2.mean", *statistics}


@pytest.mark.parametrize(
    "keep", [AdapterCheckpoints, lambda model: keep_adapter_only(Accelerator(cpu=True), model)]
)
def test_another_adapter_that_trains_is_not_lost(keep):
    model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 4)), "all-linear", r=4)
    keep(model)
    disha.inject_adapters(model, "all-linear", r=4, adapter="b")
    with refused(model, disha.ArgumentError, "adapter 'b' trains, and .* hold 'default' alone"):
        keep(model)
    disha.set_active_adapters(model, "default")
    keep(model)
