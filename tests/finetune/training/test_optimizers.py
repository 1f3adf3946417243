from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from disha.finetune.errors import SettingsError
from disha.finetune.settings import OptimizerName
from disha.finetune.training.optimizers import make_optimizer, state_bytes
from tests.finetune.training.test_checkpoints import Run
from tests.finetune.training.tiny import plan, source

NAMES = get_args(OptimizerName)


class Some(nn.Module):
    """Parameters of one to three axes, and a frozen one."""

    def __init__(self):
        super().__init__()
        shapes = [(5,), (3, 4), (2, 3, 4)]
        self.blocks = nn.ParameterList([torch.zeros(shape) for shape in shapes])
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def stepped(name, rate=1e-2):
    model = Some()
    optimizer = make_optimizer(model, plan(optimizer=name, learning_rate=rate))
    torch.manual_seed(0)
    for block in model.blocks:
        block.grad = torch.randn_like(block)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_counted(name):
    model, optimizer = stepped(name)
    assert set(optimizer.state) == set(model.blocks)
    for block, state in optimizer.state.items():
        moments = sum(value.nbytes for key, value in state.items() if key != "step")
        assert moments == state_bytes(name, block)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_first_step_moves_blocks_that_are_zero_by_the_rate(name):
    model, _ = stepped(name, rate=1e-2)
    for block in model.blocks:
        assert 0.5e-2 < block.detach().square().mean().sqrt() < 1.5e-2


def test_sgd_is_torchs_with_momentum():
    model, optimizer = stepped("sgd")
    gradients = [block.grad.clone() for block in model.blocks]
    optimizer.step()
    for block, gradient in zip(model.blocks, gradients, strict=True):
        expected = -1e-2 * (gradient + 1.9 * gradient)
        torch.testing.assert_close(block.detach(), expected, rtol=1e-2, atol=1e-4)  # and decay


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_train_is_named(name):
    with pytest.raises(SettingsError, match="there is nothing to train"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), plan(optimizer=name))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adamw"])
def test_a_run_that_is_stopped_and_resumed_is_the_same_to_the_bit(name, tmp_path):
    choices = plan(num_train_epochs=2.0, optimizer=name)

    def run(folder):
        return Run(tmp_path / folder, source(13), choices)

    straight = run("straight")
    expected = straight.train(save=False)
    run("parted").train(steps=3)
    resumed = run("parted")
    assert resumed.train(resumed.restore().progress, save=False) == expected
    pairs = zip(straight.objective.parameters(), resumed.objective.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_loss_falls_with_each():
    for name, rate in zip(NAMES, (1e-2, 1.0, 1e-2), strict=True):
        run = Run("unused", source(13), plan(optimizer=name, learning_rate=rate, max_steps=30))
        losses = run.train(save=False)
        assert sum(losses[-5:]) < sum(losses[:5]), name
