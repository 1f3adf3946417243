"""Shards, and Bone, tile and BAT of one matrix, against the loops of reference.py."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from disha import functional
from disha.errors import DishaError
from disha.functional import Layout, method_of
from disha.functional.shard_sums import add_to, shard_sums
from tests import reference

MATRIX = Layout("out in")
METHODS = reference.KINDS
# in, out, r, r_out: r divides both; neither; the columns only; the rows only; r above out; r = 1;
# r = in; one row
SIZES = (
    (8, 12, 4, 3),
    (10, 9, 4, 3),
    (8, 10, 4, 5),
    (10, 8, 4, 2),
    (7, 2, 5, 1),
    (5, 6, 1, 2),
    (6, 4, 6, 4),
    (5, 1, 2, 1),
)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


def make_block(method, sizes, dtype=torch.float64):
    _, out_features, r, r_out = sizes
    shape = {
        "bone": (r, out_features),
        "tile": (r, r_out),
        "bat": ((out_features + r - 1) // r, r, r),
    }[method]
    return torch.randn(shape, dtype=dtype)


def make_case(method, sizes, dtype=torch.float64, lead=(3,), seed=0):
    """Return x, W, b and a block, all different and all requiring gradients."""
    torch.manual_seed(seed)
    in_features, out_features, *_ = sizes
    tensors = (
        torch.randn(*lead, in_features, dtype=dtype),
        torch.randn(out_features, in_features, dtype=dtype),
        torch.randn(out_features, dtype=dtype),
        make_block(method, sizes, dtype),
    )
    return [tensor.requires_grad_() for tensor in tensors]


def forward(method):
    return functional.bat_forward if method == "bat" else functional.bone_forward


def delta_weight(method, weight, block):
    return method_of(reference.method_of_kind(method)).delta_weight(MATRIX, block, weight)


def check_against_oracle(method, case, scale, tolerance):
    """Compare output, all gradients and merged weight with the float64 loops."""
    exact = [tensor.detach().double().requires_grad_() for tensor in case]
    x, weight, bias, block = case
    y = forward(method)(x, weight, bias, block, scale)
    expected = reference.linear(*exact[:3], [(method, exact[3], float(scale))])
    assert y.dtype == x.dtype
    close(y, expected, tolerance)

    cotangent = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(y, case, cotangent.to(y.dtype))
    oracles = torch.autograd.grad(expected, exact, cotangent)
    for gradient, oracle in zip(gradients, oracles, strict=True):
        close(gradient, oracle, tolerance)

    merged = functional.merged_weight(weight, [(delta_weight(method, weight, block), scale)])
    close(merged, reference.merged_weight(exact[1], [(method, exact[3], float(scale))]), tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("sizes", "scale"), list(zip(SIZES, itertools.cycle([1.0, -0.7, torch.tensor(0.3)]))), ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_forward_gradients_and_merge_equal_the_loops(method, sizes, dtype, scale):
    check_against_oracle(method, make_case(method, sizes, dtype), scale, TOLERANCE[dtype])


@st.composite
def random_sizes(draw):
    in_features = draw(st.integers(1, 11))
    r = draw(st.integers(1, in_features))
    r_out = draw(st.integers(1, 4))
    return in_features, r_out * draw(st.integers(1, 3)), r, r_out


def strided_copy(tensor):
    """The same values with gaps between them in memory."""
    spaced = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    spaced[..., ::2] = tensor.detach()
    return spaced[..., ::2].requires_grad_()


@settings(deadline=None, max_examples=30)
@given(
    sizes=random_sizes(),
    lead=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    strided=st.booleans(),
)
def test_shard_sum_equals_the_loop(sizes, lead, strided):
    in_features, _, r, _ = sizes
    x = torch.randn(*lead, in_features, dtype=torch.float64)
    x = strided_copy(x) if strided else x
    close(functional.shard_sum(x, r), reference.shard_sum(x, r), 1e-12)
    assert functional.shard_sum(x, r).shape == (*lead, r)


@pytest.mark.parametrize(
    ("features", "r", "expected"), [(8, 4, 2), (9, 4, 3), (7, 4, 2), (4, 4, 1), (1, 1, 1)]
)
def test_shard_count_rounds_up(features, r, expected):
    assert functional.shard_count(features, r) == expected


def test_shard_sum_accumulates_in_the_dtype_asked_for():
    x = torch.tensor([256.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16)  # 257 is no bfloat16
    wide = functional.shard_sum(x, r=1, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert wide.item() == 259.0


@pytest.mark.parametrize(
    ("count", "power"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (32, 32), (33, 64)]
)
def test_float16_sums_are_divided_by_the_power_of_two_that_holds_their_number(count, power):
    sums, factor = shard_sums(torch.ones(count, dtype=torch.float16), r=1)
    assert (sums.item() * power, factor) == (count, power)


@pytest.mark.parametrize("dim", [-2, -3, -4])
def test_shard_sum_of_another_dimension(dim):
    values = torch.tensor([256.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16)
    x = values.view(-1, *[1] * (-dim - 1))
    wide = functional.shard_sum(x, 1, torch.float32, dim)
    assert wide.dtype == torch.float32
    assert wide.item() == 259.0
    x = torch.randn(2, 3, 5, 4, 7, dtype=torch.float64)
    for r in (1, 2, 3, 4):
        expected = reference.shard_sum(x.movedim(dim, -1), r).movedim(-1, dim)
        close(functional.shard_sum(x, r, dim=dim), expected, 1e-12)


@pytest.mark.parametrize(
    ("sizes", "scale"), list(zip(SIZES, itertools.cycle([1.0, 0.5, torch.tensor(-1.5)]))), ids=str
)
@pytest.mark.parametrize("method", ["bone", "tile"])
def test_bone_delta_is_the_product_with_delta_weight(method, sizes, scale):
    x, weight, _, block = make_case(method, sizes, lead=(2, 3))
    expected = float(scale) * x @ reference.delta_weight(method, weight, block).T
    close(functional.bone_delta(x, block, weight.shape[0], scale), expected, 1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_gradcheck_of_input_weight_bias_block_and_scale(method, sizes):
    case = make_case(method, sizes, lead=(2,))
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward(method), (*case, scale))


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("method", METHODS)
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
@pytest.mark.parametrize("method", METHODS)
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
@pytest.mark.parametrize("method", METHODS)
def test_merge_into_bfloat16_rounds_once(method, scale, block_dtype):
    _, weight, _, block = (tensor.detach() for tensor in make_case(method, (40, 36, 8, 6)))
    weight, block = weight.bfloat16(), block.to(block_dtype)
    merged = functional.merged_weight(weight, [(delta_weight(method, weight, block), scale)])
    exact = reference.merged_weight(weight.double(), [(method, block.double(), scale)])
    assert merged.dtype == torch.bfloat16
    # a single rounding errs by half an ulp at most; float32 arithmetic may move ties by a little
    error = (merged.double() - exact).abs()
    assert (error <= half_ulp(exact, torch.bfloat16) + 1e-5).all()


def test_merge_of_several_deltas_rounds_their_sum_not_each():
    weight = torch.tensor([256.0], dtype=torch.bfloat16)  # the next one is 258
    delta = torch.tensor([0.75], dtype=torch.bfloat16)
    assert functional.merged_weight(weight, [(delta, 1.0), (delta, 1.0)]).item() == 258.0


def test_merge_keeps_float64_precision():
    weight = torch.tensor([1.0], dtype=torch.float64)
    delta = torch.tensor([2.0**-40], dtype=torch.float64)
    assert functional.merged_weight(weight, [(delta, 1.0)]).item() == 1.0 + 2.0**-40


def test_merge_of_nothing_is_the_weight():
    weight = torch.randn(3, 4, dtype=torch.bfloat16)
    assert torch.equal(functional.merged_weight(weight, []), weight)


@pytest.mark.parametrize("method", METHODS)
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


def test_bone_delta_is_computed_in_the_dtype_of_the_input():
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    block = torch.randn(4, 5)
    delta = functional.bone_delta(x, block, 5)
    assert delta.dtype == torch.bfloat16
    expected = x.double() @ reference.bone_delta_weight(block, 8, 5).double().T
    close(delta.double(), expected, 2**-5)


@pytest.mark.parametrize(
    ("weight_dtype", "block_dtype", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_bat_delta_weight_is_never_rounded_to_16_bits(weight_dtype, block_dtype, expected):
    weight, block = torch.randn(4, 4).to(weight_dtype), torch.randn(2, 2, 2).to(block_dtype)
    for delta in (functional.bat_delta_weight(weight, block), delta_weight("bat", weight, block)):
        assert delta.dtype == expected
        close(delta, reference.bat_delta_weight(weight.double(), block.double()), 1e-5)


@pytest.mark.parametrize("method", ["bone", "tile"])
def test_bone_delta_under_autocast_is_a_bfloat16_product(method):
    x, weight, _, block = (t.detach() for t in make_case(method, (10, 9, 4, 3), torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        delta = functional.bone_delta(x, block, weight.shape[0], 0.5)
        narrow = functional.bone_delta(x, block.half(), weight.shape[0], 0.5)
    assert delta.dtype == torch.bfloat16
    close(narrow, delta, 0.1)
    sums, dense = reference.shard_sum(x.double(), 4), block.double()
    expected = 0.5 * sums @ dense
    # S, D and the product are rounded to bfloat16: half an eps, relative, each
    bound = 2 * torch.finfo(torch.bfloat16).eps * (0.5 * sums.abs() @ dense.abs())
    tiles = weight.shape[0] // block.shape[1]
    assert ((delta.double() - expected.repeat(1, tiles)).abs() <= bound.repeat(1, tiles)).all()


@pytest.mark.parametrize("method", METHODS)
def test_autocast_gives_what_the_plain_layer_gives(method):
    x, weight, bias, block = (t.detach() for t in make_case(method, (10, 9, 4, 3), torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.linear(x, weight, bias)
        y = forward(method)(x, weight, bias, torch.zeros_like(block))
    assert y.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(y, plain)


@pytest.mark.parametrize("method", METHODS)
def test_vmap_of_grad_gives_per_sample_block_gradients(method):
    x, weight, bias, block = (t.detach() for t in make_case(method, (10, 9, 4, 3)))

    def loss(block, x):
        return forward(method)(x, weight, bias, block).square().sum()

    def oracle(x):
        leaf = block.clone().requires_grad_()
        y = reference.linear(x, weight, bias, [(method, leaf, 1.0)])
        return torch.autograd.grad(y.square().sum(), leaf)[0]

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(block, x)
    close(mapped, torch.stack([oracle(sample) for sample in x]), 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_jvp_equals_finite_differences(method):
    primals = tuple(t.detach() for t in make_case(method, (10, 9, 4, 3)))
    tangents = tuple(torch.randn_like(t) for t in primals)

    def call(*tensors):
        return forward(method)(*tensors, 0.7)

    value, tangent = torch.func.jvp(call, primals, tangents)
    close(value, call(*primals), 1e-12)
    step = 1e-4  # central: the output is a cubic, error about step**2
    ahead, behind = (
        call(*(p + sign * step * t for p, t in zip(primals, tangents, strict=True)))
        for sign in (1, -1)
    )
    close(tangent, (ahead - behind) / (2 * step), 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_pass_gradgradcheck(method):
    case = make_case(method, (5, 4, 2, 2), lead=(2,))
    assert torch.autograd.gradgradcheck(forward(method), tuple(case))


def test_blocks_that_do_not_fit_are_refused():
    x, weight = torch.randn(2, 8), torch.randn(7, 8)
    with pytest.raises(DishaError, match=r"\(2, 3\) does not fit an output of 7"):
        functional.bone_delta(x, torch.zeros(2, 3), out_features=7)
    with pytest.raises(DishaError, match="3 must divide it"):
        functional.bone_delta_weight(torch.zeros(2, 3), in_features=8, out_features=7)
    with pytest.raises(
        DishaError, match=r"\(7, 8\) and r=2 has shape \(4, 2, 2\), got \(1, 2, 2\)"
    ):
        functional.bat_delta_weight(weight, torch.zeros(1, 2, 2))


def test_adding_under_a_transform_writes_into_nothing():
    deltas = torch.randn(3, 2)
    mapped = torch.func.vmap(lambda delta: add_to(torch.ones(2), delta))(deltas)
    assert torch.equal(mapped, 1 + deltas)


def test_a_weighted_sum_is_rounded_once_and_leaves_its_terms():
    blocks = [torch.randn(4, dtype=torch.bfloat16) for _ in range(3)]
    before = [block.clone() for block in blocks]
    factors = (0.3, -1.7, 2.1)
    exact = sum(f * block.double() for f, block in zip(factors, blocks, strict=True))
    total = functional.weighted_sum(list(zip(blocks, factors, strict=True)))
    assert torch.equal(total, exact.bfloat16())
    assert all(map(torch.equal, blocks, before))


META = torch.device("meta")
ON_META = {
    "bone_delta_weight": lambda block: functional.bone_delta_weight(block, 7, 6),
    "bone_lora_factors": lambda block: torch.cat(
        [factor.flatten() for factor in functional.bone_lora_factors(block, 7, 6)]
    ),
    "bat_delta_weight": lambda block: functional.bat_delta_weight(
        torch.empty(6, 7, device=META), block.view(3, 2, 2)
    ),
    "convolution": lambda block: method_of("bone").delta_weight(
        Layout("out in *kernel"), block.view(6, 2, 1), torch.empty(6, 7, 1, device=META)
    ),
    "embedding": lambda block: method_of("bone").delta_weight(
        Layout("index out", padding_idx=3), block, torch.empty(7, 6, device=META)
    ),
    "rows": lambda block: method_of("bone").delta_weight(
        MATRIX, block, torch.empty(9, 7, device=META), output_ranges=((1, 4), (5, 8))
    ),
    "weighted_sum": lambda block: functional.weighted_sum([(block, 0.5)]),
    "product of rows": lambda block: functional.adapted_linear(
        torch.empty(3, 7, device=META), torch.empty(9, 7, device=META), None,
        [functional.Update(method_of("bat"), block.view(3, 2, 2), 0.5, 0.5, ((1, 7),))],
    ),
    "widened": lambda block: method_of("bone").wider_block(MATRIX, block, 2, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_META)
def test_what_is_made_of_a_block_is_on_its_device(name):
    assert ON_META[name](torch.empty(2, 6, device=META)).is_meta


@pytest.mark.parametrize("scale", [1.0, 2.0, -0.5, torch.tensor(2.0)], ids=str)
def test_embeddings_are_rows_of_the_scaled_update(scale):
    block, indices = make_block("tile", (10, 6, 4, 3)), torch.tensor([[0, 5], [9, 3]])
    given = {} if scale == 1.0 else {"scale": scale}  # which is the default
    found = functional.embedding_delta(indices, block, 6, **given, padding_idx=9)
    delta = reference.layout_delta_weight(
        "bone", "index out", block, torch.zeros(10, 6, dtype=block.dtype), padding_idx=9
    )
    close(found, float(scale) * delta[indices], 1e-12)


def test_layouts_as_text_and_the_layout_of_one_expert():
    assert str(Layout("index out", padding_idx=3)) == "'index out' with padding_idx=3"
    assert str(Layout("in out *kernel", groups=2)) == "'in out *kernel' of 2 groups"
    assert str(Layout("out in")) == "'out in'"
    assert Layout("expert in out").of_one_expert() == Layout("in out")
    assert Layout("expert out in").of_one_expert() == Layout("out in")
