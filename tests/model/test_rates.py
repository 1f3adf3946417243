"""suggest_rate: the step of Adam that moves a model's log-probabilities by a given size."""

import copy

import pytest
import torch
from torch import nn

import disha
from disha.errors import ArgumentError
from disha.model.rates import MOVE, MOVE_OF_FACTORS


def make(method="bone", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    disha.inject_adapters(model, "all-linear", r=8, method=method)
    return model, torch.randn(32, 64), torch.randint(10, (32,))


def suggest(model, x, labels):
    return disha.suggest_rate(model, x, loss=lambda y: nn.functional.cross_entropy(y, labels))


@pytest.mark.parametrize("method", ["bone", "bone_groups2", "bone_groups_all", "lora", "bat"])
def test_a_step_at_the_rate_moves_log_probabilities_by_the_constant(method):
    model, x, labels = make(method)
    rate = suggest(model, x, labels)
    model.eval()
    before = model(x)
    nn.functional.cross_entropy(before, labels).backward()
    small, move = 1e-3, MOVE_OF_FACTORS if method == "lora" else MOVE
    optimizer = torch.optim.AdamW(disha.adapter_parameters(model), lr=small * rate, weight_decay=0)
    optimizer.step()
    p, change = before.softmax(-1), model(x).log_softmax(-1) - before.log_softmax(-1)
    variance = (p * change**2).sum(-1) - (p * change).sum(-1) ** 2
    assert float(variance.detach().mean().sqrt()) == pytest.approx(small * move, rel=0.2)


def test_model_modes_and_gradients_are_as_before():
    model, x, labels = make()
    model[0].eval()
    before = copy.deepcopy(model)
    suggest(model, x, labels)
    for (name, old), (_, new) in zip(before.named_modules(), model.named_modules(), strict=True):
        assert old.training == new.training, name
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new)
        assert new.grad is None


def test_more_groups_take_a_higher_rate():
    rates = [suggest(*make(name)) for name in ("bone", "bone_groups2", "bone_groups_all")]
    assert rates == sorted(rates)


def test_what_the_loss_leaves_out_does_not_count():
    model, x, labels = make()
    padded = torch.cat([x, torch.zeros(96, 64)])
    rate = disha.suggest_rate(
        model, input=padded, loss=lambda y: nn.functional.cross_entropy(y[:32], labels)
    )
    assert rate == pytest.approx(suggest(model, x, labels))


def test_what_gives_no_rate_is_said():
    model, x, labels = make()
    with pytest.raises(ArgumentError, match="has no loss"):
        disha.suggest_rate(model, x)
    disha.remove_adapters(model)
    with pytest.raises(ArgumentError, match="no adapter trains"):
        suggest(model, x, labels)
