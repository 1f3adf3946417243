"""Sums over shards against the loops of reference.py, and sums that are rounded once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disha import functional
from disha.functional.shard_sums import add_to, overflow_safe_shard_sum
from tests import reference
from tests.functional.matrices import close_to_exact, random_sizes, strided_copy


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
    close_to_exact(functional.shard_sum(x, r), reference.shard_sum(x, r), 1e-12)
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
    sums, factor = overflow_safe_shard_sum(torch.ones(count, dtype=torch.float16), r=1)
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
        close_to_exact(functional.shard_sum(x, r, dim=dim), expected, 1e-12)


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
