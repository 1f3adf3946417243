"""Several adapters that train at once, each against the same adapter trained alone."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import disha
from disha import ArgumentError, ModeError
from tests.conftest import assert_same, close, refused
from tests.reference import KINDS, settings_of

STEPS = 50
RATES = {"a": 1e-2, "b": 3e-3, "c": 1e-3, "d": 3e-2}


class Tagger(nn.Module):
    """A label for each token, by an embedding, a convolution and linear layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.up = nn.Linear(12, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 6)

    def forward(self, tokens):
        x = self.conv(self.embed(tokens).mT).mT
        return self.head(self.norm(self.up(x).tanh()))


def adapted(kinds):
    """Return a model with an adapter of each kind, of different r and targets."""
    torch.manual_seed(0)
    model = Tagger().double()
    targets = ("all-linear", ".", "up|head", "conv|up")
    for adapter, kind, target, r in zip(RATES, kinds, targets, (4, 2, 3, 6), strict=True):
        settings = settings_of(kind, 3)
        disha.inject_adapters(model, target, r, adapter=adapter, init="kaiming", **settings)
    return model


def random_batches():
    """Return batches of tokens, labels, a mask, and names: mixes in which adapters may lack."""
    draw = random.Random(0)
    batches = []
    for _ in range(STEPS):
        names = draw.choices([*RATES, None], k=draw.randint(1, 6))
        tokens, labels = torch.randint(11, (len(names), 7)), torch.randint(6, (len(names), 7))
        mask = torch.rand(len(names), 7) < 0.8
        batches.append((tokens, labels, mask, names))
    return batches


def losses_of(model, tokens, labels):
    return F.cross_entropy(model(tokens).mT, labels, reduction="none")


def train_together(model, batches):
    optimizer = torch.optim.AdamW(disha.adapter_groups(model, RATES))
    for tokens, labels, mask, names in batches:
        with disha.route_adapters(model, names):
            losses = losses_of(model, tokens, labels)
        sum_of_means = sum(disha.adapter_losses(losses, names, mask).values())
        if any(names):
            optimizer.zero_grad()
            sum_of_means.backward()
            optimizer.step()


def train_alone(model, adapter, batches):
    disha.set_active_adapters(model, adapter)
    parameters = disha.adapter_parameters(model, adapter)
    optimizer = torch.optim.AdamW(parameters, lr=RATES[adapter])
    for tokens, labels, mask, names in batches:
        mine = [sample for sample, name in enumerate(names) if name == adapter]
        if mine and mask[mine].any():
            loss = losses_of(model, tokens[mine], labels[mine])[mask[mine]].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize(
    "kinds",
    [*[(kind,) * 4 for kind in KINDS], ("bone", "lora", "bone_groups2", "tile")],
    ids="-".join,
)
def test_each_comes_out_as_if_trained_alone(kinds, tmp_path):
    together = adapted(kinds)
    alone = copy.deepcopy(together)
    before = copy.deepcopy(together)
    batches = random_batches()
    train_together(together, batches)
    elsewhere = Tagger().double()
    elsewhere.load_state_dict(base_state(together))
    for adapter in RATES:
        train_alone(alone, adapter, batches)
        disha.save_adapter(together, tmp_path / adapter, adapter)
        disha.load_adapter(elsewhere, tmp_path / adapter, adapter)
        blocks = disha.adapter_state_dict(together, adapter)
        assert_same(disha.adapter_state_dict(elsewhere, adapter), blocks)
        of_alone = disha.adapter_state_dict(alone, adapter)
        for key, untrained in disha.adapter_state_dict(before, adapter).items():
            close(blocks[key], of_alone[key], 1e-9)
            assert (blocks[key] - untrained).abs().max() > 1e-3


def base_state(model):
    return {key: value for key, value in model.state_dict().items() if ".disha." not in key}


def test_the_size_of_a_neighbours_batch_changes_nothing():
    losses = torch.tensor([1.0, 4.0, 2.0, 7.0, 9.0], requires_grad=True)
    means = disha.adapter_losses(losses, ["b", "a", "b", None, "a"])
    assert list(means) == ["b", "a"]
    assert (means["a"].item(), means["b"].item()) == (6.5, 1.5)
    (gradient,) = torch.autograd.grad(sum(means.values()), losses)
    assert gradient.tolist() == [0.5, 0.5, 0.5, 0.0, 0.5]


def test_losses_of_tokens_are_those_of_each_adapters_tokens():
    losses = torch.tensor([[1.0, 2.0], [3.0, float("nan")], [5.0, 6.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    means = disha.adapter_losses(losses, ["a", "a", "b"], mask)
    assert (means["a"].item(), means["b"].item()) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("losses", "mask", "says"),
    [
        (torch.tensor(1.0), None, 'losses of shape \\(\\); give one name for each sample.*"none"'),
        (torch.ones(3), None, "2 names for losses of shape \\(3,\\)"),
        (
            torch.ones(2, 3),
            torch.ones(2),
            "mask has shape \\(2,\\), and the losses have \\(2, 3\\)",
        ),
    ],
)
def test_losses_that_do_not_fit(losses, mask, says):
    with pytest.raises(ArgumentError, match=says):
        disha.adapter_losses(losses, ["a", "b"], mask)


def test_an_adapter_without_samples_stays_as_it_is():
    model = adapted(["bone"] * 4)
    optimizer = torch.optim.AdamW(disha.adapter_groups(model, RATES))
    tokens, labels = torch.randint(11, (2, 7)), torch.randint(6, (2, 7))
    for names in (["a", "b"], ["a", "a"]):
        kept = copy.deepcopy(disha.adapter_state_dict(model, "b"))
        optimizer.zero_grad()
        with disha.route_adapters(model, names):
            losses = losses_of(model, tokens, labels)
        sum(disha.adapter_losses(losses, names).values()).backward()
        optimizer.step()
    assert_same(disha.adapter_state_dict(model, "b"), kept)


def test_dropout_acts_on_the_adapter_that_has_it():
    layer = nn.Linear(64, 3).double()
    disha.inject_adapters(layer, "^$", 4, adapter="a", dropout=0.5, init="kaiming")
    disha.inject_adapters(layer, "^$", 4, adapter="b", init="kaiming")
    x = torch.randn(1, 64, dtype=torch.float64).repeat(4, 1)
    with disha.route_adapters(layer, ["a", "a", "b", "b"]):
        outputs = layer(x)
    assert not torch.equal(outputs[0], outputs[1])
    close(outputs[2], outputs[3], 1e-12)


def test_what_all_adapters_would_train_is_named():
    model = Tagger()
    disha.inject_adapters(model, "up", 2, adapter="a", also_train="norm")
    disha.inject_adapters(model, "up", 2, adapter="b")
    assert len(disha.adapter_groups(model, {"a": 1.0})[0]["params"]) == 3
    with refused(
        model, ArgumentError, r"norm\.weight would train with the samples of all adapters"
    ):
        disha.adapter_groups(model, {"a": 1.0, "b": 1.0})


def test_layers_that_mix_samples_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for adapter in "ab":
        disha.inject_adapters(model, "0", 2, adapter=adapter)
    with refused(model, ModeError, "1 normalises by the whole batch.*call eval"):
        disha.adapter_groups(model, {"a": 1.0, "b": 1.0})
    model[1].eval()
    assert len(disha.adapter_groups(model, {"a": 1.0, "b": 1.0})) == 2
