"""Random trees of modules, each through a whole life: inject, train, save, load, merge, remove.

A tree is drawn as plain data and built twice where a fresh base is needed. Every module takes and
returns a tensor (batch, positions, WIDTH), so that anything can stand anywhere.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import disha
from disha import MergeError
from tests.conftest import (
    Doubled,
    Made,
    assert_same,
    assert_unchanged,
    perturb,
    seed_torch,
    snapshot,
)
from tests.reference import KINDS, settings_of

WIDTH, ROWS = 6, 5


def over_positions(conv: nn.Module) -> nn.Module:
    """Runs a convolution, whose channels come before the positions."""
    return Made(lambda self, x: self.conv(x.mT).mT.contiguous(), conv=conv)


def with_lookup() -> nn.Module:
    """Adds an embedding that the input chooses."""
    table = nn.Embedding(ROWS, WIDTH, padding_idx=1)
    return Made(lambda self, x: x + self.table(x.detach().argmax(-1) % ROWS), table=table)


def self_attention() -> nn.Module:
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    return Made(lambda self, x: self.attention(x, x, x)[0].contiguous(), attention=attention)


class Branches(nn.Module):
    """The mean over branches in a ModuleList, or in a ModuleDict."""

    def __init__(self, branches: nn.ModuleList | nn.ModuleDict) -> None:
        super().__init__()
        self.branches = branches

    def forward(self, x):
        named = isinstance(self.branches, nn.ModuleDict)
        branches = list(self.branches.values() if named else self.branches)
        return sum(branch(x) for branch in branches) / len(branches)


class Model(nn.Module):
    """The tree, and a head, so that every target finds something."""

    def __init__(self, tree: Any) -> None:
        super().__init__()
        self.tree = build(tree, built=[])
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.head(self.tree(x))


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "no bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "own forward": lambda: Doubled(WIDTH, WIDTH),
    "transposed": lambda: Conv1D(WIDTH, WIDTH),
    "parametrised": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "conv": lambda: over_positions(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "conv transposed": lambda: over_positions(nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1)),
    "lookup": with_lookup,
    "attention": self_attention,
    "norm": lambda: nn.LayerNorm(WIDTH),
    "dropout": lambda: nn.Dropout(0.2),
    "activation": nn.Tanh,
}
CONTAINERS: dict[str, Callable[[list[nn.Module]], nn.Module]] = {
    "sequence": lambda children: nn.Sequential(*children),
    "residual": lambda children: Made(
        lambda self, x: x + self.inner(x), inner=nn.Sequential(*children)
    ),
    "list": lambda children: Branches(nn.ModuleList(children)),
    "dict": lambda children: Branches(nn.ModuleDict({f"b{i}": c for i, c in enumerate(children)})),
}


def build(tree: Any, built: list[nn.Module]) -> nn.Module:
    """Return the module that a tree describes; `built` collects all that are complete."""
    if isinstance(tree, str):
        module = LEAVES[tree]()
    elif tree[0] in CONTAINERS:
        kind, children = tree
        module = CONTAINERS[kind]([build(child, built) for child in children])
    else:
        module = related(*tree, built)
    built.append(module)
    return module


def related(how: str, which: int, built: list[nn.Module]) -> nn.Module:
    """Return one of the modules again, or a new layer with the weight of one."""
    if how == "again" and built:
        return built[which % len(built)]
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    linears = [m for m in built if isinstance(m, nn.Linear) and "weight" in m._parameters]
    if linears:
        layer.weight = linears[which % len(linears)].weight
    return layer


@dataclass(frozen=True)
class Adapter:
    """The arguments of one injection."""

    method: str
    r: int
    target: str

    def arguments(self) -> dict[str, Any]:
        return {"target_regex": self.target, "r": self.r, **settings_of(self.method, 2)}


leaves = st.sampled_from(sorted(LEAVES)) | st.tuples(
    st.sampled_from(["again", "tied"]), st.integers(0, 7)
)
trees = st.recursive(
    leaves,
    lambda children: st.tuples(
        st.sampled_from(sorted(CONTAINERS)), st.lists(children, min_size=1, max_size=3)
    ),
    max_leaves=8,
)
adapters = st.builds(
    Adapter,
    method=st.sampled_from(KINDS),
    r=st.integers(1, 3),
    target=st.sampled_from([".", "all-linear", "head|0", "head|conv|table|attention"]),
)


def fresh(tree: Any) -> Model:
    seed_torch(0)
    return Model(tree).double().eval()


def base_values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        key: value.detach().clone()
        for key, value in model.state_dict().items()
        if ".disha." not in key
    }


def assert_base_is(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    found = base_values(model)
    assert list(found) == list(values)
    assert_same(found, values)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.allclose(
        actual, expected, rtol=1e-9, atol=1e-9 * float(expected.detach().abs().max())
    )


def add_adapters(model: Model, chosen: list[Adapter], x: torch.Tensor) -> list[str]:
    """Inject all, one after another, each as planned and without a change of the output."""
    base, values = model(x), base_values(model)
    for index, adapter in enumerate(chosen):
        name, arguments = f"a{index}", adapter.arguments()
        plan = disha.plan_adapters(model, adapter=name, **arguments)
        disha.inject_adapters(model, adapter=name, **arguments)
        summary = disha.summary(model)
        assert (plan.trainable, plan.total) == (summary.trainable, summary.total)
        assert plan.added == sum(p.numel() for p in disha.adapter_parameters(model, name))
        rows = [row.name for row in summary.layers if row.adapter == name]
        assert sorted(rows) == sorted(layer.name for layer in plan.layers)
        close(model(x), base)
        assert_base_is(model, values)
    return [f"a{index}" for index in range(len(chosen))]


def train(model: Model, x: torch.Tensor) -> None:
    """Take two steps with all adapters acting; nothing but their blocks may change."""
    values = base_values(model)
    before = [block.detach().clone() for block in disha.adapter_parameters(model)]
    optimizer = torch.optim.Adam(disha.adapter_parameters(model), lr=0.05)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    model.eval()
    assert_base_is(model, values)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    after = list(disha.adapter_parameters(model))
    assert not all(map(torch.equal, before, after))


def reloaded(model: Model, tree: Any, names: list[str], active: list[str]) -> Model:
    """Return a fresh base with the adapters of the model, by way of files."""
    twin = fresh(tree)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder, name)
            disha.save_adapter(model, path, adapter=name)
            disha.load_adapter(twin, path, adapter=name)
    disha.set_active_adapters(twin, active)
    return twin


def obstacles_to_merging(model: Model, active: list[str]) -> tuple[bool, bool]:
    """Return whether an acting layer's weight is computed, and whether a plain one shares it."""
    layers = {row.name for row in disha.summary(model).layers if row.adapter in active}
    modules = dict(model.named_modules())
    acting = [modules[name] for name in layers if name in modules]
    computed = any(hasattr(module, "parametrizations") for module in acting)
    plain = {
        id(module._parameters["weight"])
        for module in modules.values()
        if "disha" not in module._modules and module._parameters.get("weight") is not None
    }
    return computed, any(id(m._parameters.get("weight")) in plain for m in acting)


def merge_and_unmerge(model: Model, active: list[str], x: torch.Tensor) -> None:
    before, expected = snapshot(model), model(x)
    computed, shared = obstacles_to_merging(model, active)
    if computed or shared:
        with pytest.raises(MergeError, match="is computed from" if computed else "is shared with"):
            disha.merge_adapters(model, untie=computed)
        assert_unchanged(model, before)
    if not computed:
        disha.merge_adapters(model, untie=shared)
        close(model(x), expected)
        disha.unmerge_adapters(model)
        assert_unchanged(model, before)
    assert torch.equal(model(x), expected)


@settings(deadline=None, max_examples=30, derandomize=True, database=None)
@given(tree=trees, chosen=st.lists(adapters, min_size=1, max_size=3), resting=st.integers(0, 3))
def test_any_tree_lives_a_whole_life(tree, chosen, resting):
    model, x = fresh(tree), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    base, before = model(x), snapshot(model)
    names = add_adapters(model, chosen, x)
    disha.set_active_adapters(model, names)
    train(model, x)
    perturb(model, size=0.1)

    active = [name for index, name in enumerate(names) if index != resting] or names
    disha.set_active_adapters(model, active)
    expected = model(x)
    assert torch.equal(reloaded(model, tree, names, active)(x), expected)
    merge_and_unmerge(model, active, x)
    with disha.adapters_disabled(model):
        close(model(x), base)

    disha.remove_adapters(model, names[-1])
    if len(names) > 1:
        disha.set_active_adapters(model, names[:-1])
        twin = reloaded(model, tree, names[:-1], names[:-1])
        assert torch.equal(model(x), twin(x))
        disha.remove_adapters(model)
    assert_unchanged(model, before)
    assert torch.equal(model(x), base)
