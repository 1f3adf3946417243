"""adapted_linear against the loops: values, gradients, and what is kept for backward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from disha import functional
from disha.functional import (
    Update,
    adapted_linear,
    bat,
    linear,
    method_of,
    shard_groups,
    shard_sums,
)
from disha.functional.dropout import drop_inputs
from tests import reference
from tests.conftest import close, freshly_compiled, kept_by, seed_torch
from tests.functional.matrices import SIZES, make_block, random_sizes, strided_copy
from tests.functional.updates import (
    BLOCK_SIZES,
    COMBINATIONS,
    MATRIX,
    TWO,
    K,
    close_with_gradients,
    dense,
    make_update,
    updates_of,
    with_blocks,
)
from tests.reference import KINDS, METHODS

# --- one block -----------------------------------------------------------------------------------


def case_of(method, sizes, dtype=torch.float64, lead=(3,), seed=0, bias=True):
    """Return x, a frozen W, b and a block."""
    seed_torch(seed)
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
@pytest.mark.parametrize("method", KINDS)
def test_values_and_gradients_are_those_of_the_loops(method, sizes, tokens, scale, bias):
    check(method, case_of(method, sizes, lead=(tokens,), bias=bias), scale)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("method", KINDS)
def test_complex_numbers(method, tokens):
    check(method, case_of(method, (10, 9, 4, 3), torch.complex128, lead=(tokens,)), 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_of_complex_numbers_zeroes_inputs_and_scales_the_others(method):
    x, weight, bias, block = case_of(method, (10, 9, 4, 3), torch.complex128, lead=(1000,))
    update = Update(method_of(method), block, dropout=0.5)
    expected = reference.linear(x, weight, bias, [(method, block, 1.0)])
    x = x.detach()[:1].expand(1000, -1)
    outputs = adapted_linear(x, weight, bias, [update]).detach()
    spread = outputs.std(0) / 1000**0.5
    assert spread.min() > 0
    assert ((outputs.mean(0) - expected[0].detach()).abs() < 6 * spread).all()


def test_dropout_of_complex_numbers_zeroes_the_share_that_it_is_given():
    kept = drop_inputs(torch.ones(4000, dtype=torch.complex64), 0.2)
    assert set(kept.tolist()) == {0, 1.25}
    assert (kept == 0).float().mean().item() == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("method", KINDS)
def test_weights_that_lie_in_memory_by_their_columns(method, tokens):
    x, weight, bias, block = case_of(method, (10, 9, 4, 3), lead=(tokens,))
    check(method, (x, weight.T.contiguous().T, bias, block), 0.5)
    x, weight, bias, block = case_of(method, (63, 50, 8, 10), torch.float32, lead=(tokens,))
    for w in (weight, weight.T.contiguous().T):
        output = product(method, x, w, bias, torch.zeros_like(block))
        assert torch.equal(output, F.linear(x, w, bias))


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    method=st.sampled_from(KINDS),
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


@pytest.mark.parametrize("method", KINDS)
def test_first_and_second_derivatives_by_finite_differences(method):
    x, weight, bias, block = case_of(method, (10, 9, 4, 3), lead=(2,))

    def run(x, bias, block):
        return product(method, x, weight, bias, block, 0.5)

    assert torch.autograd.gradcheck(run, (x, bias, block))
    assert torch.autograd.gradgradcheck(run, (x, bias, block))


@pytest.mark.parametrize("wanted", range(3))
@pytest.mark.parametrize("method", KINDS)
def test_only_the_gradients_that_are_needed(method, wanted):
    x, weight, bias, block = case_of(method, (8, 12, 4, 3))
    tensors = [x, bias, block]
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index == wanted)
    product(method, x, weight, bias, block).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [i == wanted for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", KINDS)
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
@pytest.mark.parametrize("method", KINDS)
def test_what_is_kept_for_backward(method, dropout):
    sizes = (62, 45, 8, 9)
    case = case_of(method, sizes, lead=(2, 10))
    x, weight, bias, block = case
    scale = 0.5 if method != "bat" else 1.0
    updates = [Update(method_of(reference.method_of_kind(method)), block, scale, dropout)]
    kept = kept_by(lambda: adapted_linear(x, weight, bias, updates))
    own = {tensor.untyped_storage().data_ptr() for tensor in (weight, bias, block)}
    extra = {address: size for address, size in kept.items() if address not in own}
    groups = {"bone_groups2": 2, "bone_groups_all": 8}.get(method, 1)
    sums = 20 * sizes[2] * groups
    if dropout:  # it is drawn for x
        assert max(extra.values()) <= max(x.numel(), sums) * 8
    elif method == "bat":
        assert extra == {x.untyped_storage().data_ptr(): x.numel() * 8}
    else:
        of_input = x.numel() if method == "lora" else 0  # A is trained, so it needs x
        missing = -sizes[1] % groups
        padded = sizes[2] * (sizes[1] + missing) if missing else 0  # D, for whole groups
        assert sum(extra.values()) == (of_input + sums + padded) * 8


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

    @pytest.mark.parametrize("listed", [True, False])
    @pytest.mark.parametrize("method", METHODS)
    def test_autocast_of_a_float32_layer(self, method, listed, monkeypatch):
        if not listed:  # as on MPS, of which torch's check for any autocast does not know
            monkeypatch.setattr(shard_sums, "_knows_device_of", lambda x: False)
            for module in (shard_sums, linear, shard_groups):
                monkeypatch.setattr(module, "any_autocast", lambda: False, raising=False)
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

    @pytest.mark.parametrize("scale", [0.5, 16.0])
    @pytest.mark.parametrize("way", ["fused", "plain", "autocast", "plain autocast"])
    @pytest.mark.parametrize("method", KINDS)
    def test_values_and_gradients(self, method, way, scale):
        x, weight, bias, block = self.case(method)
        wide = [t.detach().double().requires_grad_() for t in (x, weight, bias, block)]
        if "autocast" in way:
            x, weight, bias, block = (
                t.detach().float().requires_grad_(t is not weight) for t in (x, weight, bias, block)
            )
        given = torch.tensor(scale) if "plain" in way else scale  # a tensor's is not fused
        with torch.autocast("cpu", torch.float16, enabled="autocast" in way):
            output = adapted_linear(
                x, weight, bias, [Update(method_of(reference.method_of_kind(method)), block, given)]
            )
        assert output.dtype == torch.float16
        expected = reference.linear(*wide[:3], [(method, wide[3], scale)])
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


# --- several updates -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_linear_product(name):
    x, weight = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 7), (6, 7)))
    b = torch.randn(6, dtype=torch.float64).requires_grad_()
    x.requires_grad_()
    updates = updates_of(name, MATRIX, weight)

    def found(x):
        seed_torch(1)
        return functional.adapted_linear(x, weight, b, updates)

    def expected(x):
        seed_torch(1)
        output = F.linear(x, weight, b)
        for update in updates:  # each draws its own dropout, Bone before BAT
            output = output + F.dropout(x, update.dropout) @ dense(update, MATRIX, weight).T
        return output

    close_with_gradients(found(x), expected(x), [x, *[update.block for update in updates], b])
    with torch.no_grad():  # so few tokens that BAT streams
        close(found(x[0, :1]), expected(x[0, :1]))


@pytest.mark.parametrize("kind", BLOCK_SIZES)
def test_scales_can_be_tensors(kind):
    x, weight = (torch.randn(s, dtype=torch.float64) for s in ((3, 7), (6, 7)))
    for rows in ((), K):
        scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        updates = [make_update(kind, MATRIX, weight, scale, rows=rows) for _ in range(2)]
        found = functional.adapted_linear(x, weight, None, updates)
        expected = x @ (weight + sum(dense(update, MATRIX, weight) for update in updates)).T
        close_with_gradients(found, expected, [scale, *[update.block for update in updates]])


def test_what_adds_up_is_not_written_into_what_others_hold():
    weight, x = torch.randn(6, 7), torch.randn(3, 7)
    updates = [make_update("bone", MATRIX, weight, dropout=0.5) for _ in range(2)]
    before = [t.clone() for t in (x, weight, updates[0].block, updates[1].block)]
    functional.adapted_linear(x, weight, None, updates).sum().backward()
    after = (x, weight, updates[0].block, updates[1].block)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(("dropout", "rows"), [(0.0, ()), (1e-9, ()), (1e-9, K)])  # drops nothing
@pytest.mark.parametrize("kind", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_several_updates_in_sixteen_bits(kind, dtype, dropout, rows):
    x, weight = torch.randn(3, 7), torch.randn(6, 7) / 8
    updates = [make_update(kind, MATRIX, weight, 0.5, dropout, rows) for _ in range(2)]
    expected = x @ (weight + sum(dense(update, MATRIX, weight) for update in updates)).T
    for kept in (dtype, torch.float32):
        blocks = [update.block.detach().to(kept) for update in updates]
        given = x.to(dtype), weight.to(dtype), None, with_blocks(updates, blocks)
        found = functional.adapted_linear(*given)
        assert found.dtype == dtype
        assert (found.float() - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()


def test_blocks_of_rows_keep_no_dense_weight_for_backward():
    x, weight = torch.randn(2, 64, requires_grad=True), torch.randn(48, 64)
    updates = [make_update("bat", MATRIX, weight, rows=((first, first + 8),)) for first in (0, 16)]
    kept = kept_by(lambda: functional.adapted_linear(x, weight, None, updates))
    large = [address for address, size in kept.items() if size > weight.nbytes / 4]
    assert large == [weight.untyped_storage().data_ptr()]


def test_autocast_to_float16_in_which_shard_sums_overflow():
    x, weight = torch.full((1, 96), 4000.0), torch.randn(6, 96) / 256
    update = make_update("bone", MATRIX, weight)
    update = update.replace(block=update.block.detach().sign() / 1024)
    with torch.autocast("cpu", torch.float16):
        found = functional.adapted_linear(x, weight, None, [update])
    expected = x @ (weight + dense(update, MATRIX, weight)).mT
    assert (found.float() - expected).norm() < 0.01 * expected.norm()


# --- transforms ----------------------------------------------------------------------------------


MIXED = [("bone", 0, ()), ("bat", 0, ()), ("tile", 0, TWO), ("bat", 0, K)]


def mixed_case():
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((3, 6), (6, 6), (6,)))
    updates = [make_update(kind, MATRIX, weight, rows=rows) for kind, _, rows in MIXED]
    return x, weight, bias, updates


def test_derivatives_of_mixed_updates_by_finite_differences():
    x, weight, bias, updates = mixed_case()

    def run(x, weight, bias, *blocks):
        return functional.adapted_linear(x, weight, bias, with_blocks(updates, blocks))

    leaves = (x, weight, bias, *[update.block for update in updates])
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("count", [1, 4])
def test_vmap_of_grad_over_mixed_updates(count):
    x, weight, bias, updates = mixed_case()
    updates = updates[:count]
    blocks = [update.block.detach() for update in updates]

    def loss(blocks, x):
        output = functional.adapted_linear(x, weight, bias, with_blocks(updates, blocks))
        return output.square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(blocks, x)
    for index, sample in enumerate(x):
        leaves = [block.clone().requires_grad_() for block in blocks]
        for one, other in zip(
            mapped, torch.autograd.grad(loss(leaves, sample), leaves), strict=True
        ):
            close(one[index], other)


@pytest.mark.parametrize("name", ["some with dropout", "bat of q, k and v"])
def test_compiled_products_are_the_eager_ones_in_one_graph(name):
    x, weight = (torch.randn(s, dtype=torch.float64) for s in ((3, 7), (6, 7)))
    updates = [update.replace(dropout=0.0) for update in updates_of(name, MATRIX, weight)]
    blocks = [update.block for update in updates]

    def run(x, *blocks):
        return functional.adapted_linear(x, weight, None, with_blocks(updates, blocks))

    compiled = freshly_compiled(run, "aot_eager")
    close_with_gradients(compiled(x.requires_grad_(), *blocks), run(x, *blocks), [x, *blocks])
