from __future__ import annotations

import pytest
import torch
from torch import nn

import disha
from disha.finetune.data.batches import batch_by_length
from disha.finetune.data.encoding import Tally
from disha.finetune.data.tensors import Samples
from disha.finetune.errors import DataError
from disha.finetune.training.evaluation import mean_loss
from disha.finetune.training.objectives import TensorObjective
from tests.finetune.training.tiny import batch_of, examples, objective


def test_the_mean_is_over_terms_whatever_the_batches():
    measured, rows = objective(), examples(20)
    apart = [(float(measured(batch_of([row])).detach()), row.supervised) for row in rows]
    terms = sum(weight for _, weight in apart)
    for size in (1, 3, 20):
        found = mean_loss(measured, batch_by_length(rows, size))
        assert found.terms == terms
        assert found.loss == pytest.approx(sum(loss for loss, _ in apart) / terms, rel=1e-5)


def test_evaluation_mode_is_on_meanwhile_and_as_before_afterwards():
    measured, batches = objective(dropout=0.5), [batch_of(examples(4))]
    for training in (True, False):
        measured.train(training)
        assert mean_loss(measured, batches) == mean_loss(measured, batches)  # no dropout
        assert measured.training == measured.model.training == training


def test_the_mode_is_as_before_after_an_error():
    measured = objective().train()

    def fail(batch):
        raise KeyError

    measured.forward = fail
    with pytest.raises(KeyError):
        mean_loss(measured, [batch_of(examples(4))])
    assert measured.training


def test_no_gradients_are_made():
    measured, modes = objective(), []
    measured.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    mean_loss(measured, [batch_of(examples(4))])
    assert modes == [False]
    assert all(parameter.grad is None for parameter in measured.parameters())


def test_tf32_is_allowed_meanwhile_only():
    measured, allowed = objective(), []
    flags = torch.backends.cuda.matmul
    measured.register_forward_hook(lambda *_: allowed.append(flags.allow_tf32))
    for tf32 in (False, True):
        mean_loss(measured, [batch_of(examples(4))], tf32=tf32)
    assert allowed == [False, True]
    assert not flags.allow_tf32


class WithTable(nn.Linear):
    """A layer that makes a table when it is first called, and keeps it."""

    table = None

    def forward(self, inputs):
        if self.table is None:
            self.table = torch.full((self.out_features,), 2.0)
        return super().forward(inputs) * self.table


def test_what_a_model_keeps_of_an_evaluation_is_good_for_training():
    batch = Samples(torch.randn(4, 6), torch.zeros(4, 3), Tally()).batch(range(4))
    measured = TensorObjective(disha.inject_adapters(WithTable(6, 3), "", 3))
    mean_loss(measured, [batch])
    measured(batch).backward()
    assert all(block.grad is not None for block in disha.adapter_parameters(measured.model))


def test_bf16():
    batches = [batch_of(examples(4))]
    exact, rounded = mean_loss(objective(), batches), mean_loss(objective(), batches, bf16=True)
    assert exact.loss != rounded.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)


@pytest.mark.parametrize("batches", [[], [batch_of([type(examples(1)[0])((5, 6, 7), ())])]])
def test_nothing_to_measure_on_is_refused(batches):
    with pytest.raises(DataError, match="nothing to measure the loss on"):
        mean_loss(objective(), batches)
