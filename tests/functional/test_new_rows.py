"""New rows: what they give in every product, and in a part of a matrix."""

import pytest
import torch
from torch.nn import functional as F

from disha.functional import Update, method_of
from disha.functional.layouts import MATRIX
from disha.functional.new_rows import NewRows
from disha.functional.routed import Route, Routed
from disha.functional.weight_updates import Updates, WithNewRows

NUMBERS = [1, 4, 5]
SHAPE = (7, 5)


def new_rows(transposed):
    block = torch.randn(5, 3).double().requires_grad_()
    return NewRows(block, ((1, 2), (4, 6)), transposed=transposed)


def written(rows, weight):
    """The matrix with the new rows, one after the other."""
    weight = (weight.mT if rows.transposed else weight).clone()
    for place, number in enumerate(NUMBERS):
        weight[number] = rows.block[:, place]
    return weight.mT if rows.transposed else weight


def look_up(x, weight, bias):
    return F.embedding(x, weight)


@pytest.mark.parametrize("is_routed", [False, True])
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("multiply", [F.linear, look_up])
def test_a_product_is_that_of_the_matrix_with_the_rows(multiply, transposed, count, is_routed):
    """Whatever W has in these rows: the same values, or no numbers."""
    if is_routed and transposed and multiply is F.linear:
        pytest.skip("it needs one matrix for all samples")
    rows = new_rows(transposed)
    shape = SHAPE[::-1] if transposed else SHAPE
    weight = torch.randn(shape).double()
    matrix = weight.mT if transposed else weight
    matrix[NUMBERS] = torch.nan
    matrix[NUMBERS[0]] = rows.block[:, 0].detach()
    bias = torch.randn(shape[0]).double() if multiply is F.linear else None
    x = torch.randn(4, 2, shape[1]).double() if bias is not None else torch.randint(5, (4, 2))
    updates = (Update(method_of("bone"), torch.randn(2, shape[0]).double()),) * count
    dense = written(rows, sum([one.delta_weight(MATRIX, weight) for one in updates], weight))
    given = WithNewRows(Updates(updates), {None: [rows]})
    if is_routed:
        route = Route(("b", "a", None, "a"))  # "b" has none
        given = WithNewRows(Routed(route, {"a": updates}), {"a": [rows]})
    found = given.product(multiply, x, weight, bias, MATRIX)
    if multiply is F.linear:
        torch.testing.assert_close(given.linear(x, weight, bias), found, equal_nan=True)
    expected = multiply(x, dense, bias)
    samples = [1, 3] if is_routed else [0, 1, 2, 3]
    torch.testing.assert_close(found[samples], expected[samples])
    if is_routed:
        others = [0, 2]
        torch.testing.assert_close(found[others], multiply(x[others], weight, bias), equal_nan=True)
    gradients = [torch.autograd.grad(y[samples].sin().sum(), rows.block) for y in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("part", [((0, 7), (0, 5)), ((2, 5), (1, 4)), ((2, 4), (0, 5))], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_rows_of_a_part(transposed, part):
    rows, weight = new_rows(transposed), torch.randn(SHAPE).double()
    if transposed:
        part, weight = part[::-1], weight.mT
    inside = tuple(slice(*ends) for ends in part)
    found = rows.of_part(part).write_weight(weight[inside])
    assert torch.equal(found, written(rows, weight)[inside])
    (gradient,) = torch.autograd.grad(found.sum(), rows.block)  # also if none is inside
    assert gradient.count_nonzero() == (found != weight[inside]).sum()
