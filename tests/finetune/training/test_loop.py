from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch

import disha
from disha.finetune.data.examples import Example, collate
from disha.finetune.errors import TrainingError
from disha.finetune.training.evaluation import mean_loss
from disha.finetune.training.loop import (
    Schedule,
    TrainingPlan,
    accumulate_gradients,
    training_steps,
)

PLAN = TrainingPlan(
    batch_size=2,
    accumulation=2,
    epochs=1.0,
    max_steps=-1,
    learning_rate=1e-2,
    weight_decay=0.0,
    warmup_ratio=0.0,
    max_gradient_norm=1.0,
    eval_steps=0,
    seed=0,
)


def plan(**changes):
    return TrainingPlan(**{**PLAN.__dict__, **changes})


def examples(count=12):
    """Prompts and responses of all lengths."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        tokens = torch.randint(3, 200, (6 + 3 * (index % 5),), generator=generator).tolist()
        made.append(Example(tuple(tokens), prompt_length=2 + index % 3))
    return made


@pytest.fixture
def adapted(tiny_model):
    torch.manual_seed(0)
    return disha.inject_adapters(tiny_model, "_proj$", 8)


def blocks(model):
    return [block.detach().clone() for block in disha.adapter_parameters(model)]


def gradients(model, batches):
    model.zero_grad()
    loss = accumulate_gradients(model, batches)
    return loss, [block.grad.clone() for block in disha.adapter_parameters(model)]


def test_accumulated_small_batches_equal_one_large_batch(adapted):
    rows = examples(9)
    large_loss, large = gradients(adapted, [collate(rows)])
    # Parts of unequal size and length: a mean of means would differ.
    small_loss, small = gradients(
        adapted, [collate(rows[:1]), collate(rows[1:4]), collate(rows[4:])]
    )
    assert small_loss == pytest.approx(large_loss, rel=1e-6)
    for one, other in zip(small, large, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_loss_is_the_mean_over_supervised_tokens(adapted):
    rows = examples(5)
    loss, _ = gradients(adapted, [collate(rows[:2]), collate(rows[2:])])
    assert loss == pytest.approx(mean_loss(adapted, rows), rel=1e-5)


def test_mean_loss_is_the_same_in_any_order_and_keeps_the_mode(adapted):
    rows = examples(40)
    assert mean_loss(adapted, rows) == pytest.approx(mean_loss(adapted, rows[::-1]), rel=1e-6)
    adapted.train()
    mean_loss(adapted, rows)
    assert adapted.training
    adapted.eval()
    mean_loss(adapted, rows)
    assert not adapted.training


def test_schedule_warms_up_then_follows_a_cosine():
    schedule = Schedule(peak=2.0, steps=12, warmup=3)
    rates = [schedule.learning_rate(step) for step in range(12)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[3:] == pytest.approx([1 + math.cos(math.pi * i / 9) for i in range(9)])
    assert min(rates) > 0


def test_schedule_without_warmup_starts_at_the_peak():
    assert Schedule(peak=0.3, steps=1, warmup=0).learning_rate(0) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("changes", "rows", "steps"),
    [
        ({}, 12, 3),
        ({}, 13, 4),
        ({"epochs": 2.5}, 12, 8),
        ({"epochs": 0.01}, 12, 1),
        ({"max_steps": 7, "epochs": 2.0}, 12, 7),
        ({"batch_size": 100, "accumulation": 100}, 12, 1),
    ],
)
def test_number_of_steps(changes, rows, steps):
    assert plan(**changes).steps(rows) == steps


def test_warmup_is_rounded_up():
    assert plan(max_steps=10, warmup_ratio=0.11).schedule(12).warmup == 2


def test_steps_are_recorded(adapted):
    rows = examples()
    steps = list(training_steps(adapted, rows, plan(epochs=2.0)))
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.epoch for step in steps] == [1, 1, 1, 2, 2, 2]
    per_epoch = sum(len(row.tokens) - 1 for row in rows)
    assert sum(step.tokens for step in steps[:3]) == per_epoch
    schedule = plan(epochs=2.0).schedule(len(rows))
    assert [step.learning_rate for step in steps] == [schedule.learning_rate(i) for i in range(6)]
    assert all(b.seconds > a.seconds for a, b in pairwise(steps))
    assert all(step.tokens_per_second > 0 for step in steps)


def test_training_lowers_the_loss_and_changes_blocks_only(adapted):
    rows = examples()
    base = {k: v.clone() for k, v in adapted.state_dict().items() if "bone_block" not in k}
    before = mean_loss(adapted, rows)
    for _ in training_steps(adapted, rows, plan(max_steps=25)):
        pass
    assert mean_loss(adapted, rows) < before - 0.5
    after = adapted.state_dict()
    assert all(torch.equal(after[name], values) for name, values in base.items())


def test_the_same_seed_trains_the_same_blocks(adapted):
    def train(seed):
        model = copy.deepcopy(adapted)
        list(training_steps(model, examples(), plan(seed=seed)))
        return blocks(model)

    assert all(map(torch.equal, train(5), train(5)))
    assert not all(map(torch.equal, train(5), train(6)))


def test_evaluations_at_their_steps_and_after_the_last(adapted):
    losses = iter([3.0, 2.0, 1.0])
    steps = list(
        training_steps(adapted, examples(), plan(max_steps=5, eval_steps=2), lambda: next(losses))
    )
    assert [step.eval_loss for step in steps] == [None, 3.0, None, 2.0, 1.0]


def test_gradients_are_clipped_to_the_norm(adapted):
    first = next(training_steps(adapted, examples(), plan()))
    assert first.gradient_norm > 1.0
    norms = []

    class Recorded(torch.optim.SGD):
        def step(self, closure=None):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Recorded)
        list(training_steps(adapted, examples(), plan(max_steps=2)))
        list(training_steps(adapted, examples(), plan(max_steps=1, max_gradient_norm=0.0)))
    assert norms[:2] == pytest.approx([1.0, 1.0], rel=1e-4)
    assert norms[2] > 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(adapted, bad):
    with torch.no_grad():
        adapted.model.norm.weight[0] = bad
    before = blocks(adapted)
    with pytest.raises(TrainingError, match="training stopped at step 1: loss nan"):
        list(training_steps(adapted, examples(), plan()))
    assert all(map(torch.equal, before, blocks(adapted)))
