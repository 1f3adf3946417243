"""Products with updates against dense weights of the loops of reference.py."""

import pytest
import torch
import torch.nn.functional as F

from disha import functional
from disha.functional import Layout, Update, method_of
from disha.functional.bone import bone_delta, routed_delta
from disha.functional.parts import update_of_part
from tests import reference
from tests.conftest import close, freshly_compiled, needs_grouped_products
from tests.functional.test_adapted_linear import kept_by

MATRIX, STACK, INDEX = Layout("out in"), Layout("expert out in"), Layout("index out")
SIZES = {"bone": ("bone", 3, None), "tile": ("bone", 3, 2), "bat": ("bat", 4, None)}


def multiply(x, weight, bias):
    """A product of matrices, or of stacks of them."""
    return x @ weight.mT


def look_up(indices, table, bias):
    return F.embedding(indices, table)


def make_update(kind, layout, weight, scale=0.5, dropout=0.0, rows=(), r=None):
    """Return an update with a random block that requires gradients."""
    method, own_r, r_out = SIZES[kind]
    shape = method_of(method).block_shape(layout, weight.shape, r or own_r, r_out, rows)
    block = torch.randn(shape, dtype=weight.dtype).requires_grad_()
    return Update(method_of(method), block, scale, dropout, rows)


def dense(update, layout, weight):
    """Return s dW of an update, by the loops."""
    delta = reference.layout_delta_weight(
        update.method.name, layout.pattern, update.block, weight, update.output_ranges,
        layout.groups, layout.padding_idx,
    )  # fmt: skip
    return update.scale * delta


def check(found, expected, leaves, tolerance=1e-10):
    """Compare values and the gradients of all leaves."""
    close(found, expected, tolerance)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, leaves, cotangent, allow_unused=True)
    close(gradients, torch.autograd.grad(expected, leaves, cotangent), tolerance)


# --- one matrix ----------------------------------------------------------------------------------

Q, K, V, TWO = ((0, 2),), ((2, 4),), ((4, 6),), ((0, 2), (4, 6))
COMBINATIONS = {
    "one bone": [("bone", 0, ())],
    "one tile": [("tile", 0, ())],
    "one bat": [("bat", 0, ())],
    "several bone": [("bone", 0, ()), ("tile", 0, ()), ("bone", 0, ())],
    "several bat": [("bat", 0, ()), ("bat", 0, ())],
    "bone and bat": [("bone", 0, ()), ("bat", 0, ()), ("tile", 0, ())],
    "bone with dropout": [("bone", 0.5, ())],
    "tile with dropout": [("tile", 0.5, ())],
    "bat with dropout": [("bat", 0.5, ())],
    "some with dropout": [("bone", 0.5, ()), ("bat", 0, ()), ("bat", 0.3, ()), ("bone", 0, ())],
    "bone of rows": [("bone", 0, K)],
    "tile of rows": [("tile", 0, TWO)],
    "bat of rows": [("bat", 0, K)],
    "bat of two ranges": [("bat", 0, TWO)],
    "bone of the last rows": [("bone", 0, V)],
    "bone of q, k and v": [("bone", 0, Q), ("bone", 0, K), ("tile", 0, V)],
    "bat of q, k and v": [("bat", 0, V), ("bat", 0, Q), ("bat", 0, K)],
    "bat of q and v twice": [("bat", 0, Q), ("bat", 0, V), ("bat", 0, Q)],
    "bat of overlapping rows": [("bat", 0, Q), ("bat", 0, ((1, 3),)), ("bat", 0, V)],
    "bat of rows and of all": [("bat", 0, K), ("bat", 0, ())],
    "bat of all and of rows": [("bat", 0, ()), ("bat", 0, K)],
    "bat and bone of rows": [("bat", 0, K), ("bone", 0, V)],
    "bat of rows beside dropout": [("bat", 0, K), ("bone", 0.5, ()), ("bat", 0, ())],
    "overlapping beside dropout": [("bat", 0, Q), ("bat", 0, ((1, 3),)), ("bat", 0.5, V)],
    "rows with dropout": [("bone", 0.5, K), ("tile", 0.3, V), ("bat", 0.5, TWO)],
}


def updates_of(combination, layout, weight, scales=(0.5, -1.0, 1.0, 2.0)):
    return [
        make_update(kind, layout, weight, scale, dropout, rows)
        for (kind, dropout, rows), scale in zip(COMBINATIONS[combination], scales, strict=False)
    ]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_linear_product(name):
    x, weight = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 7), (6, 7)))
    b = torch.randn(6, dtype=torch.float64).requires_grad_()
    x.requires_grad_()
    updates = updates_of(name, MATRIX, weight)

    def found(x):
        torch.manual_seed(1)
        return functional.adapted_linear(x, weight, b, updates)

    def expected(x):
        torch.manual_seed(1)
        output = F.linear(x, weight, b)
        for update in updates:  # each draws its own dropout, Bone before BAT
            output = output + F.dropout(x, update.dropout) @ dense(update, MATRIX, weight).T
        return output

    check(found(x), expected(x), [x, *[update.block for update in updates], b])
    with torch.no_grad():  # so few tokens that BAT streams
        close(found(x[0, :1]), expected(x[0, :1]))


@pytest.mark.parametrize("kind", SIZES)
def test_scales_can_be_tensors(kind):
    x, weight = (torch.randn(s, dtype=torch.float64) for s in ((3, 7), (6, 7)))
    for rows in ((), K):
        scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        updates = [make_update(kind, MATRIX, weight, scale, rows=rows) for _ in range(2)]
        found = functional.adapted_linear(x, weight, None, updates)
        expected = x @ (weight + sum(dense(update, MATRIX, weight) for update in updates)).T
        check(found, expected, [scale, *[update.block for update in updates]])


def test_what_adds_up_is_not_written_into_what_others_hold():
    weight, x = torch.randn(6, 7), torch.randn(3, 7)
    updates = [make_update("bone", MATRIX, weight, dropout=0.5) for _ in range(2)]
    before = [t.clone() for t in (x, weight, updates[0].block, updates[1].block)]
    functional.adapted_linear(x, weight, None, updates).sum().backward()
    after = (x, weight, updates[0].block, updates[1].block)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(("dropout", "rows"), [(0.0, ()), (1e-9, ()), (1e-9, K)])  # drops nothing
@pytest.mark.parametrize("kind", SIZES)
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


# --- transforms ----------------------------------------------------------------------------------

MIXED = [("bone", 0, ()), ("bat", 0, ()), ("tile", 0, TWO), ("bat", 0, K)]


def mixed_case():
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((3, 6), (6, 6), (6,)))
    updates = [make_update(kind, MATRIX, weight, rows=rows) for kind, _, rows in MIXED]
    return x, weight, bias, updates


def with_blocks(updates, blocks):
    return [u.replace(block=block) for u, block in zip(updates, blocks, strict=True)]


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
    check(compiled(x.requires_grad_(), *blocks), run(x, *blocks), [x, *blocks])


# --- stacks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(), K, TWO], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("kinds", [["bone"], ["tile"], ["bat"], ["bone", "bat"], ["bat", "bat"]])
def test_a_product_of_stacks(kinds, count, dropout, rows):
    x, weight = (torch.randn(s, dtype=torch.float64) for s in ((3, count, 7), (3, 6, 7)))
    x.requires_grad_()
    updates = [make_update(kind, STACK, weight, dropout=dropout, rows=rows) for kind in kinds]
    torch.manual_seed(1)
    found = functional.adapted_stack(x, weight, updates)
    torch.manual_seed(1)
    expected = x @ weight.mT
    for update in updates:
        expected = expected + F.dropout(x, dropout) @ dense(update, STACK, weight).mT
    assert found.shape == (3, count, 6)
    check(found, expected, [x, *[update.block for update in updates]])


@pytest.mark.parametrize("sizes", [(1, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kinds", [["bone"], ["bat"], ["bone", "bat"]])
def test_a_product_of_stacks_broadcasts(kinds, count, sizes):
    inputs, matrices = sizes
    x = torch.randn(inputs, count, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(matrices, 6, 7, dtype=torch.float64)
    updates = [make_update(kind, STACK, weight) for kind in kinds]
    expected = x @ weight.mT
    for update in updates:
        expected = expected + x @ dense(update, STACK, weight).mT
    found = functional.adapted_stack(x, weight, updates)
    check(found, expected, [x, *[update.block for update in updates]])


def test_one_input_of_all_matrices_keeps_no_dense_weight_for_backward():
    x, weight = torch.randn(1, 2, 7), torch.randn(4, 6, 7)
    update = make_update("bat", STACK, weight)
    update = update.replace(block=update.block.detach().float().requires_grad_())
    kept = kept_by(lambda: functional.adapted_stack(x, weight, [update, update]))
    own = {one.untyped_storage().data_ptr() for one in (x, weight)}
    assert max(size for key, size in kept.items() if key not in own) < weight.nbytes / 4


def test_blocks_of_rows_keep_no_dense_weight_for_backward():
    x, weight = torch.randn(2, 64, requires_grad=True), torch.randn(48, 64)
    updates = [make_update("bat", MATRIX, weight, rows=((first, first + 8),)) for first in (0, 16)]
    kept = kept_by(lambda: functional.adapted_linear(x, weight, None, updates))
    large = [address for address, size in kept.items() if size > weight.nbytes / 4]
    assert large == [weight.untyped_storage().data_ptr()]


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


ENDS = {
    "all": [2, 5, 9],
    "empty groups": [0, 9, 9],
    "one group": [9, 9, 9],
    "rows of no group": [2, 2, 8],
    "no rows": [0, 0, 0],
}

GROUPED_KINDS = (["bone"], ["tile"], ["bat"], ["bat", "bone"])
GROUPED = [
    *((kinds, torch.float32, ends, 0.0) for kinds in GROUPED_KINDS for ends in ENDS),
    *((kinds, torch.bfloat16, "all", 0.0) for kinds in GROUPED_KINDS),
    *(([kind], torch.float32, "empty groups", 0.5) for kind in SIZES),
]  # with dropout, several draw in another order than one after another


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
    torch.manual_seed(1)
    found = functional.adapted_grouped(torch._grouped_mm, x, weight, offsets, updates)
    assert found.dtype == dtype
    assert found.shape == (rows, 24)
    exact = [x.detach().double().requires_grad_()]
    exact += [update.block.detach().double().requires_grad_() for update in updates]
    torch.manual_seed(1)
    dropped = [
        exact[0] if not dropout else exact[0] * F.dropout(torch.ones_like(x), dropout).double()
        for _ in updates
    ]
    pieces, start = [], 0
    for e, end in enumerate(offsets.tolist()):
        wide = weight[e].double()
        piece = exact[0][start:end] @ wide.T
        for kind, block, own in zip(kinds, exact[1:], dropped, strict=True):
            delta = reference.delta_weight(kind, wide, block[e])
            piece = piece + 0.5 * own[start:end] @ delta.T
        pieces.append(piece)
        start = end
    expected = torch.cat(pieces)
    limit = 1e-5 if dtype == torch.float32 else 0.03
    assert (found[:used].double() - expected).norm() <= limit * (expected.norm() + 1e-9)
    cotangent = torch.randn_like(found[:used])
    leaves = [x, *[update.block for update in updates]]
    gradients = torch.autograd.grad(found[:used], leaves, cotangent)
    oracle = torch.autograd.grad(expected, exact, cotangent.double())
    for one, other in zip(gradients, oracle, strict=True):
        if one is gradients[0]:  # torch leaves rows of no group as it finds them
            one, other = one[:used], other[:used]
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
@pytest.mark.parametrize("kind", ["bone", "bat"])
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


# --- convolutions --------------------------------------------------------------------------------

CONVOLUTIONS = {
    "1d": (F.conv1d, Layout("out in *kernel"), (6, 7, 3), (2, 7, 9), {}),
    "1d alone": (F.conv1d, Layout("out in *kernel"), (6, 7, 3), (7, 9), {"padding": 1}),
    "2d strided": (
        F.conv2d, Layout("out in *kernel"), (6, 7, 2, 3), (2, 7, 6, 5),
        {"stride": 2, "padding": (1, 2), "dilation": (1, 2)},
    ),
    "2d grouped": (F.conv2d, Layout("out in *kernel"), (6, 5, 2, 2), (2, 10, 4, 3), {"groups": 2}),
    "3d": (F.conv3d, Layout("out in *kernel"), (6, 5, 2, 1, 2), (1, 5, 3, 2, 3), {}),
    "transposed 1d": (F.conv_transpose1d, Layout("in out *kernel"), (7, 6, 3), (2, 7, 5), {}),
    "transposed 2d grouped": (
        F.conv_transpose2d, Layout("in out *kernel", groups=2), (10, 6, 2, 2), (2, 10, 4, 3),
        {"groups": 2, "stride": 2, "output_padding": 1},
    ),
    "transposed 3d": (
        F.conv_transpose3d, Layout("in out *kernel"), (5, 6, 2, 1, 2), (1, 5, 2, 2, 2), {},
    ),
}  # fmt: skip


def conv_case(name, dtype=torch.float64):
    func, layout, shape, inputs, options = CONVOLUTIONS[name]

    def convolve(x, weight, bias):
        return func(x, weight, bias, **options)

    groups = options.get("groups", 1)
    outputs = shape[1] * groups if layout.in_first else shape[0]
    x, weight, bias = (torch.randn(s, dtype=dtype) for s in (inputs, shape, (outputs,)))
    return convolve, layout, x, weight, bias


@pytest.mark.parametrize(
    "combination",
    ["one bone", "one tile", "one bat", "bone and bat", "some with dropout", "bat of rows",
     "bone of q, k and v", "rows with dropout"],
)  # fmt: skip
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution(name, combination):
    convolve, layout, x, weight, bias = conv_case(name)
    check_product(convolve, x, weight, bias, layout, combination)


def check_product(multiply, x, weight, bias, layout, combination):
    updates = updates_of(combination, layout, weight)
    torch.manual_seed(1)
    found = functional.adapted_product(multiply, x.requires_grad_(), weight, bias, layout, updates)
    torch.manual_seed(1)
    expected = multiply(x, weight, bias)
    for update in updates:
        delta = dense(update, layout, weight)
        expected = expected + multiply(F.dropout(x, update.dropout), delta, None)
    check(found, expected, [x, *[update.block for update in updates]])


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_linear_product_with_a_table(combination):
    shapes = (2, 6), (7, 6), (7,)
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    check_product(F.linear, x, weight, bias, Layout("index out", padding_idx=3), combination)


@pytest.mark.parametrize("kind", SIZES)
def test_a_convolution_in_float16_whose_shard_sums_overflow(kind):
    layout, weight = Layout("out in *kernel"), torch.randn(6, 96, 2) / 256
    x = torch.full((1, 96, 4), 4000.0)  # 24 or 32 shards of it are beyond 65,504
    update = make_update(kind, layout, weight)
    block = (update.block.detach().sign() / 1024).requires_grad_()
    update = update.replace(block=block)
    expected = F.conv1d(x, weight + dense(update, layout, weight))
    half = update.replace(block=block.detach().half().requires_grad_())
    found = functional.adapted_product(F.conv1d, x.half(), weight.half(), None, layout, [half])
    assert found.dtype == torch.float16
    assert (found.float() - expected).norm() < 0.01 * expected.norm()
    cotangent = torch.randn_like(expected) / 256
    (one,) = torch.autograd.grad(found, half.block, cotangent.half())
    (other,) = torch.autograd.grad(expected, block, cotangent)
    assert (one.float() - other).norm() < 0.01 * other.norm()


def test_stacks_and_groups_in_float16_whose_shard_sums_overflow():
    x = torch.full((2, 1, 96), 4000.0, dtype=torch.float16)
    weight = (torch.randn(2, 8, 96) / 256).half()
    for kind in ("bone", "bat"):
        update = make_update(kind, STACK, weight.float())
        update = update.replace(block=update.block.detach().sign() / 1024)
        expected = x.float() @ (weight.float() + dense(update, STACK, weight.float())).mT
        half = update.replace(block=update.block.half())
        found = functional.adapted_stack(x, weight, [half])
        assert (found.float() - expected).norm() < 0.01 * expected.norm()

    def multiply(a, b, offs):  # there is none of float16 on a CPU
        return torch.cat([a[e : e + 1] @ b[e] for e in range(len(b))])

    ends = torch.tensor([1, 2], dtype=torch.int32)
    update = make_update("bone", STACK, weight.float())
    update = update.replace(block=update.block.detach().sign() / 1024)
    expected = x.float() @ (weight.float() + dense(update, STACK, weight.float())).mT
    half = update.replace(block=update.block.half())
    found = functional.adapted_grouped(multiply, x[:, 0], weight, ends, [half])
    assert (found.float() - expected[:, 0]).norm() < 0.01 * expected.norm()


def test_autocast_to_float16_in_which_shard_sums_overflow():
    x, weight = torch.full((1, 96), 4000.0), torch.randn(6, 96) / 256
    update = make_update("bone", MATRIX, weight)
    update = update.replace(block=update.block.detach().sign() / 1024)
    with torch.autocast("cpu", torch.float16):
        found = functional.adapted_linear(x, weight, None, [update])
    expected = x @ (weight + dense(update, MATRIX, weight)).mT
    assert (found.float() - expected).norm() < 0.01 * expected.norm()


# --- lookups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Layout("index out", padding_idx=3), MATRIX], ids=str)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_lookup(combination, layout):
    indices = torch.tensor([[0, 3], [5, 1]])
    weight = torch.randn((6, 7) if layout is MATRIX else (7, 6), dtype=torch.float64)
    updates = updates_of(combination, layout, weight)
    torch.manual_seed(1)
    found = functional.adapted_product(look_up, indices, weight, None, layout, updates)
    torch.manual_seed(1)
    expected = weight[indices]
    for update in updates:  # dropping a one-hot input drops the whole update of a token
        kept = F.dropout(torch.ones(2, 2, 1, dtype=torch.float64), update.dropout)
        expected = expected + kept * dense(update, layout, weight)[indices]
    check(found, expected, [update.block for update in updates])
    assert layout is MATRIX or torch.equal(found[0, 1], weight[3])


# --- samples with blocks of their own ------------------------------------------------------------


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
    check(found, expected, [x, *blocks])


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


@needs_grouped_products
@pytest.mark.parametrize("method", ["bone", "bat"])
def test_autocast_leaves_grouped_products_in_their_dtype(method):
    x, weight = torch.randn(5, 8), torch.randn(2, 4, 8)
    block = torch.randn(2, 4, 4) if method == "bone" else torch.randn(2, 1, 4, 4)
    ends, updates = torch.tensor([2, 5], dtype=torch.int32), [Update(method_of(method), block)]
    multiply = torch._grouped_mm
    expected = functional.adapted_grouped(multiply, x, weight, ends, updates)
    with torch.autocast("cpu", torch.bfloat16):
        assert multiply(x, weight.mT, offs=ends).dtype == torch.float32
        assert torch.equal(functional.adapted_grouped(multiply, x, weight, ends, updates), expected)


@pytest.mark.parametrize(
    ("method", "shape", "rows"),
    [("bone", (2, 3), (0, 3)), ("bat", (2, 2, 2), (0, 3)), ("rows", (4, 2), (1, 3))],
)
def test_a_part_without_the_adapted_rows_takes_part_in_backward(method, shape, rows):
    """Else the ranks that have these rows would wait for its gradient."""
    block = torch.randn(shape).requires_grad_()
    update = Update(method_of(method), block, output_ranges=(rows,), r=2)
    part, x, indices = torch.randn(4, 4), torch.randn(3, 4), torch.tensor([0, 3])
    updates = update_of_part(update, MATRIX, (8, 4), ((4, 8), (0, 4)))
    for found, expected in (
        (functional.adapted_linear(x, part, None, updates), x @ part.mT),
        (functional.adapted_product(look_up, indices, part, None, MATRIX, updates), part[indices]),
    ):
        close(found, expected, 1e-6)
        (gradient,) = torch.autograd.grad(found.sum(), block)
        assert not gradient.any()
