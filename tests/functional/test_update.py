"""Updates: what they add by sums over shards, and copies of them."""

import copy

import pytest
import torch

from disha.functional import METHODS, Geometry, Layout, Update, method_of
from disha.functional.shard_sums import shard_sum_matrix
from disha.functional.update import add_up, factors_of
from tests.conftest import pickled
from tests.functional.cases import case_of, check_same, on_every_layout_with_every_block


@on_every_layout_with_every_block
def test_the_factors_of_a_block_of_some_rows(kind, name):
    case = case_of(kind, name, ((0, 2), (3, 5)))
    update = Update(method_of(case.method), case.block, 0.5, output_ranges=case.rows)
    if not update.method.low_rank:
        return
    geometry = case.layout.geometry(case.weight.shape)
    factors = factors_of(update, case.layout, geometry)
    down, up = factors.down, factors.dense_up()
    if isinstance(down, int):
        down = shard_sum_matrix(up, geometry.in_features)
    delta = up.mT @ down
    if case.layout.padding_idx is not None:
        delta[..., case.layout.padding_idx] = 0.0
    check_same(case.method, case.layout.weight(delta), 0.5 * case.delta)


def test_updates_of_one_shard_size_add_up():
    layout, sizes, blocks = Layout("out in"), Geometry(7, 6), torch.randn(3, 2, 2)
    updates = [
        Update(method_of("bone"), block, scale, output_ranges=((2 * i, 2 * i + 2),))
        for i, (block, scale) in enumerate(zip(blocks, (1.0, 0.5, torch.tensor(-2.0)), strict=True))
    ]
    (one,) = add_up(updates, layout, sizes)
    assert torch.equal(one.block, torch.cat([blocks[0], 0.5 * blocks[1], -2 * blocks[2]], 1))
    dropping = [updates[0], updates[1]._replace(dropout=0.5), updates[2]]
    assert len(add_up(dropping, layout, sizes)) == 2
    wider = Update(method_of("bone"), torch.randn(3, 6))
    assert len(add_up([*updates, wider], layout, sizes)) == 2
    (alone,) = add_up([wider], layout, sizes)
    assert alone is wider


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_an_update_has_the_method_of_the_table(copied):
    update = Update(method_of("bat"), torch.zeros(2, 2, 2))
    assert copied(update).method is METHODS["bat"]
