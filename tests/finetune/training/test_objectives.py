from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import disha
from disha.finetune.data.batches import collate
from disha.finetune.errors import BadInputError, SettingsError
from disha.finetune.training.objectives import (
    TensorObjective,
    TextObjective,
    objective_for,
)
from tests.finetune.training.tiny import batch_of, decoder, examples


@dataclass(frozen=True)
class Tensors:
    inputs: torch.Tensor
    targets: torch.Tensor
    classes: int = 0


class Returning(nn.Module):
    """Returns what it was given at birth."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, inputs):
        return self.output


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=200, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    ("model", "has_tokenizer", "kind"),
    [
        (decoder(), True, TextObjective),
        (decoder(), False, TextObjective),
        (nn.Linear(2, 2), True, TextObjective),
        (nn.Linear(2, 2), False, TensorObjective),
    ],
)
def test_every_kind_of_model_has_its_objective(model, has_tokenizer, kind):
    found = objective_for(model, has_tokenizer)
    assert type(found) is kind
    assert found.model is model


def test_a_model_that_names_no_head_learns_as_our_decoder_does():
    model, batch = decoder(), batch_of(examples(5))
    loss = TextObjective(nn.Sequential(model))(batch)
    torch.testing.assert_close(loss, TextObjective(model)(batch), rtol=1e-5, atol=0)


def test_padding_changes_nothing_for_a_model_of_transformers(gpt2):
    """Right padding is behind everything that counts, so that no mask is needed."""
    objective, rows = TextObjective(gpt2), examples(5)
    assert len({len(row.tokens) for row in rows}) > 1
    apart = sum(objective(batch_of([row])) for row in rows)
    torch.testing.assert_close(objective(batch_of(rows)), apart, rtol=1e-5, atol=0)


def test_the_loss_is_that_of_transformers(gpt2):
    batch, expected = batch_of(examples(1)), 0.0
    [row] = examples(1)
    tokens = torch.tensor([row.tokens])
    [(first, end)] = row.learned
    labels = torch.full_like(tokens, -100)
    labels[:, first:end] = tokens[:, first:end]
    expected = gpt2(tokens, labels=labels).loss * batch.weight
    torch.testing.assert_close(TextObjective(gpt2)(batch), expected, rtol=1e-5, atol=0)


def test_keys_and_values_are_not_kept_while_training(gpt2):
    outputs = []
    hook = gpt2.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    TextObjective(gpt2)(batch_of(examples(1)))
    hook.remove()
    assert outputs[0].past_key_values is None


def test_packed_rows_are_refused_where_nothing_keeps_texts_apart(gpt2):
    with pytest.raises(SettingsError, match="--packing needs a model that keeps the texts"):
        TextObjective(gpt2)(collate([examples(2)], positions=True))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ((torch.zeros(1, 5, 9),), "returned a tuple; it must return a tensor"),
        (SimpleNamespace(logits=[1]), "returned a SimpleNamespace"),
        (torch.zeros(1, 9), r"returns shape \(1, 9\) for tokens of shape \(1, 5\)"),
    ],
)
def test_what_is_no_logits_is_named(output, message):
    with pytest.raises(BadInputError, match=message):
        TextObjective(Returning(output))(batch_of(examples(1)))


def test_integer_targets_are_classes():
    outputs, targets = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    expected = sum(
        -F.log_softmax(row, 0)[target] for row, target in zip(outputs, targets, strict=True)
    )
    for output in (outputs, SimpleNamespace(logits=outputs), outputs.bfloat16().float()):
        loss = TensorObjective(Returning(output))(Tensors(torch.zeros(4), targets))
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


def test_integer_targets_may_have_places():
    outputs, targets = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    loss = TensorObjective(Returning(outputs))(Tensors(torch.zeros(2), targets))
    flat = F.cross_entropy(outputs.permute(0, 2, 3, 1).reshape(-1, 3), targets.flatten())
    torch.testing.assert_close(loss, flat * targets.numel())


def test_floating_point_targets_are_values():
    outputs, targets = torch.randn(4, 2), torch.randn(4, 2)
    loss = TensorObjective(Returning(outputs))(Tensors(torch.zeros(4), targets))
    torch.testing.assert_close(loss, ((outputs - targets) ** 2).sum())


def test_a_model_may_have_a_loss_of_its_own():
    class Own(nn.Module):
        def summed_loss(self, inputs, targets):
            return (inputs - targets).abs().sum().bfloat16()

    loss = TensorObjective(Own())(Tensors(torch.ones(3), torch.zeros(3)))
    assert (float(loss), loss.dtype) == (3.0, torch.float32)


@pytest.mark.parametrize(
    ("output", "targets", "expected"),
    [
        (torch.zeros(4, 1), torch.zeros(4), r"need \(4\)"),  # would be broadcast to (4, 4)
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), r"need \(4, 2\)"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), r"need \(4, classes\)"),
        (torch.zeros(4, 2, 5), torch.zeros(4, 6, dtype=torch.int64), r"need \(4, 2, 6\)"),
    ],
)
def test_outputs_that_do_not_go_with_the_targets_are_refused(output, targets, expected):
    with pytest.raises(SettingsError, match=expected):
        TensorObjective(Returning(output))(Tensors(torch.zeros(4), targets))


def test_running_statistics_are_those_of_the_base_model():
    torch.manual_seed(0)
    norms = nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False)
    model = nn.Sequential(nn.Linear(4, 8), *norms, nn.Dropout())
    measured = TensorObjective(model).train()
    assert [module.training for module in model] == [True, False, True, True]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured(Tensors(torch.randn(6, 4), torch.zeros(6, 8))).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert norms[0].weight.grad is not None
    assert not any(module.training for module in measured.eval().modules())


@pytest.mark.parametrize("sizes", [(1, 3, 2), (5, 1)])
def test_a_batch_counts_like_its_parts_in_spite_of_normalisation(sizes):
    torch.manual_seed(0)
    measured = TensorObjective(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))).train()
    inputs, targets = torch.randn(6, 4), torch.randn(6, 2)
    whole = measured(Tensors(inputs, targets))
    parts = zip(inputs.split(sizes), targets.split(sizes), strict=True)
    torch.testing.assert_close(sum(measured(Tensors(*part)) for part in parts), whole)


def test_a_class_that_the_model_does_not_know_is_named():
    batch = Tensors(torch.zeros(2), torch.tensor([0, 7]), classes=8)
    with pytest.raises(SettingsError, match="has outputs for 3 classes, but there is a target 7"):
        TensorObjective(Returning(torch.zeros(2, 3)))(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_given_in_the_models_own_type(dtype):
    model = nn.Sequential(nn.Linear(2, 2).to(dtype))
    disha.inject_adapters(model, "0", 1, dtype=torch.float32)
    loss = TensorObjective(model)(Tensors(torch.ones(3, 2), torch.zeros(3, 2)))
    assert loss.dtype == torch.float32
