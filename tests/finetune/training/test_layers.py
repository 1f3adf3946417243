from __future__ import annotations

import copy
from functools import partialmethod

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import disha
from disha.finetune.errors import SettingsError
from disha.finetune.training.layers import (
    compile_model,
    enable_gradient_checkpointing,
    repeated_layers,
)
from disha.finetune.training.loop import training_steps
from disha.finetune.training.objectives import TextObjective
from tests.finetune.training.tiny import batch_of, blocks, examples, objective, plan, same, source


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=200, n_positions=64, n_embd=16, n_layer=3, n_head=2)
    return GPT2LMHeadModel(config)


class Experts(nn.Module):
    """A layer that is a stack itself."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return x + sum(expert(x) for expert in self.experts)


class Network(nn.Module):
    """Two stacks, and lists that are none."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList(Experts() for _ in range(2))
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.activations = nn.ModuleList([nn.ReLU(), nn.ReLU()])
        self.one = nn.ModuleList([nn.Linear(4, 4)])


def test_a_decoder_is_a_stack_of_its_layers():
    model = objective().model
    assert repeated_layers(model) == list(model.model.layers)


def test_a_model_of_transformers_is_a_stack_of_its_blocks(gpt2):
    disha.inject_adapters(gpt2, r"attn\.c_attn$", 4)
    assert repeated_layers(gpt2) == list(gpt2.transformer.h)


def test_the_outermost_lists_of_one_class_with_parameters_are_stacks():
    network = Network()
    assert repeated_layers(network) == [*network.body.blocks, *network.tail]
    assert repeated_layers(network.tail) == list(network.tail)


def saved_bytes(trained, batch):
    """Bytes that autograd keeps from forward to backward, each storage once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in trained.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trained(batch)
    size = sum(size for pointer, size in kept.items() if pointer not in parameters)
    return size, loss


@pytest.mark.parametrize("method", ["bone", "bat"])
def test_checkpointing_trains_the_same_with_less_kept(method):
    batch = batch_of(examples(8))
    plain, checkpointed = (objective(dropout=0.3, method=method) for _ in range(2))
    keys = list(checkpointed.state_dict())
    enable_gradient_checkpointing(checkpointed.model)
    assert list(checkpointed.state_dict()) == keys
    assert saved_bytes(checkpointed, batch)[0] < 0.6 * saved_bytes(plain, batch)[0]
    losses = []
    for trained in (plain, checkpointed):
        torch.manual_seed(3)
        losses.append([step.loss for step in training_steps(trained, source(), plan())])
    assert losses[0] == losses[1]
    assert same(blocks(plain), blocks(checkpointed))


def test_checkpointing_is_for_training_only():
    trained = objective()
    enable_gradient_checkpointing(trained.model)
    batch, plain = batch_of(examples(8)), objective()
    assert saved_bytes(trained.eval(), batch)[0] == saved_bytes(plain.eval(), batch)[0]


def test_a_copy_of_a_checkpointed_model_calls_its_own_layers():
    trained = objective()
    enable_gradient_checkpointing(trained.model)
    other, batch = copy.deepcopy(trained), batch_of(examples(4))
    before = float(trained(batch).detach())
    with torch.no_grad():
        for block in disha.adapter_parameters(other):
            block += 1
    assert float(trained(batch).detach()) == before
    assert float(other(batch).detach()) != before


def test_models_of_transformers_are_asked_for_their_own_checkpointing(gpt2):
    disha.inject_adapters(gpt2, r"attn\.c_attn$", 4)
    gpt2.train()
    plain, checkpointed = TextObjective(copy.deepcopy(gpt2)), TextObjective(gpt2)
    enable_gradient_checkpointing(gpt2)
    batch = batch_of(examples(8))
    gradients = []
    for trained in (plain, checkpointed):
        torch.manual_seed(3)
        trained(batch).backward()
        gradients.append([block.grad for block in disha.adapter_parameters(trained)])
    assert same(*gradients)
    assert saved_bytes(checkpointed, batch)[0] < 0.8 * saved_bytes(plain, batch)[0]


def test_a_model_that_says_it_can_not_be_checkpointed_is_believed(gpt2):
    gpt2.supports_gradient_checkpointing = False
    with pytest.raises(SettingsError, match=r"does not support.*leave it out"):
        enable_gradient_checkpointing(gpt2)


def test_a_model_without_layers_can_not_be_checkpointed():
    with pytest.raises(SettingsError, match="and Linear has none"):
        enable_gradient_checkpointing(nn.Linear(2, 2))


def test_compiled_layers_train_the_same_under_the_same_names(monkeypatch):
    # Without the compiler of C++, which takes most of a minute.
    usual = partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", usual)
    plain, compiled = (objective(layers=1) for _ in range(2))
    keys = list(compiled.state_dict())
    compile_model(compiled.model)
    assert list(compiled.state_dict()) == keys
    steps = [
        list(training_steps(trained, source(8, size=8), plan(num_train_epochs=3)))
        for trained in (plain, compiled)
    ]
    assert [step.loss for step in steps[1]] == pytest.approx(
        [step.loss for step in steps[0]], rel=1e-5
    )
    for one, other in zip(blocks(plain), blocks(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    [layer] = compiled.model.model.layers
    assert layer._compiled_call_impl is not None


def test_a_model_without_layers_is_compiled_whole():
    model = nn.Linear(2, 2)
    compile_model(model)
    assert model._compiled_call_impl is not None
