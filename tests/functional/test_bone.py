"""The functions of Bone alone: outputs, embeddings, and samples with blocks of their own."""

import itertools

import pytest
import torch

from disha import functional
from disha.functional.bone import bone_delta, routed_delta
from tests import reference
from tests.conftest import close
from tests.functional.matrices import SIZES, close_to_exact, make_block, make_case
from tests.functional.updates import close_with_gradients


@pytest.mark.parametrize(
    ("sizes", "scale"), list(zip(SIZES, itertools.cycle([1.0, 0.5, torch.tensor(-1.5)]))), ids=str
)
@pytest.mark.parametrize("method", reference.BONE_KINDS)
def test_bone_delta_is_the_product_with_delta_weight(method, sizes, scale):
    x, weight, _, block = make_case(method, sizes, lead=(2, 3))
    expected = float(scale) * x @ reference.delta_weight(method, weight, block).T
    close_to_exact(functional.bone_delta(x, block, weight.shape[0], scale), expected, 1e-10)


def test_bone_delta_is_computed_in_the_dtype_of_the_input():
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    block = torch.randn(4, 5)
    delta = functional.bone_delta(x, block, 5)
    assert delta.dtype == torch.bfloat16
    expected = x.double() @ reference.bone_delta_weight(block, 8, 5).double().T
    close_to_exact(delta.double(), expected, 2**-5)


@pytest.mark.parametrize("method", reference.BONE_KINDS)
def test_bone_delta_under_autocast_is_a_bfloat16_product(method):
    x, weight, _, block = (t.detach() for t in make_case(method, (10, 9, 4, 3), torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        delta = functional.bone_delta(x, block, weight.shape[0], 0.5)
        narrow = functional.bone_delta(x, block.half(), weight.shape[0], 0.5)
    assert delta.dtype == torch.bfloat16
    close_to_exact(narrow, delta, 0.1)
    sums, dense = reference.shard_sum(x.double(), 4), block.double()
    expected = 0.5 * sums @ dense
    # S, D and the product are rounded to bfloat16: half an eps, relative, each
    bound = 2 * torch.finfo(torch.bfloat16).eps * (0.5 * sums.abs() @ dense.abs())
    tiles = weight.shape[0] // block.shape[1]
    assert ((delta.double() - expected.repeat(1, tiles)).abs() <= bound.repeat(1, tiles)).all()


@pytest.mark.parametrize("scale", [1.0, 2.0, -0.5, torch.tensor(2.0)], ids=str)
def test_embeddings_are_rows_of_the_scaled_update(scale):
    block, indices = make_block("tile", (10, 6, 4, 3)), torch.tensor([[0, 5], [9, 3]])
    given = {} if scale == 1.0 else {"scale": scale}  # which is the default
    found = functional.embedding_delta(indices, block, 6, **given, padding_idx=9)
    delta = reference.layout_delta_weight(
        "bone", "index out", block, torch.zeros(10, 6, dtype=block.dtype), padding_idx=9
    )
    close_to_exact(found, float(scale) * delta[indices], 1e-12)


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("r", [1, 3, 4, 7])
def test_routed_bone_blocks(each, r):
    blocks = [torch.randn(r, 6, dtype=torch.float64).requires_grad_() for _ in range(3)]
    scales, choices = [1.0, 0.5, torch.tensor(-2.0)], torch.tensor([2, 0, 3, 1, 2])
    x = torch.randn(5 * each, 2, 7, dtype=torch.float64).requires_grad_()
    scaled = [scale * block for scale, block in zip(scales, blocks, strict=True)]
    found = routed_delta(x, scaled, choices)
    zeros = torch.zeros(6, 7, dtype=torch.float64)
    deltas = [reference.bone_delta_weight(block, 7, 6) for block in blocks]
    deltas = [scale * delta for scale, delta in zip(scales, deltas, strict=True)] + [zeros]
    expected = torch.cat(
        [
            sample @ deltas[choice].T
            for sample, choice in zip(x.split(each), choices.tolist(), strict=True)
        ]
    )
    close_with_gradients(found, expected, [x, *blocks])


def test_routed_bone_blocks_in_float16_whose_shard_sums_overflow():
    blocks = [torch.full((4, 6), value) for value in (2.0**-10, 2.0**-11)]
    x = torch.full((2, 96), 4000.0, dtype=torch.float16)
    found = routed_delta(x, blocks, torch.tensor([0, 1]))
    close(found, torch.tensor([[375.0], [187.5]]).half().expand(2, 6))


def test_one_routed_bone_block_beside_samples_without_an_adapter():
    x, block = torch.randn(2, 8), torch.randn(4, 6)
    found = routed_delta(x, [block], torch.tensor([0, 1]))
    close(found[0], bone_delta(x[:1], block, 6)[0], 1e-6)
    assert not found[1].any()
