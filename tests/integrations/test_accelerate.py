"""Accelerate with adapted models: the states that it saves and loads."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils.dataclasses import get_module_class_from_name
from torch import nn

import disha
from disha.integrations.accelerate import keep_adapter_only
from tests.integrations.models import BASES, assert_same, net


def with_accelerator(model, *, prepare_first):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    if not prepare_first:
        keep_adapter_only(accelerator, model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if prepare_first:
        keep_adapter_only(accelerator, model)
    return accelerator, prepared, optimizer


def step(model, optimizer, accelerator):
    loss = model(torch.randn(8, 16)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()


@BASES
@pytest.mark.parametrize("prepare_first", [False, True])
def test_states_of_accelerate_hold_the_adapter_and_resume_bit_for_bit(
    tmp_path, prepare_first, linear
):
    model = net(linear)
    accelerator, prepared, optimizer = with_accelerator(model, prepare_first=prepare_first)
    for number in range(4):
        if number == 2:
            accelerator.save_state(tmp_path)
        step(prepared, optimizer, accelerator)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"adapter.safetensors"}

    again = net(linear)
    accelerator, prepared, optimizer = with_accelerator(again, prepare_first=prepare_first)
    accelerator.load_state(tmp_path)
    for _ in range(2):
        step(prepared, optimizer, accelerator)
    assert_same(again, model)


def test_accelerate_wraps_the_layers_of_the_user_that_are_called_block():
    class Block(nn.Sequential):
        pass

    model = disha.inject_adapters(nn.Sequential(nn.Embedding(8, 4), Block(nn.Linear(4, 4))), ".", 2)
    assert get_module_class_from_name(model, "Block") is Block


def test_accelerate_saves_other_models_as_before(tmp_path):
    model, head = net(), nn.Linear(4, 2)
    accelerator = Accelerator(cpu=True)
    keep_adapter_only(accelerator, model)
    accelerator.prepare(head, model)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        head.weight.zero_()
    accelerator.load_state(tmp_path)
    assert all(torch.equal(head.state_dict()[key], value) for key, value in before.items())
    with pytest.raises(disha.ArgumentError, match="other"):
        keep_adapter_only(accelerator, model, "other")
