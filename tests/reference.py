"""Oracles: the formulas of DiSHA written out as loops, slow and obvious. Nothing here uses disha.

With W (out, in), x (..., in), rank r, indices o of outputs, i of inputs, j in a shard, a of output
blocks and b of input shards (both counted over the zero-padded size):

- `shard_sum`          S(x)[j] = sum over b of x[b r + j], x zero beyond its end;
- `bone_delta_weight`  dW[o, i] = D[i mod r, o mod r_out], one element after the other. Bone is the
  case r_out = out, in which o mod r_out is o;
- `groups_loop`        dW[o, i] = D[i mod r, o] where the shard of i is in the group of o, else 0;
- `bat_delta_weight`   dW_ab = W_ab D_a + D_a, one tile after the other, W padded with zero rows and
  zero columns to multiples of r and dW cropped to W's size;
- `merged_weight`      W' = W + sum of s dW;
- `linear`             y = W' x + b, the product with the dense merged weight;
- `layout_delta_weight`  dW of any method in `LOOPS` for a weight of any layout, one matrix of its
  stack after another. The names of the layout's axes say where each matrix is.

They are differentiable, so that autograd of these loops is the oracle for gradients.
"""

from itertools import product
from math import prod

import torch

KINDS = ("bone", "tile", "bone_groups2", "bone_groups_all", "lora", "bat")
"""The kinds of blocks that users choose from. Tests that run with each take them from here."""

GROUPS = {"bone_groups2": 2, "bone_groups_all": "all"}
"""Kind -> the number of groups of shards; the library makes other kinds of other numbers."""


def method_of_kind(kind):
    """Return the name of a kind's method: a tile is Bone with an output shard."""
    return "bone" if kind == "tile" else kind


def settings_of(kind, r_out):
    """Return the settings that make a kind of block; only a tile has an r_out."""
    if kind in GROUPS:
        return {"groups": GROUPS[kind]}
    return {"method": "bone", "r_out": r_out} if kind == "tile" else {"method": kind}


BONE_KINDS = tuple(kind for kind in KINDS if method_of_kind(kind) == "bone")
"""The kinds whose dW is Bone's, for tests of shard sums."""

METHODS = tuple(kind for kind in KINDS if method_of_kind(kind) == kind)
"""The methods that users choose from, for tests of weights whose outputs no tile divides."""


def shard_sum(x, r):
    total = torch.zeros(*x.shape[:-1], r, dtype=x.dtype)
    for i in range(x.shape[-1]):
        total[..., i % r] = total[..., i % r] + x[..., i]
    return total


def matrix_of(outputs, inputs, cell):
    """Put the cells (o, i) together at once: autograd would copy a matrix for each write to it."""
    return torch.stack([torch.stack([cell(o, i) for i in range(inputs)]) for o in range(outputs)])


def bone_delta_weight(block, in_features, out_features):
    r, r_out = block.shape
    cells = [row.unbind() for row in block]
    return matrix_of(out_features, in_features, lambda o, i: cells[i % r][o % r_out])


def bat_delta_weight(weight, block):
    out_features, in_features = weight.shape
    blocks, r, _ = block.shape
    shards = 0
    while shards * r < in_features:
        shards += 1
    padded = torch.zeros(blocks * r, shards * r, dtype=weight.dtype)
    padded[:out_features, :in_features] = weight
    delta = torch.zeros(blocks * r, shards * r, dtype=weight.dtype)
    for a in range(blocks):
        for b in range(shards):
            rows, columns = slice(a * r, (a + 1) * r), slice(b * r, (b + 1) * r)
            delta[rows, columns] = padded[rows, columns] @ block[a] + block[a]
    return delta[:out_features, :in_features]


def lora_delta_weight(weight, block):
    out_features, in_features = weight.shape
    delta = torch.zeros(out_features, in_features, dtype=block.dtype)
    for rank in block:  # a row of A, and behind it a column of B
        delta = delta + torch.outer(rank[in_features:], rank[:in_features])
    return delta


def groups_loop(most):
    """The loop of at most this many groups."""

    def groups_delta_weight(weight, block):
        out_features, in_features = weight.shape
        r = block.shape[0]
        shards = 0
        while shards * r < in_features:
            shards += 1
        groups = min(most, shards, out_features)
        cells, zero = [row.unbind() for row in block], block.new_zeros(())

        def cell(o, i):
            return cells[i % r][o] if (i // r) % groups == o % groups else zero

        return matrix_of(out_features, in_features, cell)

    return groups_delta_weight


LOOPS = {
    "bone": (lambda weight, block: bone_delta_weight(block, *weight.shape[::-1]), 2),
    "bone_groups2": (groups_loop(2), 2),
    "bone_groups_all": (groups_loop(1000), 2),  # more than any weight here has shards
    "lora": (lora_delta_weight, 2),
    "bat": (bat_delta_weight, 3),
}
"""Method -> (W, D) -> dW for one matrix W, and how many axes the block D of one matrix has."""


def delta_weight(kind, weight, block):
    """dW of a block of a kind, or of a method in `LOOPS`, on one matrix."""
    loop, _ = LOOPS[method_of_kind(kind)]
    return loop(weight, block)


def merged_weight(weight, blocks):
    """W + sum of s dW for blocks (kind, D, s)."""
    merged = weight
    for kind, block, scale in blocks:
        merged = merged + scale * delta_weight(kind, weight, block)
    return merged


def linear(x, weight, bias, blocks):
    """The product with W + sum of s dW for blocks (kind, D, s)."""
    y = x @ merged_weight(weight, blocks).T
    return y if bias is None else y + bias


def shape_of(pattern):
    """A weight's shape with 6 outputs and 7 inputs, by the names of its axes."""
    sizes = {"out": (6,), "in": (7,), "index": (7,), "expert": (3,), "*kernel": (2, 3)}
    return sum((sizes[axis] for axis in pattern.split()), ())


def matrices(pattern, shape, groups=1):
    """Yield, for each matrix of a weight: its sizes, where it is in the weight and in the block.

    (out, in), (o, i) -> index of the weight, (method, kept block) -> its block.
    """
    axes = pattern.split()
    kernel = shape[len(axes) - 1 :] if "*kernel" in axes else ()
    experts = shape[axes.index("expert")] if "expert" in axes else 1
    inputs = shape[axes.index("index" if "index" in axes else "in")] // groups
    for e, g, *k in product(range(experts), range(groups), *map(range, kernel)):

        def at(o, i, e=e, g=g, k=k):
            place = {"out": (o,), "in": (g * inputs + i,), "index": (i,), "expert": (e,)}
            return sum((place.get(axis, tuple(k)) for axis in axes), ())

        def own(method, block, e=e, g=g, k=k):
            block_axes = LOOPS[method][1]
            block = block[e] if "expert" in axes else block
            if method == "lora":  # one block for the whole kernel, whose numbers follow each input
                block = block[g] if pattern == "in out *kernel" else block
                own = torch.arange(inputs * prod(kernel)).reshape(inputs, *kernel)[(..., *k)]
                return torch.cat([block[:, own], block[:, inputs * prod(kernel) :]], 1)
            if kernel and block_axes == 2:  # kept as a small weight
                return block[(..., *k)].T if axes[0] == "out" else block[(..., *k)].chunk(groups)[g]
            return block[(g, *k)] if pattern == "in out *kernel" else block[tuple(k)]

        yield (shape[axes.index("out")], inputs), at, own


def layout_delta_weight(method, pattern, block, weight, rows=(), groups=1, padding_idx=None):
    loop, _ = LOOPS[method]
    delta = torch.zeros(weight.shape, dtype=weight.dtype)
    for (outputs, inputs), at, own in matrices(pattern, weight.shape, groups):
        chosen = [o for o in range(outputs) if not rows or any(a <= o < b for a, b in rows)]
        places = torch.tensor([[at(o, i) for i in range(inputs)] for o in chosen])
        update = loop(weight[places.unbind(-1)], own(method, block))
        kept = [i for i in range(inputs) if i != padding_idx]
        delta[places[:, kept].unbind(-1)] = update[:, kept]
    return delta
