"""Random updates of a weight, alone and in combination, and what they must compute."""

import torch
import torch.nn.functional as F

from disha.functional import Layout, Update, method_of
from disha.functional.products import update_product
from tests import reference
from tests.conftest import close

MATRIX, STACK = Layout("out in"), Layout("expert out in")

BLOCK_SIZES = {
    "bone": ("bone", 3, None),
    "tile": ("bone", 3, 2),
    "bone_groups2": ("bone_groups2", 3, None),
    "bone_groups_all": ("bone_groups_all", 2, None),
    "lora": ("lora", 2, None),
    "bat": ("bat", 4, None),
}

Q, K, V, TWO = ((0, 2),), ((2, 4),), ((4, 6),), ((0, 2), (4, 6))

COMBINATIONS = {
    "one bone": [("bone", 0, ())],
    "one tile": [("tile", 0, ())],
    "one with groups": [("bone_groups2", 0, ())],
    "one with all groups": [("bone_groups_all", 0, ())],
    "one lora": [("lora", 0, ())],
    "one bat": [("bat", 0, ())],
    "several bone": [("bone", 0, ()), ("tile", 0, ()), ("bone", 0, ())],
    "several with groups": [("bone_groups2", 0, ()), ("bone", 0, ()), ("bone_groups2", 0, ())],
    "several lora": [("lora", 0, ()), ("bone", 0, ()), ("lora", 0.5, ())],
    "lora of rows": [("lora", 0, K), ("lora", 0.5, TWO), ("bone", 0, Q)],
    "several bat": [("bat", 0, ()), ("bat", 0, ())],
    "bone and bat": [("bone", 0, ()), ("bat", 0, ()), ("tile", 0, ())],
    "bone with dropout": [("bone", 0.5, ())],
    "tile with dropout": [("tile", 0.5, ())],
    "bat with dropout": [("bat", 0.5, ())],
    "groups with dropout": [("bone_groups2", 0.5, ()), ("bone_groups_all", 0, ())],
    "some with dropout": [("bone", 0.5, ()), ("bat", 0, ()), ("bat", 0.3, ()), ("bone", 0, ())],
    "bone of rows": [("bone", 0, K)],
    "tile of rows": [("tile", 0, TWO)],
    "groups of rows": [("bone_groups2", 0, K), ("bone_groups_all", 0.5, TWO), ("bone", 0, Q)],
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


def look_up(indices, table, bias):
    return F.embedding(indices, table)


def bone_delta(x, block, outputs, scale=1.0):
    """What a Bone block adds to the output of a linear layer."""
    weight = torch.zeros(()).expand(outputs, x.shape[-1])  # only its shape matters
    return update_product(F.linear, x, weight, MATRIX, Update(method_of("bone"), block, scale))


def bone_delta_weight(block, inputs, outputs):
    """DW of a Bone block, or of a stack of them."""
    layout = STACK if block.dim() == 3 else MATRIX
    weight = block.new_zeros(()).expand(*block.shape[:-2], outputs, inputs)
    return method_of("bone").delta_weight(layout, block, weight)


def make_update(kind, layout, weight, scale=0.5, dropout=0.0, rows=(), r=None):
    """Return an update with a random block that requires gradients."""
    method, own_r, r_out = BLOCK_SIZES[kind]
    shape = method_of(method).block_shape(layout, weight.shape, r or own_r, r_out, rows)
    block = torch.randn(shape, dtype=weight.dtype).requires_grad_()
    return Update(method_of(method), block, scale, dropout, rows)


def updates_of(combination, layout, weight, scales=(0.5, -1.0, 1.0, 2.0)):
    return [
        make_update(kind, layout, weight, scale, dropout, rows)
        for (kind, dropout, rows), scale in zip(COMBINATIONS[combination], scales, strict=False)
    ]


def with_blocks(updates, blocks):
    return [u.replace(block=block) for u, block in zip(updates, blocks, strict=True)]


def dense(update, layout, weight):
    """Return s dW of an update, by the loops."""
    delta = reference.layout_delta_weight(
        update.method.name, layout.pattern, update.block, weight, update.output_ranges,
        layout.groups, layout.padding_idx,
    )  # fmt: skip
    return update.scale * delta


def close_with_gradients(found, expected, leaves, tolerance=1e-10):
    """Compare values and the gradients of all leaves."""
    close(found, expected, tolerance)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, leaves, cotangent, allow_unused=True)
    close(gradients, torch.autograd.grad(expected, leaves, cotangent), tolerance)
