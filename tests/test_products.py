"""W x + b in blocks: the bits of F.linear, and only where it is the faster way."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import disha
from disha import functional
from disha.functional import products
from disha.functional.products import LARGE_WEIGHT, LEAST_TOKENS, MOST_TOKENS, base_product

WIDE, TALL, RAGGED, PRIME = (2048, 256), (512, 1024), (1000, 525), (1009, 520)
"""Sizes (out, in) of large weights; of RAGGED, 16 does not divide the rows of a block."""


def operands(size, tokens, bias=True, dtype=torch.float32):
    out_features, in_features = size
    x = torch.randn(tokens, in_features, dtype=dtype)
    weight = torch.randn(out_features, in_features, dtype=dtype)
    return x, weight, torch.randn(out_features, dtype=dtype) if bias else None


@pytest.fixture
def _two_threads():
    """As many as there are no blocks without, and nothing known from before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    products._same_bits.clear()
    yield
    torch.set_num_threads(before)
    products._same_bits.clear()


@pytest.fixture
def cut(_two_threads, monkeypatch):
    """The inputs whose products were cut into blocks, which here compute as F.linear does."""
    inputs = []

    def in_blocks(tokens, weight, bias):
        inputs.append(tokens)
        return F.linear(tokens, weight, bias)

    monkeypatch.setattr(products, "_WITH_MKL", True)
    monkeypatch.setattr(products, "_in_blocks", in_blocks)
    return inputs


def was_cut(cut, x):
    return any(one.data_ptr() == x.data_ptr() for one in cut)


class TestBits:
    @pytest.mark.usefixtures("_two_threads")
    def test_are_those_of_the_plain_product(self):
        self.check_bits()

    @settings(max_examples=80)
    @given(
        size=st.sampled_from((WIDE, TALL, RAGGED, PRIME, (64, 32))),
        tokens=st.integers(0, MOST_TOKENS + 2),
        bias=st.booleans(),
        layout=st.sampled_from(("plain", "rows", "columns", "transposed", "expanded", "samples")),
    )
    def check_bits(self, size, tokens, bias, layout):
        x, weight, bias = operands(size, tokens, bias)
        if layout == "rows":
            x = torch.randn(tokens, 2, size[1])[:, 1]
        elif layout == "columns":
            x = torch.randn(tokens, 2 * size[1])[:, ::2]
        elif layout == "transposed":
            x = torch.randn(size[1], tokens).T
        elif layout == "expanded":
            x = torch.randn(1, size[1]).expand(tokens, -1)
        elif layout == "samples":
            x = torch.randn(tokens, 7, size[1])[:, -1:]
        assert torch.equal(base_product(x, weight, bias), F.linear(x, weight, bias))

    @pytest.mark.parametrize("first", ["zeros", "identity", "zero rows", "nan"])
    def test_a_weight_that_can_not_tell_does_not_speak_for_others(self, first, cut, monkeypatch):
        monkeypatch.setattr(
            products,
            "_in_blocks",
            lambda x, weight, bias: F.linear(x.flip(1), weight.flip(1), bias),
        )
        x, weight, _ = operands(TALL, 4, bias=False)
        odd = {
            "zeros": torch.zeros(TALL),
            "identity": torch.eye(*TALL),
            "zero rows": weight.clone().index_fill_(0, torch.tensor([5]), 0.0),
            "nan": torch.full(TALL, float("nan")),
        }[first]
        base_product(x, odd, None)
        assert torch.equal(base_product(x, weight, None), F.linear(x, weight))
        assert list(products._same_bits.values()) == [False]

    def test_zeros_as_the_first_input_do_not_speak_for_others(self, cut, monkeypatch):
        monkeypatch.setattr(
            products, "_in_blocks", lambda x, weight, bias: F.linear(x, weight, bias) * (1 + 1e-6)
        )
        x, weight, _ = operands(WIDE, 4, bias=False)
        base_product(torch.zeros_like(x), weight, None)
        assert torch.equal(base_product(x, weight, None), F.linear(x, weight))

    def test_each_number_of_threads_is_asked_about(self, cut):
        for threads in (2, 3, 2):
            torch.set_num_threads(threads)
            base_product(*operands(WIDE, 4))
        assert len(products._same_bits) == 2

    def test_each_size_is_asked_about(self, cut):
        for size, tokens, bias in ((WIDE, 4, True), (WIDE, 4, False), (WIDE, 5, True)):
            base_product(*operands(size, tokens, bias))
        base_product(*operands((4096, WIDE[1]), 4))
        assert len(products._same_bits) == 4

    def test_the_users_random_numbers_are_left_alone(self, cut):
        x, weight, bias = operands(WIDE, 4)
        state = torch.get_rng_state()
        base_product(x, weight, bias)
        assert was_cut(cut, x)
        assert torch.equal(torch.get_rng_state(), state)

    def test_another_default_dtype_does_not_matter(self, cut):
        x, weight, bias = operands(WIDE, 4)
        torch.set_default_dtype(torch.float64)
        try:
            output = base_product(x, weight, bias)
        finally:
            torch.set_default_dtype(torch.float32)
        assert was_cut(cut, x)
        assert torch.equal(output, F.linear(x, weight, bias))


class TestBlocks:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("size", [WIDE, TALL, RAGGED])
    @pytest.mark.parametrize("tokens", [1, LEAST_TOKENS, 5, MOST_TOKENS])
    def test_compute_the_product(self, size, tokens, bias):
        x, weight, bias = operands(size, tokens, bias, torch.float64)
        rows = products._block_rows(size[0])
        assert rows
        assert size[0] % rows == 0
        output = products._in_blocks(x, weight, bias)
        torch.testing.assert_close(output, F.linear(x, weight, bias))
        assert not output._is_view() or tokens < LEAST_TOKENS  # which could not be changed in place

    @pytest.mark.parametrize("tokens", [LEAST_TOKENS, MOST_TOKENS])
    @pytest.mark.parametrize("size", [WIDE, TALL, RAGGED])
    def test_are_for_few_tokens_of_a_large_weight(self, size, tokens, cut):
        x, weight, bias = operands(size, tokens)
        base_product(x, weight, bias)
        assert was_cut(cut, x)

    @pytest.mark.parametrize(
        ("size", "tokens", "dtype"),
        [
            (WIDE, 0, torch.float32),
            (WIDE, LEAST_TOKENS - 1, torch.float32),
            (WIDE, MOST_TOKENS + 1, torch.float32),
            ((512, LARGE_WEIGHT // 512 - 1), 4, torch.float32),
            (PRIME, 4, torch.float32),
            ((127, 8192), 4, torch.float32),  # less than two blocks
            (WIDE, 4, torch.float64),
            (WIDE, 4, torch.bfloat16),
        ],
    )
    def test_are_for_no_others(self, size, tokens, dtype, cut):
        base_product(*operands(size, tokens, dtype=dtype))
        assert not cut

    def test_take_more_than_one_thread(self, cut):
        torch.set_num_threads(1)
        base_product(*operands(WIDE, 4))
        assert not cut

    def test_take_mkl(self, cut, monkeypatch):
        monkeypatch.setattr(products, "_WITH_MKL", False)
        base_product(*operands(WIDE, 4))
        assert not cut

    def test_are_not_for_products_of_less_than_full_precision(self, cut):
        torch.set_float32_matmul_precision("medium")
        try:
            base_product(*operands(WIDE, 4))
        finally:
            torch.set_float32_matmul_precision("highest")
        assert not cut

    def test_a_mode_sees_the_operation_of_the_plain_layer(self, cut):
        x, weight, bias = operands(WIDE, 4)
        with FlopCounterMode(display=False) as counter:
            base_product(x, weight, bias)
        assert counter.get_total_flops() == 2 * 4 * WIDE[0] * WIDE[1]
        with torch.device("cpu"):
            base_product(x, weight, bias)
        assert not cut


class TestPlainLinear:
    @pytest.mark.usefixtures("_two_threads")
    @pytest.mark.parametrize("shape", [(1024,), (3, 1024), (2, 3, 1024), (0, 1024), (2, 0, 1024)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_any_shape(self, shape, bias):
        _, weight, bias = operands(TALL, 1, bias)
        x = torch.randn(shape)
        with torch.no_grad():
            output = functional.plain_linear(x, weight, bias)
            assert torch.equal(output, F.linear(x, weight, bias))

    @pytest.mark.parametrize("shape", [(4, 256), (2, 2, 256)])
    def test_few_tokens_without_gradients_are_cut(self, shape, cut):
        _, weight, bias = operands(WIDE, 1)
        x = torch.randn(shape)
        with torch.no_grad():
            output = functional.plain_linear(x, weight, bias)
        assert was_cut(cut, x)
        assert torch.equal(output, F.linear(x, weight, bias))

    def test_with_gradients_autograd_sees_the_plain_product(self, cut):
        x, weight, bias = operands(WIDE, 4)
        functional.plain_linear(x.requires_grad_(), weight, bias).sum().backward()
        assert not cut
        torch.testing.assert_close(x.grad, torch.ones(4, WIDE[0]) @ weight)

    def test_autocast_is_heeded(self, cut):
        x, weight, bias = operands(WIDE, 4)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert functional.plain_linear(x, weight, bias).dtype == torch.bfloat16
        assert not cut

    def test_transforms_go_through(self):
        x, weight, bias = operands(WIDE, 4)
        with torch.no_grad():
            mapped = torch.func.vmap(functional.plain_linear, (0, None, None))(x, weight, bias)
        torch.testing.assert_close(mapped, F.linear(x, weight, bias))

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    @pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
    def test_a_trace_is_for_any_shape(self, cut):
        x, weight, bias = operands(WIDE, 4)
        with torch.no_grad():
            example = (x, weight, bias)
            traced = torch.jit.trace(functional.plain_linear, example, check_trace=False)
            assert not cut
            assert not products._same_bits
            for more in (torch.randn(70, WIDE[1]), torch.randn(2, 3, WIDE[1])):
                expected = F.linear(more, weight, bias)
                torch.testing.assert_close(traced(more, weight, bias), expected)

    @pytest.mark.parametrize("layout", ["sparse weight", "sparse input", "one bias for all"])
    def test_what_else_torch_takes_it_takes(self, layout, cut):
        x, weight, bias = operands(WIDE, 4)
        if layout == "sparse weight":
            weight, bias = weight.relu().to_sparse(), None
        elif layout == "sparse input":
            x = x.relu().to_sparse()
        else:
            bias = torch.ones(1)
        with torch.no_grad():
            output = functional.plain_linear(x, weight, bias)
            torch.testing.assert_close(output, F.linear(x, weight, bias))
        assert not cut

    @pytest.mark.parametrize(
        "x", [torch.ones(2, 3), torch.tensor(1.0), torch.ones(2, 256).double()]
    )
    def test_an_input_that_does_not_fit_gets_the_words_of_torch(self, x):
        _, weight, bias = operands(WIDE, 1)
        with torch.no_grad(), pytest.raises(RuntimeError) as plain:
            F.linear(x, weight, bias)
        with torch.no_grad(), pytest.raises(RuntimeError) as ours:
            functional.plain_linear(x, weight, bias)
        assert str(ours.value) == str(plain.value)


@pytest.mark.usefixtures("_two_threads")
class TestLayers:
    """A large layer and few tokens: every mode goes through the same product."""

    @pytest.fixture(params=[1, 2, 5, 8])
    def x(self, request):
        return torch.randn(request.param, 1024)

    @pytest.fixture
    def model(self):
        return nn.Sequential(nn.Linear(1024, 1024))

    @pytest.mark.parametrize("gradients", [True, False])
    def test_nothing_changes_until_a_block_has_trained(self, model, x, gradients):
        before = model(x)
        disha.inject_adapters(model, "0", 16)
        with torch.set_grad_enabled(gradients):
            assert torch.equal(model(x), before)
            with disha.adapters_disabled(model):
                assert torch.equal(model(x), before)
            disha.merge_adapters(model)
            assert torch.equal(model(x), before)

    def test_gradients_or_not_the_output_is_the_same(self, model, x):
        disha.inject_adapters(model, "0", 16, init="kaiming")
        with_gradients = model(x).detach()
        with torch.no_grad():
            assert torch.equal(model(x), with_gradients)
            disha.merge_adapters(model)
            torch.testing.assert_close(model(x), with_gradients, rtol=1e-4, atol=1e-4)

    def test_what_follows_may_work_in_place(self, model, x):
        disha.inject_adapters(model.append(nn.ReLU(inplace=True)), "0", 16, init="kaiming")
        model(x).sum().backward()
        with torch.no_grad():
            output = model(x)
        output.mul_(torch.ones(1, requires_grad=True)).sum().backward()

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    @pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
    def test_a_traced_layer_asks_nothing(self, model, cut):
        disha.inject_adapters(model, "0", 16)
        with torch.no_grad():
            torch.jit.trace(model, torch.randn(4, 1024), check_trace=False)
        assert not cut
        assert not products._same_bits

    def test_layers_without_acting_adapters_are_cut_too(self, model, cut):
        x = torch.randn(4, 1024)
        disha.inject_adapters(model, "0", 16)
        with torch.no_grad(), disha.adapters_disabled(model):
            model(x)
        assert was_cut(cut, x)
        cut.clear()
        disha.merge_adapters(model)
        with torch.no_grad():
            model(x)
        assert was_cut(cut, x)
