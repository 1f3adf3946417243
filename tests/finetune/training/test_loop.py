from __future__ import annotations

import itertools
import math
import signal
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import get_scheduler

import disha
from disha.finetune.data.batches import collate
from disha.finetune.errors import DataError, SettingsError, TrainingError
from disha.finetune.stopping import Interrupted, listening, raising
from disha.finetune.training import optimizers
from disha.finetune.training.evaluation import mean_loss
from disha.finetune.training.loop import (
    Progress,
    accumulate_gradients,
    learning_rate,
    make_optimizer,
    planned_steps,
    training_steps,
)
from disha.finetune.training.parallel import Processes
from tests.finetune.training.tiny import (
    PackedPairs,
    batch_of,
    blocks,
    examples,
    objective,
    plan,
    same,
    source,
)

ALONE = Processes.alone(torch.device("cpu"))


def gradients(trained, batches):
    """Loss and gradients of batches of examples."""
    trained.zero_grad()
    batches = [[[example] for example in batch] for batch in batches]
    share = accumulate_gradients(trained, source(), batches, ALONE)
    return float(share.loss), [block.grad.clone() for block in disha.adapter_parameters(trained)]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_accumulated_small_batches_equal_one_large_batch(sizes):
    """Parts of unequal size and length: a mean of means would differ."""
    trained, rows = objective(), examples(sum(sizes))
    ends = list(itertools.accumulate(sizes, initial=0))
    large_loss, large = gradients(trained, [rows])
    small_loss, small = gradients(trained, [rows[a:b] for a, b in pairwise(ends)])
    assert small_loss == pytest.approx(large_loss, rel=1e-6)
    for one, other in zip(small, large, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_learned_tokens():
    trained, rows = objective(), examples(5)
    loss, _ = gradients(trained, [rows[:2], rows[2:]])
    logits = [trained.model(torch.tensor([row.tokens]))[0, :-1] for row in rows]
    losses = [
        nn.functional.cross_entropy(scores, torch.tensor(row.tokens[1:]), reduction="none")
        for scores, row in zip(logits, rows, strict=True)
    ]
    learned = [
        one[first - 1 : end - 1]
        for one, row in zip(losses, rows, strict=True)
        for first, end in row.learned
    ]
    assert loss == pytest.approx(float(torch.cat(learned).mean().detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "batches", "processes", "steps"),
    [
        ({}, 6, 1, 3),
        ({}, 7, 1, 4),
        ({"num_train_epochs": 2.5}, 6, 1, 8),
        ({"num_train_epochs": 0.01}, 6, 1, 1),
        ({"max_steps": 7, "num_train_epochs": 2.0}, 6, 1, 7),
        ({"max_steps": 7}, None, 1, 7),
        ({"gradient_accumulation_steps": 100}, 6, 1, 1),
        ({}, 8, 2, 2),
        ({}, 9, 2, 3),
        ({"num_train_epochs": 2.0}, 9, 4, 4),
    ],
)
def test_number_of_steps(changes, batches, processes, steps):
    chosen = plan(**changes)
    size = chosen.gradient_accumulation_steps * processes
    assert planned_steps(chosen, batches, size) == steps


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_steps_are_recorded(name):
    rows, choices = source(13), plan(num_train_epochs=2.0, lr_scheduler_type=name)
    steps = list(training_steps(objective(), rows, choices))
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [step.epoch for step in steps] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert [step.batches for step in steps] == [2, 4, 6, 7, 2, 4, 6, 7]
    per_epoch = sum(len(row.tokens) - 1 for row in rows.examples)
    assert sum(step.tokens for step in steps[:4]) == per_epoch
    assert [step.learning_rate for step in steps] == [
        learning_rate(choices, step, 8) for step in range(8)
    ]
    assert all(b.seconds > a.seconds for a, b in pairwise(steps))
    assert all(step.tokens_per_second > 0 for step in steps)
    assert steps[4].progress == Progress(5, 2, 2, steps[4].seconds)


def test_training_lowers_the_loss_and_changes_blocks_only():
    trained, rows = objective(), source()
    base = {k: v.clone() for k, v in trained.state_dict().items() if "bone_block" not in k}
    held_out = [batch_of(examples())]
    before = mean_loss(trained, held_out).loss
    for _ in training_steps(trained, rows, plan(max_steps=30)):
        pass
    assert mean_loss(trained, held_out).loss < before - 0.5
    after = trained.state_dict()
    assert all(torch.equal(after[name], values) for name, values in base.items())


def test_the_same_seed_trains_the_same_blocks():
    def train(seed):
        trained = objective()
        list(training_steps(trained, source(seed=seed), plan()))
        return blocks(trained)

    assert same(train(5), train(5))
    assert not same(train(5), train(6))


def test_the_steps_are_those_of_adamw_by_hand():
    trained, plain = objective(), objective()
    choices = plan(max_grad_norm=0.0, num_train_epochs=2.0)
    steps = list(training_steps(trained, source(), choices))
    parameters = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=choices.weight_decay)
    rows, losses = source(), []
    for epoch in (1, 2):
        batches = list(rows.batches(epoch))
        for first, second in zip(batches[::2], batches[1::2], strict=True):
            optimizer.param_groups[0]["lr"] = steps[len(losses)].learning_rate
            both = collate([*first, *second])
            loss = plain(both) / both.weight
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("split", [1, 3, 4, 6])
def test_training_goes_on_where_it_is_told_to(split):
    """Without dropout, model and optimizer are all there is besides the place in the data."""
    straight, parted = objective(), objective()
    choices, rows = plan(num_train_epochs=2.0), source(13)
    expected = [step.loss for step in training_steps(straight, rows, choices)]
    optimizer = make_optimizer(parted, choices)
    first = list(
        itertools.islice(training_steps(parted, rows, choices, optimizer=optimizer), split)
    )
    rest = list(
        training_steps(parted, rows, choices, optimizer=optimizer, start=first[-1].progress)
    )
    assert [step.loss for step in (*first, *rest)] == expected
    assert rest[0].seconds > first[-1].seconds
    assert same(blocks(straight), blocks(parted))


def test_packed_rows_are_learned_like_rows_of_their_own():
    choices = plan(gradient_accumulation_steps=1)
    packed, apart = objective(), objective()
    [step] = training_steps(packed, PackedPairs(examples(4), 2, 0), choices)
    [other] = training_steps(apart, source(4, size=4), choices)
    assert step.tokens == other.tokens
    assert step.loss == pytest.approx(other.loss, rel=1e-5)
    assert step.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)


def test_a_signal_cuts_the_step_that_is_under_way():
    trained, rows, collated = objective(), source(), []
    choices = plan(gradient_accumulation_steps=2)

    class Signalling(type(rows)):
        def collate(self, batch):
            collated.append(batch)
            if len(collated) == 3:  # the first of two in the second step
                signal.raise_signal(signal.SIGTERM)
            return super().collate(batch)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with listening(), raising(False):
        steps = training_steps(trained, Signalling(rows.examples, 2, 0), choices)
        next(steps)
        learned = [parameter.detach().clone() for parameter in trained.parameters()]
        with pytest.raises(Interrupted):
            next(steps)
    signal.signal(signal.SIGTERM, before)
    assert len(collated) == 3
    assert all(map(torch.equal, trained.parameters(), learned))


def recorded_norms(monkeypatch, choices):
    norms = []

    class Recorded(torch.optim.SGD):
        def __init__(self, parameters, lr, **options):
            super().__init__(parameters, lr)

        def step(self, closure=None):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(float(nn.utils.get_total_norm(grads)))

    monkeypatch.setitem(optimizers.KINDS, "adamw", Recorded)
    steps = list(training_steps(objective(), source(), choices))
    return [step.gradient_norm for step in steps], norms


def test_gradients_are_clipped_to_the_norm(monkeypatch):
    before, after = recorded_norms(monkeypatch, plan())
    assert min(before) > 1.0
    assert after == pytest.approx([1.0] * len(after), rel=1e-4)


def test_gradients_are_not_clipped_to_a_norm_of_zero(monkeypatch):
    before, after = recorded_norms(monkeypatch, plan(max_grad_norm=0.0))
    assert after == pytest.approx(before)


def test_bf16_computes_in_bfloat16_and_trains_in_float32():
    exact, rounded = objective(), objective()
    expected = [step.loss for step in training_steps(exact, source(), plan())]
    found = [step.loss for step in training_steps(rounded, source(), plan(bf16=True))]
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    assert {block.dtype for block in blocks(rounded)} == {torch.float32}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(bad):
    trained = objective()
    steps = training_steps(trained, source(), plan())
    next(steps)
    with torch.no_grad():
        trained.model.model.norm.weight[0] = bad
    before = blocks(trained)
    with pytest.raises(TrainingError, match="training stopped at step 2: loss nan"):
        next(steps)
    assert same(before, blocks(trained))


def test_a_gradient_that_is_not_finite_stops_before_the_update():
    trained = objective()
    parameter = next(disha.adapter_parameters(trained))
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = blocks(trained)
    with pytest.raises(TrainingError, match=r"stopped at step 1: loss \d.*gradient norm (inf|nan)"):
        list(training_steps(trained, source(), plan()))
    assert same(before, blocks(trained))


def error_of_the_cpu_allocator():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    return raised.value


@pytest.mark.parametrize(
    "make_error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError,
        error_of_the_cpu_allocator,
    ],
)
def test_lack_of_memory_says_what_to_lower(make_error):
    trained, error = objective(), make_error()

    def fail(batch):
        raise error

    trained.forward = fail
    with pytest.raises(TrainingError, match="lower --per_device_train_batch_size") as found:
        list(training_steps(trained, source(), plan()))
    assert found.value.__cause__ is error


def test_other_errors_are_not_taken_for_lack_of_memory():
    trained = objective()

    def fail(batch):
        raise RuntimeError("shapes do not match")

    trained.forward = fail
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(training_steps(trained, source(), plan()))


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no row to train on"):
        list(training_steps(objective(), source(0), plan(max_steps=1)))


def test_nothing_to_train_is_refused():
    frozen = objective()
    frozen.requires_grad_(False)
    with pytest.raises(SettingsError, match="nothing to train"):
        list(training_steps(frozen, source(), plan()))


def test_a_batch_without_a_learned_token_counts_for_nothing():
    class Unlearned(type(source())):
        def weight(self, batch):
            return 0

        def collate(self, batch):
            made = collate(batch)
            made.labels.fill_(-100)
            return made

    [step] = training_steps(objective(), Unlearned(source(2).examples, 2, 0), plan())
    assert (step.loss, step.gradient_norm) == (0.0, 0.0)
    assert not math.isnan(step.tokens_per_second)


def test_the_mode_is_set_when_it_has_to_be_and_not_in_every_step():
    trained, modes, calls = objective(dropout=0.5), [], []
    trained.model.eval()
    trained.model.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    set_mode = trained.train
    trained.train = lambda mode=True: calls.append(mode) or set_mode(mode)

    for step in training_steps(trained, source(), plan(max_steps=5)):
        if step.step in (2, 4, 5):
            trained.eval()
    assert modes == [True] * 10
    assert calls == [True, False, True, False, True, False]


# --- learning rates ------------------------------------------------------------------------------

NAMES = ("cosine", "linear", "constant")
PEERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def rates(name, steps, warmup_ratio):
    choices = plan(lr_scheduler_type=name, learning_rate=2.0, warmup_ratio=warmup_ratio)
    return [learning_rate(choices, step, steps) for step in range(steps)]


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
    assert rates(name, steps, warmup / steps)[warmup:] == pytest.approx(expected[warmup:], rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_warm_up_begins_one_part_higher_than_that_of_transformers(name):
    """Theirs is s / w, with the rate zero in the first step; ours is (s + 1) / (w + 1)."""
    assert peer_rates(name, 12, 3)[:4] == pytest.approx([0, 2 / 3, 4 / 3, 2])
    assert rates(name, 12, 0.21)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


@given(st.sampled_from(NAMES), st.integers(1, 400), st.floats(0, 1))
def test_rates_rise_to_the_peak_then_fall_and_none_is_zero(name, steps, part):
    warmup = math.ceil(part * steps)
    found = rates(name, steps, part)
    assert all(0 < rate <= 2.0 for rate in found)
    assert found[: warmup + 1] == sorted(found[: warmup + 1])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    if warmup < steps:
        assert found[warmup] == 2.0


@pytest.mark.parametrize("name", NAMES)
def test_the_last_rate_of_a_long_training_is_above_zero(name):
    assert learning_rate(plan(lr_scheduler_type=name), 10**9 - 1, 10**9) > 0
