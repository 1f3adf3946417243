"""Groups of shards, of any number, against the loops."""

import pytest
import torch

from disha.errors import ArgumentError
from disha.functional import (
    Geometry,
    Layout,
    Update,
    adapted_linear,
    adapted_product,
    adapted_stack,
    method_of,
)
from disha.functional.parts import updates_of_outputs
from tests import reference
from tests.functional.updates import MATRIX, STACK, close_with_gradients, dense, look_up

NAMES = ("bone_groups2", "bone_groups3", "bone_groups4", "bone_groups_all")

SIZES = [(24, 12, 2), (24, 7, 3), (23, 9, 4), (10, 12, 3), (8, 3, 1), (6, 4, 6)]
"""In, out and r: groups divide shards and outputs, one of them, or neither; one shard only."""


def groups_of(name):
    suffix = name.removeprefix("bone_groups")
    return 1000 if suffix == "_all" else int(suffix)


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    """Add the loops of every number of groups to the oracle."""
    for name in NAMES:
        monkeypatch.setitem(reference.LOOPS, name, (reference.groups_loop(groups_of(name)), 2))


def update_of(name, layout, weight, r, **fields):
    method = method_of(name)
    shape = method.block_shape(layout, weight.shape, r)
    block = torch.randn(shape, dtype=weight.dtype).requires_grad_()
    return Update(method, block, 0.5, **fields)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_groups(name, sizes):
    inputs, outputs, r = sizes
    x = torch.randn(5, inputs, dtype=torch.float64).requires_grad_()
    weight = torch.randn(outputs, inputs, dtype=torch.float64)
    update = update_of(name, MATRIX, weight, r)
    expected = x @ (weight + dense(update, MATRIX, weight)).T
    found = adapted_linear(x, weight, None, [update])
    close_with_gradients(found, expected, [x, update.block])


@pytest.mark.parametrize("inputs", [10, 12])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_stack_with_one_input_or_with_one_for_each_matrix(name, experts, inputs):
    x = torch.randn(experts, 5, inputs, dtype=torch.float64).requires_grad_()
    weight = torch.randn(3, 7, inputs, dtype=torch.float64)
    update = update_of(name, STACK, weight, 2)
    expected = x @ (weight + dense(update, STACK, weight)).mT
    found = adapted_stack(x, weight, [update])
    close_with_gradients(found, expected, [x, update.block])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_lookup_forms_no_factor(name, sizes, monkeypatch):
    """R may be as large as the table."""
    monkeypatch.setattr("disha.functional.shard_groups.group_factor", None)
    inputs, outputs, r = sizes
    layout = Layout("index out")
    indices = torch.arange(inputs)
    weight = torch.randn(inputs, outputs, dtype=torch.float64)
    update = update_of(name, layout, weight, r)
    found = adapted_product(look_up, indices, weight, None, layout, [update])
    expected = weight + dense(update, layout, weight)
    close_with_gradients(found, expected, [update.block])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("outputs", [6, 7])
def test_derivatives_of_both_orders(outputs, dtype):
    x = torch.randn(3, 12, dtype=dtype).requires_grad_()
    weight = torch.randn(outputs, 12, dtype=dtype)
    block = torch.randn(2, outputs, dtype=dtype).requires_grad_()

    def product(x, block):
        return adapted_linear(x, weight, None, [Update(method_of("bone_groups3"), block, 0.5)])

    assert torch.autograd.gradcheck(product, (x, block))
    assert torch.autograd.gradgradcheck(product, (x, block))


def test_sums_of_float16_do_not_overflow():
    x = torch.full((1, 24), 3e4, dtype=torch.float16)  # six shards for each output
    weight = torch.zeros(4, 24, dtype=torch.float16)
    block = torch.full((2, 4), 0.1, dtype=torch.float16)
    output = adapted_linear(x, weight, None, [Update(method_of("bone_groups2"), block, 1.0)])
    torch.testing.assert_close(output, torch.full((1, 4), 3.6e4, dtype=torch.float16))


@pytest.mark.parametrize(("name", "size"), [("bone_groups2", 4), ("bone_groups_all", 12)])
def test_backward_needs_the_sums_and_the_block_alone(name, size):
    """W is saved for the gradient of x. With as many groups as shards, S(x) is x."""
    x = torch.randn(5, 12).requires_grad_()
    weight = torch.randn(6, 12)
    update = update_of(name, MATRIX, weight, 2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda kept: kept):
        adapted_linear(x, weight, None, [update])
    assert sorted(one.numel() for one in saved) == sorted([5 * size, 2 * 6, 6 * 12])


@pytest.mark.parametrize("name", NAMES)
def test_the_rank_of_the_update(name):
    weight = torch.zeros(16, 18, dtype=torch.float64)
    delta = update_of(name, MATRIX, weight, 3).delta_weight(MATRIX, weight)
    assert torch.linalg.matrix_rank(delta) == min(3 * groups_of(name), 16)


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 4), (3, 8), (6, 9), (0, 3), (1, 7), (6, 8), (8, 9)],
)
def test_a_block_is_cut_where_outputs_keep_their_groups(start, stop):
    weight = torch.randn(9, 14, dtype=torch.float64)
    update = update_of("bone_groups3", MATRIX, weight, 2)
    (part,) = updates_of_outputs([update], start, stop, Geometry(14, 9))
    keeps_groups = start % 3 == 0 and stop - start >= 3
    assert part.method.name == ("bone_groups3" if keeps_groups else "bone")
    whole = update.delta_weight(MATRIX, weight)
    assert torch.equal(part.delta_weight(MATRIX, weight[start:stop]), whole[start:stop])


def test_a_layer_has_at_most_as_many_groups_as_shards_and_as_outputs():
    weight = torch.zeros(3, 8)
    for name in ("bone_groups9", "bone_groups_all"):
        block = torch.ones(1, 3)
        delta = method_of(name).delta_weight(MATRIX, block, weight)
        assert torch.equal(delta.sum(1), torch.tensor([3.0, 3.0, 2.0]))  # 8 inputs in 3 groups
        delta = method_of(name).delta_weight(MATRIX, torch.ones(8, 3), weight)
        assert torch.equal(delta, torch.ones(3, 8))  # one shard, which all outputs see


def test_one_group_is_the_method_itself():
    for name in ("bone", "bone_groups3", "bat"):
        assert method_of(name).with_groups(1) is method_of(name)


def test_names():
    assert method_of("bone_groups7") is method_of("bone_groups7")
    for name in ("bone_groups", "bone_groups0", "bone_groups1", "bone_groups02", "bone_groups_2"):
        with pytest.raises(ArgumentError, match="unknown method"):
            method_of(name)
