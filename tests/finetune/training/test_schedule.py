from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from disha.finetune.training.schedule import Schedule

NAMES = ("cosine", "linear", "constant")
PEERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def rates(name, steps, warmup, peak=2.0):
    schedule = Schedule(name, peak, steps, warmup)
    return [schedule.learning_rate(step) for step in range(steps)]


def peer_rates(name, steps, warmup, peak=2.0):
    """What transformers gives."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(PEERS[name], optimizer, warmup, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "warmup"), [(12, 3), (7, 0), (50, 1), (1, 0)])
def test_after_the_warm_up_the_rates_are_those_of_transformers(name, steps, warmup):
    expected = peer_rates(name, steps, warmup)
    assert rates(name, steps, warmup)[warmup:] == pytest.approx(expected[warmup:], rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_warm_up_begins_one_part_higher_than_that_of_transformers(name):
    """Theirs is s / w, with the rate zero in the first step; ours is (s + 1) / (w + 1)."""
    assert peer_rates(name, 12, 3)[:4] == pytest.approx([0, 2 / 3, 4 / 3, 2])
    assert rates(name, 12, 3)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


@given(st.sampled_from(NAMES), st.integers(1, 400), st.floats(0, 1))
def test_rates_rise_to_the_peak_then_fall_and_none_is_zero(name, steps, part):
    warmup = min(steps, round(part * steps))
    found = rates(name, steps, warmup)
    assert all(0 < rate <= 2.0 for rate in found)
    assert found[: warmup + 1] == sorted(found[: warmup + 1])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    if warmup < steps:
        assert found[warmup] == 2.0


@pytest.mark.parametrize("name", NAMES)
def test_the_last_rate_of_a_long_training_is_above_zero(name):
    assert Schedule(name, 1e-4, 10**9, 0).learning_rate(10**9 - 1) > 0
