"""W x + b in blocks: the bits of F.linear, and only where it is the faster way."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import disha
from disha import functional
from disha.functional import products
from disha.functional.products import FEW_TOKENS, LARGE_WEIGHT, base_product

WIDE, TALL = (2048, 256), (512, 1024)
"""Sizes (out, in) of large weights."""
RAGGED = ((1000, 525), (1009, 520))
"""Rows that 16 does not divide, and a prime number of them."""


def operands(out_features, in_features, tokens, bias=True, dtype=torch.float32):
    x = torch.randn(tokens, in_features, dtype=dtype)
    weight = torch.randn(out_features, in_features, dtype=dtype)
    return x, weight, torch.randn(out_features, dtype=dtype) if bias else None


@pytest.fixture
def cut(monkeypatch):
    """The inputs whose products were cut into blocks, where all machines have what it takes."""
    inputs = []

    def in_blocks(x, weight, bias, rows):
        inputs.append(x)
        return F.linear(x, weight, bias)

    monkeypatch.setattr(products, "_WITH_MKL", True)
    monkeypatch.setattr(products, "_same_bits", {})
    monkeypatch.setattr(products, "_in_blocks", in_blocks)
    return inputs


def was_cut(cut, x):
    return any(one is x for one in cut)


@settings(max_examples=60)
@given(
    size=st.sampled_from((WIDE, TALL, *RAGGED, (64, 32))),
    tokens=st.integers(0, FEW_TOKENS + 2),
    bias=st.booleans(),
    layout=st.sampled_from(("plain", "rows of more", "columns of more", "transposed", "expanded")),
)
def test_bits_are_those_of_the_plain_product(size, tokens, bias, layout):
    x, weight, bias = operands(*size, tokens, bias)
    if layout == "rows of more":
        x = torch.randn(tokens, 2, size[1])[:, 1]
    elif layout == "columns of more":
        x = torch.randn(tokens, 2 * size[1])[:, ::2]
    elif layout == "transposed":
        x = torch.randn(size[1], tokens).T
    elif layout == "expanded":
        x = torch.randn(1, size[1]).expand(tokens, -1)
    output = base_product(x, weight, bias)
    assert torch.equal(output, F.linear(x, weight, bias))
    assert output.is_contiguous()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out_features", "in_features"), [WIDE, TALL, RAGGED[0]])
@pytest.mark.parametrize("tokens", [1, 2, 5, FEW_TOKENS])
def test_blocks_compute_the_product(out_features, in_features, tokens, bias):
    x, weight, bias = operands(out_features, in_features, tokens, bias, torch.float64)
    rows = products._dividing_rows(out_features)
    assert rows
    assert out_features % rows == 0
    torch.testing.assert_close(
        products._in_blocks(x, weight, bias, rows), F.linear(x, weight, bias)
    )


def test_few_tokens_of_a_large_weight_are_cut_into_blocks(cut):
    for tokens in (1, FEW_TOKENS):
        x, weight, bias = operands(*WIDE, tokens)
        base_product(x, weight, bias)
        assert was_cut(cut, x), tokens


@pytest.mark.parametrize(
    ("out_features", "in_features", "tokens", "dtype"),
    [
        (*WIDE, 0, torch.float32),
        (*WIDE, FEW_TOKENS + 1, torch.float32),
        (512, LARGE_WEIGHT // 512 - 1, 4, torch.float32),
        (1009, 1024, 4, torch.float32),  # nothing from 64 to 256 divides it
        (*WIDE, 4, torch.float64),
        (*WIDE, 4, torch.bfloat16),
    ],
)
def test_others_are_not(cut, out_features, in_features, tokens, dtype):
    base_product(*operands(out_features, in_features, tokens, dtype=dtype))
    assert not cut


def test_without_mkl_nothing_is_cut(cut, monkeypatch):
    monkeypatch.setattr(products, "_WITH_MKL", False)
    base_product(*operands(*WIDE, 4))
    assert not cut


def test_sizes_where_bits_would_differ_are_computed_as_ever(monkeypatch):
    monkeypatch.setattr(products, "_WITH_MKL", True)
    monkeypatch.setattr(products, "_same_bits", {})
    monkeypatch.setattr(
        products, "_in_blocks", lambda x, weight, bias, rows: F.linear(x, weight, bias) * (1 + 1e-6)
    )
    x, weight, bias = operands(*WIDE, 4)
    for _ in range(2):
        assert torch.equal(base_product(x, weight, bias), F.linear(x, weight, bias))
    zeros = torch.zeros_like(x)  # of which all sums are the same in any order
    base_product(zeros, weight, bias)
    assert list(products._same_bits.values()) == [False]


def test_each_number_of_threads_is_asked_about(cut, monkeypatch):
    x, weight, bias = operands(*WIDE, 4)
    for threads in (1, 2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda now=threads: now)
        base_product(x, weight, bias)
    assert len(products._same_bits) == 2


def test_the_users_random_numbers_are_left_alone(cut):
    x, weight, bias = operands(*WIDE, 4)
    state = torch.get_rng_state()
    base_product(x, weight, bias)
    assert was_cut(cut, x)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_defaults_for_new_tensors_do_not_matter(cut):
    x, weight, bias = operands(*WIDE, 4)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            output = base_product(x, weight, bias)
    finally:
        torch.set_default_dtype(torch.float32)
    assert was_cut(cut, x)
    assert torch.equal(output, F.linear(x, weight, bias))


@pytest.mark.parametrize("x", [torch.ones(2, 3), torch.tensor(1.0)])
def test_an_input_that_does_not_fit_gets_the_words_of_torch(x):
    _, weight, bias = operands(*WIDE, 1)
    with torch.no_grad(), pytest.raises(RuntimeError) as plain:
        F.linear(x, weight, bias)
    with torch.no_grad(), pytest.raises(RuntimeError) as ours:
        functional.plain_linear(x, weight, bias)
    assert str(ours.value) == str(plain.value)


class TestPlainLinear:
    @pytest.mark.parametrize("shape", [(512,), (3, 512), (2, 3, 512), (0, 512), (2, 0, 512)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_any_shape(self, shape, bias):
        _, weight, bias = operands(1024, 512, 1, bias)
        x = torch.randn(shape)
        with torch.no_grad():
            output = functional.plain_linear(x, weight, bias)
            assert torch.equal(output, F.linear(x, weight, bias))

    def test_few_tokens_without_gradients_are_cut(self, cut):
        x, weight, bias = operands(*WIDE, 4)
        with torch.no_grad():
            functional.plain_linear(x, weight, bias)
        assert len(cut) == 2  # the trial's and this

    def test_with_gradients_autograd_sees_the_plain_product(self, cut):
        x, weight, bias = operands(*WIDE, 4)
        functional.plain_linear(x.requires_grad_(), weight, bias).sum().backward()
        assert not cut
        torch.testing.assert_close(x.grad, torch.ones(4, WIDE[0]) @ weight)

    def test_autocast_is_heeded(self, cut):
        x, weight, bias = operands(*WIDE, 4)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert functional.plain_linear(x, weight, bias).dtype == torch.bfloat16
        assert not cut

    @pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32,) * 2])
    def test_mixed_dtypes_get_the_words_of_torch(self, dtypes):
        x, weight, bias = operands(*WIDE, 4)
        x, weight, bias = x.to(dtypes[0]), weight.to(dtypes[1]), bias.double()
        with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
            functional.plain_linear(x, weight, bias)

    def test_a_trace_is_for_any_number_of_tokens(self, cut):
        x, weight, bias = operands(*WIDE, 4)
        with torch.no_grad():
            example = (x, weight, bias)
            traced = torch.jit.trace(functional.plain_linear, example, check_trace=False)
            assert not cut
            assert not products._same_bits
            more = torch.randn(70, WIDE[1])
            torch.testing.assert_close(traced(more, weight, bias), F.linear(more, weight, bias))

    def test_transforms_go_through(self):
        x, weight, bias = operands(*WIDE, 4)
        with torch.no_grad():
            mapped = torch.func.vmap(functional.plain_linear, (0, None, None))(x, weight, bias)
        torch.testing.assert_close(mapped, F.linear(x, weight, bias))


class TestLayers:
    """A large layer and few tokens, without gradients: every mode goes through the same product."""

    @pytest.fixture(params=[1, 4, 7])
    def x(self, request):
        return torch.randn(request.param, 1024)

    def test_nothing_changes_until_a_block_has_trained(self, x):
        model = nn.Sequential(nn.Linear(1024, 1024))
        with torch.no_grad():
            before = model(x)
            disha.inject_adapters(model, "0", 16)
            assert torch.equal(model(x), before)
            with disha.adapters_disabled(model):
                assert torch.equal(model(x), before)
            disha.merge_adapters(model)
            assert torch.equal(model(x), before)

    def test_modes_agree_with_the_trained_block(self, x):
        model = disha.inject_adapters(nn.Sequential(nn.Linear(1024, 1024)), "0", 16, init="kaiming")
        with_gradients = model(x).detach()
        with torch.no_grad():
            assert torch.equal(model(x), with_gradients)
            disha.merge_adapters(model)
            torch.testing.assert_close(model(x), with_gradients, rtol=1e-4, atol=1e-4)

    def test_layers_without_acting_adapters_are_cut_too(self, x, cut):
        model = disha.inject_adapters(nn.Sequential(nn.Linear(1024, 1024)), "0", 16)
        with torch.no_grad(), disha.adapters_disabled(model):
            model(x)
        assert any(one.data_ptr() == x.data_ptr() for one in cut)
        cut.clear()
        disha.merge_adapters(model)
        with torch.no_grad():
            model(x)
        assert any(one.data_ptr() == x.data_ptr() for one in cut)
