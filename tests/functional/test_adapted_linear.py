"""adapted_linear with one block against the loops: values, gradients, and what is kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import disha
from disha.functional import Update, adapted_linear, bat, method_of
from tests import reference
from tests.conftest import kept_by, perturb
from tests.functional.test_functional import SIZES, make_block, random_sizes, strided_copy

METHODS = reference.KINDS


def case_of(method, sizes, dtype=torch.float64, lead=(3,), seed=0, bias=True):
    """Return x, a frozen W, b and a block."""
    torch.manual_seed(seed)
    in_features, out_features, *_ = sizes
    x = torch.randn(*lead, in_features, dtype=dtype).requires_grad_()
    weight = torch.randn(out_features, in_features, dtype=dtype)
    b = torch.randn(out_features, dtype=dtype).requires_grad_() if bias else None
    return x, weight, b, make_block(method, sizes, dtype).requires_grad_()


def product(method, x, weight, bias, block, scale=1.0):
    return adapted_linear(
        x, weight, bias, [Update(method_of(reference.method_of_kind(method)), block, scale)]
    )


def check(method, case, scale, tolerance=1e-10):
    """Compare with the loops: what gradients record, what is computed without, all gradients."""
    x, weight, bias, block = case
    inputs = [tensor for tensor in (x, bias, block) if tensor is not None]
    expected = reference.linear(x, weight, bias, [(method, block, scale)])
    output = product(method, *case, scale)
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        alone = product(method, *case, scale)
    torch.testing.assert_close(alone, expected, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(output, inputs, cotangent)
    torch.testing.assert_close(
        found, torch.autograd.grad(expected, inputs, cotangent), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(  # tokens: few enough for streaming, and too many
    ("tokens", "scale", "bias"), [(1, -0.7, True), (3, 1.0, False), (9, 2.0, True)]
)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_are_those_of_the_loops(method, sizes, tokens, scale, bias):
    check(method, case_of(method, sizes, lead=(tokens,), bias=bias), scale)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("method", METHODS)
def test_complex_numbers(method, tokens):
    check(method, case_of(method, (10, 9, 4, 3), torch.complex128, lead=(tokens,)), 0.5)


@pytest.mark.parametrize("method", ["bone", "bat"])
def test_dropout_of_complex_numbers_zeroes_inputs_and_scales_the_others(method):
    x, weight, bias, block = case_of(method, (10, 9, 4, 3), torch.complex128, lead=(1000,))
    update = Update(method_of(method), block, dropout=0.5)
    expected = reference.linear(x, weight, bias, [(method, block, 1.0)])
    x = x.detach()[:1].expand(1000, -1)
    outputs = adapted_linear(x, weight, bias, [update]).detach()
    spread = outputs.std(0) / 1000**0.5
    assert spread.min() > 0
    assert ((outputs.mean(0) - expected[0].detach()).abs() < 6 * spread).all()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_lie_in_memory_by_their_columns(method, tokens):
    x, weight, bias, block = case_of(method, (10, 9, 4, 3), lead=(tokens,))
    check(method, (x, weight.T.contiguous().T, bias, block), 0.5)
    x, weight, bias, block = case_of(method, (63, 50, 8, 10), torch.float32, lead=(tokens,))
    for w in (weight, weight.T.contiguous().T):
        output = product(method, x, w, bias, torch.zeros_like(block))
        assert torch.equal(output, F.linear(x, w, bias))


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    method=st.sampled_from(METHODS),
    sizes=random_sizes(),
    lead=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    strided=st.booleans(),
    scale=st.floats(-2, 2),
    slab=st.integers(1, 200),
    seed=st.integers(0, 2**16),
)
def test_any_shape_layout_scale_and_order(method, sizes, lead, strided, scale, slab, seed):
    x, weight, bias, block = case_of(method, sizes, lead=lead, seed=seed)
    x = strided_copy(x) if strided else x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bat, "SLAB_BYTES", slab)
        check(method, (x, weight, bias, block), scale)


@pytest.mark.parametrize("blocks_each", [1, 2])
@pytest.mark.parametrize("sizes", [(10, 9, 4, 1), (8, 10, 2, 1), (5, 6, 1, 1)], ids=str)
def test_a_bat_layer_of_several_slabs(monkeypatch, sizes, blocks_each):
    in_features, out_features, r, _ = sizes
    monkeypatch.setattr(bat, "SLAB_BYTES", blocks_each * r * in_features * 8)
    case = case_of("bat", sizes, lead=(9,))
    slabs = list(bat._cut_into_slabs(case[1], case[3]))
    assert len(slabs) == -(-case[3].shape[0] // blocks_each) > 1
    assert [row for _, rows in slabs for row in range(out_features)[rows]] == [*range(out_features)]
    for bias in (case[2], None):
        check("bat", (*case[:2], bias, case[3]), 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bat_layer_of_several_slabs_in_sixteen_bits(monkeypatch, dtype):
    x, weight, bias, block = case_of("bat", (10, 9, 4, 1), dtype, lead=(9,))
    whole = bat.bat_linear(x, weight, bias, block)
    monkeypatch.setattr(bat, "SLAB_BYTES", 1)
    several = bat.bat_linear(x, weight, bias, block)
    limit = 4 * torch.finfo(dtype).eps
    assert (several.double() - whole.double()).norm() <= limit * whole.double().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_block_acts_beside_a_large_weight_of_sixteen_bits(dtype):
    weight, block = torch.zeros(4, 4, dtype=dtype), torch.zeros(1, 4, 4, dtype=dtype)
    weight[1, 0] = weight[1, 2] = 16.0
    block[0, 1, 0] = 2.0**-8  # 16 and this is 16 in either
    x = torch.tensor([[1.0, 0.0, -1.0, 0.0]] * 5, dtype=dtype)
    output = bat.bat_linear(x, weight, None, block)
    assert torch.equal(output, torch.tensor([[0.0, 2.0**-8, 0.0, 0.0]] * 5, dtype=dtype))


@pytest.mark.parametrize("method", METHODS)
def test_first_and_second_derivatives_by_finite_differences(method):
    x, weight, bias, block = case_of(method, (10, 9, 4, 3), lead=(2,))

    def run(x, bias, block):
        return product(method, x, weight, bias, block, 0.5)

    assert torch.autograd.gradcheck(run, (x, bias, block))
    assert torch.autograd.gradgradcheck(run, (x, bias, block))


@pytest.mark.parametrize("wanted", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_only_the_gradients_that_are_needed(method, wanted):
    x, weight, bias, block = case_of(method, (8, 12, 4, 3))
    tensors = [x, bias, block]
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index == wanted)
    product(method, x, weight, bias, block).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [i == wanted for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_sixteen_bits_round_little(method, dtype):
    sizes = (64, 48, 8, 12)
    case = case_of(method, sizes, dtype, lead=(20,))
    case = tuple(t if t is None else (t.detach() / 8).requires_grad_(t.requires_grad) for t in case)
    wide = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in case)
    output, expected = product(method, *case), reference.linear(*wide[:3], [(method, wide[3], 1.0)])
    assert output.dtype == dtype
    limit = 4 * torch.finfo(dtype).eps
    assert (output.double() - expected).norm() <= limit * expected.norm()
    inputs, exact = (case[0], case[2], case[3]), (wide[0], wide[2], wide[3])
    found = torch.autograd.grad(output.sum(), inputs)
    for one, other in zip(found, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= limit * other.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_for_backward(method, dropout):
    sizes = (62, 45, 8, 9)
    case = case_of(method, sizes, lead=(2, 10))
    x, weight, bias, block = case
    scale = 0.5 if method != "bat" else 1.0
    updates = [Update(method_of(reference.method_of_kind(method)), block, scale, dropout)]
    kept = kept_by(lambda: adapted_linear(x, weight, bias, updates))
    own = {tensor.untyped_storage().data_ptr() for tensor in (weight, bias, block)}
    extra = {address: size for address, size in kept.items() if address not in own}
    if dropout:  # it is drawn for x
        assert max(extra.values()) <= x.numel() * 8
    elif method == "bat":
        assert extra == {x.untyped_storage().data_ptr(): x.numel() * 8}
    else:
        assert sum(extra.values()) == 20 * sizes[2] * 8


class TestBatProduct:
    """adapted_linear takes BAT's own product where it applies, and plain autograd elsewhere."""

    def used(self, monkeypatch, x, weight, bias, *updates):
        """Return how often BAT's own product gave a result, and the output."""
        results, own = [], method_of("bat").product

        def watched(*operands, **share):
            results.append(own(*operands, **share))
            return results[-1]

        monkeypatch.setattr(method_of("bat"), "product", watched, raising=False)
        output = adapted_linear(x, weight, bias, updates)
        return sum(result is not None for result in results), output

    @pytest.mark.parametrize("dropout", [0.0, 1e-9])  # that drops nothing, and has its own product
    def test_under_autocast(self, monkeypatch, dropout):
        x, weight, bias, block = case_of("bat", (8, 12, 4, 3), torch.float32)
        update = Update(method_of("bat"), block, 0.5, dropout)
        with torch.autocast("cpu", torch.bfloat16):
            count, output = self.used(monkeypatch, x, weight, bias, update)
        assert count == 1
        assert output.dtype == torch.bfloat16
        expected = reference.linear(x, weight, bias, [("bat", block, 0.5)])
        assert (output - expected).norm() < 0.02 * expected.norm()

    @pytest.mark.parametrize("count", [1, 2])
    def test_wider_blocks_in_the_dtype_of_their_layer(self, monkeypatch, count):
        sizes = (8, 12, 4, 3)
        x, weight, bias, _ = case_of("bat", sizes, torch.bfloat16)
        updates = [
            Update(method_of("bat"), make_block("bat", sizes, torch.float32), 0.5)
            for _ in range(count)
        ]
        used, output = self.used(monkeypatch, x, weight, bias, *updates)
        assert used == 1
        assert output.dtype == torch.bfloat16

    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_as_one_traced_expression(self, monkeypatch, sizes):
        monkeypatch.setattr("disha.functional.bat.is_compiling", lambda: True)
        case = case_of("bat", sizes)
        check("bat", case, 0.5)
        assert bat.bat_linear(*case) is not None
        for dtype in (torch.bfloat16, torch.float16):  # 1 + D is 1 in these
            eps, one = torch.finfo(dtype).eps, torch.ones(1, 1, dtype=dtype)
            output = bat.bat_linear(one, one * 2 / eps, None, one[None] * eps / 2)
            assert output.item() == 2 / eps + 2  # not 2 / eps, so W + (W D + D) is rounded once

    @pytest.mark.parametrize("why", ["weight trains", "other dtype", "transform", "gaps"])
    def test_plain(self, monkeypatch, why):
        x, weight, bias, block = case_of("bat", (8, 12, 4, 3))
        weight = strided_copy(weight).detach() if why == "gaps" else weight
        weight.requires_grad_(why == "weight trains")
        if why == "other dtype":
            block = block.detach().bfloat16().requires_grad_()
        counts = []

        def run(x):
            update = Update(method_of("bat"), block, 0.5)
            count, output = self.used(monkeypatch, x, weight, bias, update)
            counts.append(count)
            return output

        output = torch.func.vmap(run)(x) if why == "transform" else run(x)
        assert counts == [0]
        expected = reference.linear(x, weight, bias, [("bat", block.double(), 0.5)])
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


class TestAutocast:
    """Products under autocast."""

    @pytest.mark.parametrize("method", ["bone", "bat"])
    def test_autocast_of_a_float32_layer(self, method):
        x, weight, bias, block = case_of(method, (64, 48, 8, 12), torch.float32, lead=(5, 9))
        with torch.autocast("cpu", torch.bfloat16):
            output = adapted_linear(x, weight, bias, [Update(method_of(method), block)])
            assert output.dtype == F.linear(x, weight, bias).dtype
        output.float().square().sum().backward()
        assert x.grad.dtype == block.grad.dtype == torch.float32
        exact = [t.detach().double().requires_grad_() for t in (x, block)]
        expected = reference.linear(
            exact[0], weight.double(), bias.double(), [(method, exact[1], 1.0)]
        )
        assert (output.double() - expected).norm() < 0.02 * expected.norm()
        gradients = torch.autograd.grad(expected.square().sum(), exact)
        for one, other in zip((x.grad, block.grad), gradients, strict=True):
            assert (one.double() - other).norm() < 0.03 * other.norm()

    def test_a_backward_inside_autocast_is_not_rounded(self):
        x, weight, bias, block = case_of("bat", (8, 12, 4, 3), torch.float32)
        output = adapted_linear(x, weight, bias, [Update(method_of("bat"), block)])
        outside = torch.autograd.grad(output.sum(), [x, block], retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            inside = torch.autograd.grad(output.sum(), [x, block])
        assert all(map(torch.equal, outside, inside))


class TestFloat16:
    """Shard sums that float16 can't hold, of outputs that it can."""

    SIZES = (96, 12, 4, 3)
    LARGE = 4000.0  # 24 shards of it are 96,000; float16 ends at 65,504

    def case(self, method):
        """Return x whose shard sums are 96,000, a W that sees little of it, b and a small block."""
        _, weight, bias, block = case_of(method, self.SIZES, torch.float16)
        x = torch.full((5, 96), self.LARGE, dtype=torch.float16)
        block = (block.detach().sign() * 2.0**-10).requires_grad_()
        return x.requires_grad_(), weight * 2.0**-8, bias, block

    @pytest.mark.parametrize("way", ["fused", "plain", "autocast", "plain autocast"])
    @pytest.mark.parametrize("method", METHODS)
    def test_values_and_gradients(self, method, way):
        x, weight, bias, block = self.case(method)
        wide = [t.detach().double().requires_grad_() for t in (x, weight, bias, block)]
        if "autocast" in way:
            x, weight, bias, block = (
                t.detach().float().requires_grad_(t is not weight) for t in (x, weight, bias, block)
            )
        scale = torch.tensor(0.5) if "plain" in way else 0.5  # a tensor's is not fused
        with torch.autocast("cpu", torch.float16, enabled="autocast" in way):
            output = adapted_linear(
                x, weight, bias, [Update(method_of(reference.method_of_kind(method)), block, scale)]
            )
        assert output.dtype == torch.float16
        expected = reference.linear(*wide[:3], [(method, wide[3], 0.5)])
        assert (output.double() - expected).norm() < 0.01 * expected.norm()
        cotangent = torch.randn_like(output) * 2.0**-8
        found = torch.autograd.grad(output, (x, bias, block), cotangent)
        exact = torch.autograd.grad(expected, (wide[0], *wide[2:]), cotangent.double())
        for one, other in zip(found, exact, strict=True):
            assert (one.double() - other).norm() < 0.01 * other.norm()

    @pytest.mark.parametrize("tokens", [1, 5])
    def test_without_gradients_bat_streams_or_not(self, tokens):
        x, weight, bias, block = (t.detach() for t in self.case("bat"))
        x = x[:tokens]
        output = bat.bat_linear(x, weight, bias, block)
        wide = [t.double() for t in (x, weight, bias, block)]
        expected = reference.linear(*wide[:3], [("bat", wide[3], 1.0)])
        assert (output.double() - expected).norm() < 0.01 * expected.norm()


class NoSynchronisation(TorchDispatchMode):
    """Refuse what a CUDA graph can't record: waiting for a value, and shapes that depend on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        assert not waits, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "cast"), [(torch.float32, True), (torch.float16, False)], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_waits_for_no_value(method, cast, dtype):
    make = disha.BatLinear if method == "bat" else disha.BoneLinear
    options = {"r_out": 6} if method == "tile" else {}
    layer = make(8, 12, r=4, dtype=dtype, init="kaiming", scale=0.5, dropout=0.1, **options)
    for mode in (layer.train, layer.eval):
        mode()
        x = torch.randn(2, 3, 8, dtype=dtype).requires_grad_()
        with NoSynchronisation(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            layer(x).float().sum().backward()
        assert x.grad.any()
        assert layer.disha["default"].block.grad.any()


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_forward_of_a_layer_is_the_product_with_its_weight(dtype, tiles):
    r_out = None if tiles == 1 else 12 // tiles
    layer = disha.BoneLinear(8, 12, r=4, r_out=r_out, dtype=dtype, init="kaiming", scale=0.5)
    x = torch.randn(2, 3, 8, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    dense = F.linear(x.double(), layer.weight.double() * 1, layer.bias.double())
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(layer(x).double(), dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["bone", "bat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_new_adapter_changes_no_bit_for_inputs_of_any_strides(dtype, method):
    layer = nn.Linear(1024, 32, dtype=dtype)
    inputs = [
        torch.randn(2, 1024, 3, dtype=dtype).transpose(1, 2),
        torch.randn(3, 2, 1024, dtype=dtype).transpose(0, 1),
        torch.randn(2, 3, 2048, dtype=dtype)[..., ::2],
        torch.randn(1, 1, 1024, dtype=dtype).expand(2, 3, -1),
        torch.randn(2, 2, 3, 1024, dtype=dtype).transpose(0, 2),
        torch.randn(2, 2, 3, 1024, dtype=dtype),
    ]
    before = [layer(x) for x in inputs]
    disha.inject_adapters(layer, "", 16, method=method)
    for x, expected in zip(inputs, before, strict=True):
        assert torch.equal(layer(x), expected)
    perturb(layer)
    for x in inputs:
        close = {"rtol": 0.05, "atol": 0.2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(layer(x), layer(x.contiguous()), **close)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_subclass_that_computes_a_parameter_computes_it_in_its_forward(name):
    layer, x = disha.BoneLinear(8, 4, r=4), torch.randn(3, 8)
    parameters = {**dict(layer.named_parameters()), name: 3.0 * layer._parameters[name]}
    expected = F.linear(x, parameters["weight"], parameters["bias"])
    computed = {name: property(lambda self: 3.0 * self._parameters[name])}
    own_forward = {"forward": lambda self, x: type(layer).__base__.forward(self, x)}
    for members in (computed, computed | own_forward):
        layer.__class__ = type("Computes", (disha.BoneLinear,), members)
        torch.testing.assert_close(layer(x), expected)


def test_symbolic_tracing_of_a_layer_sees_its_update():
    model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 4)), "0", r=4, init="kaiming")
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_traced_model_calls_its_adapted_layers():
    """So it switches, casts, copies and trains as the model, as a traced plain layer would."""
    model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 4)), "0", r=4, init="kaiming")
    disha.inject_adapters(model, "0", r=2, init="kaiming", adapter="other")
    traced, x = torch.fx.symbolic_trace(model), torch.randn(3, 8)
    assert [*traced.state_dict()] == [*model.state_dict()]
    for active in ("default", ()):
        disha.set_active_adapters(model, active)
        assert torch.equal(traced(x), model(x))
        assert torch.equal(copy.deepcopy(traced)(x), model(x))
    assert traced.double()(x.double()).dtype == torch.float64
