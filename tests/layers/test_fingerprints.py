import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from disha.layers.fingerprints import SAMPLES, fingerprint, same_base


@settings(deadline=None, max_examples=50)
@given(shape=st.lists(st.integers(1, 40), min_size=2, max_size=3), seed=st.integers(0, 99))
@example(shape=[5, 1], seed=0)
def test_same_values_same_fingerprint_whatever_the_dtype_and_strides(shape, seed):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    mark = fingerprint(values)
    assert len(mark) == 16
    assert fingerprint(values.double()) == mark
    assert fingerprint(values.mT.clone(memory_format=torch.contiguous_format).mT) == mark
    for dtype in (torch.bfloat16, torch.float16):
        assert same_base(fingerprint(values.to(dtype)), mark)
        assert same_base(mark, fingerprint(values.to(dtype)))
    assert not same_base(fingerprint(values + 0.5), mark)
    assert not same_base(fingerprint(values[None]), mark)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_have_the_fingerprint_of_their_values(dtype):
    values = torch.randn(6, 5).to(dtype)
    assert fingerprint(values) == fingerprint(values.float())
    assert fingerprint(values.T) == fingerprint(values.float().T)


def test_every_value_of_a_small_weight_counts():
    marks = {fingerprint(values.view(8, 8)) for values in torch.eye(SAMPLES)}
    assert len(marks) == SAMPLES


@pytest.mark.parametrize(
    "weight", [torch.ones(2, 2, device="meta"), torch.ones(2, 2, dtype=torch.int8), torch.ones(0)]
)
def test_values_that_cannot_be_read_have_none(weight):
    assert fingerprint(weight) is None
