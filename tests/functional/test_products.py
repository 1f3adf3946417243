"""Products of any kind, convolutions and lookups with updates, against dense weights."""

import pytest
import torch
import torch.nn.functional as F

from disha import functional
from disha.functional import Layout, Update, method_of
from disha.functional.products import update_product
from tests.conftest import SizesMade, seed_torch
from tests.functional.updates import (
    BLOCK_SIZES,
    COMBINATIONS,
    MATRIX,
    close_with_gradients,
    dense,
    look_up,
    make_update,
    updates_of,
)

# --- convolutions --------------------------------------------------------------------------------


CONVOLUTIONS = {
    "1d": (F.conv1d, Layout("out in *kernel"), (6, 7, 3), (2, 7, 9), {}),
    "1d alone": (F.conv1d, Layout("out in *kernel"), (6, 7, 3), (7, 9), {"padding": 1}),
    "2d strided": (
        F.conv2d, Layout("out in *kernel"), (6, 7, 2, 3), (2, 7, 6, 5),
        {"stride": 2, "padding": (1, 2), "dilation": (1, 2)},
    ),
    "2d grouped": (F.conv2d, Layout("out in *kernel"), (6, 5, 2, 2), (2, 10, 4, 3), {"groups": 2}),
    "3d": (F.conv3d, Layout("out in *kernel"), (6, 5, 2, 1, 2), (1, 5, 3, 2, 3), {}),
    "transposed 1d": (F.conv_transpose1d, Layout("in out *kernel"), (7, 6, 3), (2, 7, 5), {}),
    "transposed 2d grouped": (
        F.conv_transpose2d, Layout("in out *kernel", groups=2), (10, 6, 2, 2), (2, 10, 4, 3),
        {"groups": 2, "stride": 2, "output_padding": 1},
    ),
    "transposed 3d": (
        F.conv_transpose3d, Layout("in out *kernel"), (5, 6, 2, 1, 2), (1, 5, 2, 2, 2), {},
    ),
}  # fmt: skip


def conv_case(name, dtype=torch.float64):
    func, layout, shape, inputs, options = CONVOLUTIONS[name]

    def convolve(x, weight, bias):
        return func(x, weight, bias, **options)

    groups = options.get("groups", 1)
    outputs = shape[1] * groups if layout.in_first else shape[0]
    x, weight, bias = (torch.randn(s, dtype=dtype) for s in (inputs, shape, (outputs,)))
    return convolve, layout, x, weight, bias


@pytest.mark.parametrize(
    "combination",
    ["one bone", "one tile", "one bat", "bone and bat", "some with dropout", "bat of rows",
     "bone of q, k and v", "rows with dropout"],
)  # fmt: skip
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution(name, combination):
    convolve, layout, x, weight, bias = conv_case(name)
    check_product(convolve, x, weight, bias, layout, combination)


def check_product(multiply, x, weight, bias, layout, combination):
    updates = updates_of(combination, layout, weight)
    seed_torch(1)
    found = functional.adapted_product(multiply, x.requires_grad_(), weight, bias, layout, updates)
    seed_torch(1)
    expected = multiply(x, weight, bias)
    for update in updates:
        delta = dense(update, layout, weight)
        expected = expected + multiply(F.dropout(x, update.dropout), delta, None)
    close_with_gradients(found, expected, [x, *[update.block for update in updates]])


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_linear_product_with_a_table(combination):
    shapes = (2, 6), (7, 6), (7,)
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    check_product(F.linear, x, weight, bias, Layout("index out", padding_idx=3), combination)


@pytest.mark.parametrize("kind", BLOCK_SIZES)
def test_a_convolution_in_float16_whose_shard_sums_overflow(kind):
    layout, weight = Layout("out in *kernel"), torch.randn(6, 96, 2) / 256
    x = torch.full((1, 96, 4), 4000.0)  # 24 or 32 shards of it are beyond 65,504
    update = make_update(kind, layout, weight)
    block = (update.block.detach().sign() / 1024).requires_grad_()
    update = update.replace(block=block)
    expected = F.conv1d(x, weight + dense(update, layout, weight))
    half = update.replace(block=block.detach().half().requires_grad_())
    found = functional.adapted_product(F.conv1d, x.half(), weight.half(), None, layout, [half])
    assert found.dtype == torch.float16
    assert (found.float() - expected).norm() < 0.01 * expected.norm()
    cotangent = torch.randn_like(expected) / 256
    (one,) = torch.autograd.grad(found, half.block, cotangent.half())
    (other,) = torch.autograd.grad(expected, block, cotangent)
    assert (one.float() - other).norm() < 0.01 * other.norm()


# --- lookups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Layout("index out", padding_idx=3), MATRIX], ids=str)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_lookup(combination, layout):
    indices = torch.tensor([[0, 3], [5, 1]])
    weight = torch.randn((6, 7) if layout is MATRIX else (7, 6), dtype=torch.float64)
    updates = updates_of(combination, layout, weight)
    seed_torch(1)
    found = functional.adapted_product(look_up, indices, weight, None, layout, updates)
    seed_torch(1)
    expected = weight[indices]
    for update in updates:  # dropping a one-hot input drops the whole update of a token
        kept = F.dropout(torch.ones(2, 2, 1, dtype=torch.float64), update.dropout)
        expected = expected + kept * dense(update, layout, weight)[indices]
    close_with_gradients(found, expected, [update.block for update in updates])
    assert layout is MATRIX or torch.equal(found[0, 1], weight[3])


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bone", "bone_groups2"])
def test_a_method_that_does_not_read_w_makes_no_dense_weight(name):
    """A quantised W is given as one number in memory, with the shape of W."""
    weight = torch.zeros(()).expand(48, 64)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    update = Update(method_of(name), torch.randn(4, 48))
    with SizesMade() as made:
        update_product(F.linear, x, weight, MATRIX, update)
    assert max(made.sizes) < weight.numel()
