from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from disha.finetune.models.rope import Rotation, llama3_factors, rotary_frequencies
from tests.finetune import tiny_gguf


def expected(kind, head_dim, base, **rope):
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        rope_parameters={"rope_type": kind, "rope_theta": base, **rope},
    )
    return ROPE_INIT_FUNCTIONS[kind](config)[0]


@given(
    half=st.integers(1, 64),
    base=st.floats(100.0, 1e6),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.25, 4.0),
    gap=st.floats(0.25, 8.0),
    context=st.integers(16, 10**5),
)
@settings(max_examples=60, deadline=None)
def test_scaled_frequencies_equal_transformers(half, base, factor, low, gap, context):
    llama3 = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + gap,
        "original_max_position_embeddings": context,
    }
    factors = llama3_factors(2 * half, base, factor, low, low + gap, context)
    torch.testing.assert_close(
        rotary_frequencies(2 * half, base, factors), expected("llama3", 2 * half, base, **llama3)
    )
    torch.testing.assert_close(
        rotary_frequencies(2 * half, base, (factor,) * half),
        expected("linear", 2 * half, base, factor=factor),
    )
    # What converters to GGUF make of the same scaling divides the same frequencies.
    listed = tiny_gguf.llama3_factors(2 * half, {"rope_theta": base, **llama3})
    torch.testing.assert_close(
        rotary_frequencies(2 * half, base, listed.tolist()),
        expected("llama3", 2 * half, base, **llama3),
        rtol=1e-4,
        atol=0.0,
    )


def test_plain_frequencies_fall_from_one():
    frequencies = rotary_frequencies(8, 10000.0, None)
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_products_of_rotated_vectors_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(16), torch.randn(16)
    frequencies = rotary_frequencies(16, 100.0, None)
    rotation = Rotation.at(torch.arange(50), frequencies, torch.float32)
    rotated_q, rotated_k = rotation.apply(q.expand(50, 16)), rotation.apply(k.expand(50, 16))
    products = (rotated_q[7:] * rotated_k[:-7]).sum(-1)
    torch.testing.assert_close(products, products[:1].expand(43))
    assert not torch.allclose(products[0], (rotated_q[8] * rotated_k[0]).sum())
