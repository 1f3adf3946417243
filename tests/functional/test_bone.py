"""The product of the update alone: what a block adds to the output of a linear layer."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from disha.functional import Update, method_of
from disha.functional.products import update_product
from tests import reference
from tests.functional.matrices import MATRIX, SIZES, close_to_exact, make_case


def delta_of(method, x, weight, block, scale=1.0):
    update = Update(method_of(reference.method_of_kind(method)), block, scale)
    return update_product(F.linear, x, weight, MATRIX, update)


@pytest.mark.parametrize(
    ("sizes", "scale"), list(zip(SIZES, itertools.cycle([1.0, 0.5, torch.tensor(-1.5)]))), ids=str
)
@pytest.mark.parametrize("method", reference.KINDS)
def test_it_is_the_product_with_delta_weight(method, sizes, scale):
    x, weight, _, block = make_case(method, sizes, lead=(2, 3))
    expected = float(scale) * x @ reference.delta_weight(method, weight, block).T
    close_to_exact(delta_of(method, x, weight, block, scale), expected, 1e-10)


def test_it_is_computed_in_the_dtype_of_the_input():
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    block = torch.randn(4, 5)
    delta = delta_of("bone", x, torch.zeros(5, 8), block)
    assert delta.dtype == torch.bfloat16
    expected = x.double() @ reference.bone_delta_weight(block, 8, 5).double().T
    close_to_exact(delta.double(), expected, 2**-5)


@pytest.mark.parametrize("method", reference.BONE_KINDS)
def test_under_autocast_it_is_a_bfloat16_product(method):
    x, weight, _, block = (t.detach() for t in make_case(method, (10, 9, 4, 3), torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        delta = delta_of(method, x, weight, block, 0.5)
        narrow = delta_of(method, x, weight, block.half(), 0.5)
    assert delta.dtype == torch.bfloat16
    close_to_exact(narrow, delta, 0.1)
    sums, dense = reference.shard_sum(x.double(), 4), block.double()
    expected = 0.5 * sums @ dense
    # S, D and the product are rounded to bfloat16: half an eps, relative, each
    bound = 2 * torch.finfo(torch.bfloat16).eps * (0.5 * sums.abs() @ dense.abs())
    tiles = weight.shape[0] // block.shape[1]
    assert ((delta.double() - expected.repeat(1, tiles)).abs() <= bound.repeat(1, tiles)).all()
