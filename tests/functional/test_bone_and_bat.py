"""The formulas of each method, of one matrix, against the loops of reference.py."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from disha import functional
from disha.errors import DishaError
from disha.functional import Update, adapted_linear, method_of
from tests import reference
from tests.functional.matrices import SIZES, close_to_exact, delta_weight, make_case
from tests.reference import KINDS

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def forward(kind):
    """The product of a linear layer with one block."""
    method = method_of(reference.method_of_kind(kind))

    def run(x, weight, bias, block, scale=1.0):
        return adapted_linear(x, weight, bias, [Update(method, block, scale)])

    return run


def check_against_oracle(method, case, scale, tolerance):
    """Compare output, all gradients and merged weight with the float64 loops."""
    exact = [tensor.detach().double().requires_grad_() for tensor in case]
    x, weight, bias, block = case
    y = forward(method)(x, weight, bias, block, scale)
    expected = reference.linear(*exact[:3], [(method, exact[3], float(scale))])
    assert y.dtype == x.dtype
    close_to_exact(y, expected, tolerance)

    cotangent = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(y, case, cotangent.to(y.dtype))
    oracles = torch.autograd.grad(expected, exact, cotangent)
    for gradient, oracle in zip(gradients, oracles, strict=True):
        close_to_exact(gradient, oracle, tolerance)

    merged = functional.merged_weight(weight, [(delta_weight(method, weight, block), scale)])
    close_to_exact(
        merged, reference.merged_weight(exact[1], [(method, exact[3], float(scale))]), tolerance
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("sizes", "scale"), list(zip(SIZES, itertools.cycle([1.0, -0.7, torch.tensor(0.3)]))), ids=str
)
@pytest.mark.parametrize("method", KINDS)
def test_forward_gradients_and_merge_equal_the_loops(method, sizes, dtype, scale):
    check_against_oracle(method, make_case(method, sizes, dtype), scale, TOLERANCE[dtype])


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_gradcheck_of_input_weight_bias_block_and_scale(method, sizes):
    case = make_case(method, sizes, lead=(2,))
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward(method), (*case, scale))


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("method", KINDS)
def test_leading_dimensions_come_back_and_empty_ones_have_zero_gradient(method, lead):
    case = make_case(method, (10, 9, 4, 3), lead=lead)
    y = forward(method)(*case)
    assert y.shape == (*lead, 9)
    y.sum().backward()
    block = case[3]
    assert bool(block.grad.any()) == bool(y.numel())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("method", KINDS)
def test_zero_block_leaves_every_bit(method, dtype):
    sizes = SIZES[1]
    x, weight, bias, block = (tensor.detach() for tensor in make_case(method, sizes, dtype))
    for b in (bias, None):
        y = forward(method)(x, weight, b, torch.zeros_like(block))
        assert torch.equal(y, F.linear(x, weight, b))
    merged = functional.merged_weight(
        weight, [(delta_weight(method, weight, torch.zeros_like(block)), 1.0)]
    )
    assert torch.equal(merged, weight)


def half_ulp(exact, dtype):
    """Half the distance between neighbours in dtype around each exact value."""
    _, exponent = torch.frexp(exact)
    return torch.ldexp(torch.ones_like(exact), exponent - 1) * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("block_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("method", KINDS)
def test_merge_into_bfloat16_rounds_once(method, scale, block_dtype):
    _, weight, _, block = (tensor.detach() for tensor in make_case(method, (40, 36, 8, 6)))
    weight, block = weight.bfloat16(), block.to(block_dtype)
    merged = functional.merged_weight(weight, [(delta_weight(method, weight, block), scale)])
    exact = reference.merged_weight(weight.double(), [(method, block.double(), scale)])
    assert merged.dtype == torch.bfloat16
    # a single rounding errs by half an ulp at most; float32 arithmetic may move ties by a little
    error = (merged.double() - exact).abs()
    assert (error <= half_ulp(exact, torch.bfloat16) + 1e-5).all()


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_block_over_a_low_precision_layer_gives_its_dtype(method, dtype):
    case = make_case(method, SIZES[1], torch.float32)
    block = case[3].detach()
    x, weight, bias = (tensor.detach().to(dtype) for tensor in case[:3])
    y = forward(method)(x, weight, bias, block)
    assert y.dtype == dtype
    exact = [tensor.double() for tensor in (x, weight, bias)]
    expected = reference.linear(*exact, [(method, block.double(), 1.0)])
    # W' (BAT), or two summands and their sum (Bone), are rounded to dtype: relative eps / 2 each
    magnitude = reference.linear(
        exact[0].abs(),
        reference.merged_weight(exact[1], [(method, block.double(), 1.0)]).abs(),
        None,
        [],
    )
    assert ((y.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * (magnitude + 2)).all()


@pytest.mark.parametrize("method", KINDS)
def test_autocast_gives_what_the_plain_layer_gives(method):
    x, weight, bias, block = (t.detach() for t in make_case(method, (10, 9, 4, 3), torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.linear(x, weight, bias)
        y = forward(method)(x, weight, bias, torch.zeros_like(block))
    assert y.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(y, plain)


@pytest.mark.parametrize("method", KINDS)
def test_vmap_of_grad_gives_per_sample_block_gradients(method):
    x, weight, bias, block = (t.detach() for t in make_case(method, (10, 9, 4, 3)))

    def loss(block, x):
        return forward(method)(x, weight, bias, block).square().sum()

    def oracle(x):
        leaf = block.clone().requires_grad_()
        y = reference.linear(x, weight, bias, [(method, leaf, 1.0)])
        return torch.autograd.grad(y.square().sum(), leaf)[0]

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(block, x)
    close_to_exact(mapped, torch.stack([oracle(sample) for sample in x]), 1e-10)


@pytest.mark.parametrize("method", KINDS)
def test_jvp_equals_finite_differences(method):
    primals = tuple(t.detach() for t in make_case(method, (10, 9, 4, 3)))
    tangents = tuple(torch.randn_like(t) for t in primals)

    def call(*tensors):
        return forward(method)(*tensors, 0.7)

    value, tangent = torch.func.jvp(call, primals, tangents)
    close_to_exact(value, call(*primals), 1e-12)
    step = 1e-4  # central: the output is a cubic, error about step**2
    ahead, behind = (
        call(*(p + sign * step * t for p, t in zip(primals, tangents, strict=True)))
        for sign in (1, -1)
    )
    close_to_exact(tangent, (ahead - behind) / (2 * step), 1e-6)


@pytest.mark.parametrize("method", KINDS)
def test_second_derivatives_pass_gradgradcheck(method):
    case = make_case(method, (5, 4, 2, 2), lead=(2,))
    assert torch.autograd.gradgradcheck(forward(method), tuple(case))


def test_blocks_that_do_not_fit_are_refused():
    x, weight = torch.randn(2, 8), torch.randn(7, 8)
    with pytest.raises(DishaError, match=r"\(2, 3\) does not fit an output of 7"):
        forward("tile")(x, weight, None, torch.zeros(2, 3))
    with pytest.raises(DishaError, match="3 must divide it"):
        delta_weight("tile", weight, torch.zeros(2, 3))
    with pytest.raises(
        DishaError, match=r"\(7, 8\) and r=2 has shape \(4, 2, 2\), got \(1, 2, 2\)"
    ):
        delta_weight("bat", weight, torch.zeros(1, 2, 2))
