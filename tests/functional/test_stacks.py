"""Products with stacks of matrices, and with groups of rows, against dense weights."""

import pytest
import torch
import torch.nn.functional as F

from disha import functional
from tests import reference
from tests.conftest import close, freshly_compiled, kept_by, needs_grouped_products, seed_torch
from tests.functional.updates import (
    BLOCK_SIZES,
    STACK,
    TWO,
    K,
    close_with_gradients,
    dense,
    make_update,
)
from tests.reference import KINDS

ALONE = [[kind] for kind in KINDS]


@pytest.mark.parametrize("rows", [(), K, TWO], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("kinds", [*ALONE, ["bone", "bat"], ["bat", "bat"]])
def test_a_product_of_stacks(kinds, count, dropout, rows):
    x, weight = (torch.randn(s, dtype=torch.float64) for s in ((3, count, 7), (3, 6, 7)))
    x.requires_grad_()
    updates = [make_update(kind, STACK, weight, dropout=dropout, rows=rows) for kind in kinds]
    seed_torch(1)
    found = functional.adapted_stack(x, weight, updates)
    seed_torch(1)
    expected = x @ weight.mT
    for update in updates:
        expected = expected + F.dropout(x, dropout) @ dense(update, STACK, weight).mT
    assert found.shape == (3, count, 6)
    close_with_gradients(found, expected, [x, *[update.block for update in updates]])


@pytest.mark.parametrize("sizes", [(1, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kinds", [*ALONE, ["bone", "bat"]])
def test_a_product_of_stacks_broadcasts(kinds, count, sizes):
    inputs, matrices = sizes
    x = torch.randn(inputs, count, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(matrices, 6, 7, dtype=torch.float64)
    updates = [make_update(kind, STACK, weight) for kind in kinds]
    expected = x @ weight.mT
    for update in updates:
        expected = expected + x @ dense(update, STACK, weight).mT
    found = functional.adapted_stack(x, weight, updates)
    close_with_gradients(found, expected, [x, *[update.block for update in updates]])


def test_one_input_of_all_matrices_keeps_no_dense_weight_for_backward():
    x, weight = torch.randn(1, 2, 7), torch.randn(4, 6, 7)
    update = make_update("bat", STACK, weight)
    update = update.replace(block=update.block.detach().float().requires_grad_())
    kept = kept_by(lambda: functional.adapted_stack(x, weight, [update, update]))
    own = {one.untyped_storage().data_ptr() for one in (x, weight)}
    assert max(size for key, size in kept.items() if key not in own) < weight.nbytes / 4


def test_a_transform_of_a_product_with_chosen_matrices():
    x, weight, chosen = torch.randn(4, 2, 7), torch.randn(3, 6, 7), torch.tensor([2, 0, 2, 1])
    update = make_update("bone", STACK, weight).select_matrices(chosen)

    def run(x):
        return functional.adapted_stack(x, weight[chosen], [update]).sin().sum()

    close(torch.func.grad(run)(x), torch.autograd.grad(run(x.requires_grad_()), x)[0], 1e-5)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stack_of_bat_in_sixteen_bits(dtype, count):
    x, weight = torch.randn(3, count, 32), torch.randn(3, 24, 32) / 8
    update = make_update("bat", STACK, weight)
    update = update.replace(block=update.block.detach() / 8)
    expected = x @ (weight + dense(update, STACK, weight)).mT
    narrow = update.replace(block=update.block.to(dtype))
    found = functional.adapted_stack(x.to(dtype), weight.to(dtype), [narrow])
    assert found.dtype == dtype
    assert (found.float() - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()


# --- groups of rows ------------------------------------------------------------------------------


ENDS = {
    "all": [2, 5, 9],
    "empty groups": [0, 9, 9],
    "one group": [9, 9, 9],
    "rows of no group": [2, 2, 8],
    "no rows": [0, 0, 0],
}

GROUPED_KINDS = (*ALONE, ["bat", "bone"])

GROUPED = [
    *((kinds, torch.float32, ends, 0.0) for kinds in GROUPED_KINDS for ends in ENDS),
    *((kinds, torch.bfloat16, "all", 0.0) for kinds in GROUPED_KINDS),
    *(([kind], torch.float32, "empty groups", 0.5) for kind in BLOCK_SIZES),
]  # with dropout, several draw in another order than one after another


def one_group_after_the_other(kinds, blocks, weight, offsets, x, inputs):
    """Return the product by loops, in float64; each update has inputs of its own."""
    pieces, start = [], 0
    for e, end in enumerate(offsets.tolist()):
        wide = weight[e].double()
        piece = x[start:end] @ wide.T
        for kind, block, own in zip(kinds, blocks, inputs, strict=True):
            delta = reference.delta_weight(kind, wide, block[e])
            piece = piece + 0.5 * own[start:end] @ delta.T
        pieces.append(piece)
        start = end
    return torch.cat(pieces)


@needs_grouped_products
@pytest.mark.parametrize(("kinds", "dtype", "ends", "dropout"), GROUPED)
def test_a_grouped_product(kinds, dtype, ends, dropout):
    """The sizes are multiples of 16 bytes, as the product wants them; r is not."""
    offsets = torch.tensor(ENDS[ends], dtype=torch.int32)
    used = offsets[-1] if ends == "rows of no group" else 9
    rows = 0 if ends == "no rows" else 9
    x = torch.randn(rows, 8, dtype=dtype).requires_grad_()
    weight = torch.randn(3, 24, 8, dtype=dtype) / 4
    updates = [make_update(kind, STACK, weight, dropout=dropout) for kind in kinds]
    seed_torch(1)
    found = functional.adapted_grouped(torch._grouped_mm, x, weight, offsets, updates)
    assert found.dtype == dtype
    assert found.shape == (rows, 24)
    exact_x = x.detach().double().requires_grad_()
    exact_blocks = [update.block.detach().double().requires_grad_() for update in updates]
    seed_torch(1)
    dropped = [
        exact_x if not dropout else exact_x * F.dropout(torch.ones_like(x), dropout).double()
        for _ in updates
    ]
    expected = one_group_after_the_other(kinds, exact_blocks, weight, offsets, exact_x, dropped)
    limit = 1e-5 if dtype == torch.float32 else 0.03
    assert (found[:used].double() - expected).norm() <= limit * (expected.norm() + 1e-9)
    cotangent = torch.randn_like(found[:used])
    leaves = [x, *[update.block for update in updates]]
    of_x, *of_blocks = torch.autograd.grad(found[:used], leaves, cotangent)
    exact_of_x, *exact_of_blocks = torch.autograd.grad(
        expected, [exact_x, *exact_blocks], cotangent.double()
    )
    gradients = [of_x[:used], *of_blocks]  # torch leaves rows of no group as it finds them
    exact_gradients = [exact_of_x[:used], *exact_of_blocks]
    for one, other in zip(gradients, exact_gradients, strict=True):
        assert (one.double() - other).norm() <= limit * (other.norm() + 1e-9)


@needs_grouped_products
def test_one_sum_and_one_product_serve_all_groups_of_a_bone_block():
    calls = []

    def multiply(a, b, offs):
        calls.append((tuple(a.shape), tuple(b.shape)))
        return torch._grouped_mm(a, b, offs=offs)

    x, weight = torch.randn(9, 16), torch.randn(3, 24, 16)
    offsets = torch.tensor([2, 5, 9], dtype=torch.int32)
    update = make_update("bone", STACK, weight)
    functional.adapted_grouped(multiply, x, weight, offsets, [update])
    assert calls == [((9, 16), (3, 16, 24)), ((9, 4), (3, 4, 24))]  # r = 3, made 16 bytes


@needs_grouped_products
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_grouped_products_take_their_groups_as_data(kind):
    x, weight = (torch.randn(s, dtype=torch.bfloat16) for s in ((9, 16), (3, 24, 16)))
    update = make_update(kind, STACK, weight)  # torch traces the product in bfloat16 only

    def run(x, block, offsets):
        updates = [update.replace(block=block)]
        return functional.adapted_grouped(torch._grouped_mm, x, weight, offsets, updates)

    compiled = freshly_compiled(run, "aot_eager")
    for ends in ([2, 5, 9], [0, 9, 9]):
        offsets = torch.tensor(ends, dtype=torch.int32)
        block = update.block
        found, expected = compiled(x, block, offsets), run(x, block, offsets)
        assert (found - expected).norm() <= 0.02 * expected.norm()


@needs_grouped_products
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_grouped_products_in_their_dtype(kind):
    x, weight = torch.randn(5, 8), torch.randn(2, 4, 8)
    ends, updates = torch.tensor([2, 5], dtype=torch.int32), [make_update(kind, STACK, weight, r=4)]
    multiply = torch._grouped_mm
    expected = functional.adapted_grouped(multiply, x, weight, ends, updates)
    with torch.autocast("cpu", torch.bfloat16):
        assert multiply(x, weight.mT, offs=ends).dtype == torch.float32
        assert torch.equal(functional.adapted_grouped(multiply, x, weight, ends, updates), expected)


class TestShardSumsThatOverflowInFloat16:
    def case(self, kind):
        """Return x, a stack of weights, an update of it, and the exact product."""
        x = torch.full((2, 1, 96), 4000.0, dtype=torch.float16)
        weight = (torch.randn(2, 8, 96) / 256).half()
        update = make_update(kind, STACK, weight.float())
        update = update.replace(block=update.block.detach().sign() / 1024)
        expected = x.float() @ (weight.float() + dense(update, STACK, weight.float())).mT
        return x, weight, update.replace(block=update.block.half()), expected

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_stacks(self, kind):
        x, weight, update, expected = self.case(kind)
        found = functional.adapted_stack(x, weight, [update])
        assert (found.float() - expected).norm() < 0.01 * expected.norm()

    def test_of_groups(self):
        x, weight, update, expected = self.case("bone")

        def multiply(a, b, offs):  # there is none of float16 on a CPU
            return torch.cat([a[e : e + 1] @ b[e] for e in range(len(b))])

        ends = torch.tensor([1, 2], dtype=torch.int32)
        found = functional.adapted_grouped(multiply, x[:, 0], weight, ends, [update])
        assert (found.float() - expected[:, 0]).norm() < 0.01 * expected.norm()
