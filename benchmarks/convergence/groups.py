"""Groups: outputs that see different shards. Here is what the study tried beside the library's.

MiSS sends the sum of all n = ceil(in / r) shards to every output. With g groups, the shards b with
b mod g = k are summed for the outputs of group k only:

    interleaved   output o is in group o mod g: `groups` of the library
    contiguous    output o is in group o // ceil(out / g)

The block stays (r, out), so that the number of parameters is that of MiSS for any g. The rank of
dW rises from r up to g r. More groups than shards would leave outputs without an input, so a layer
with fewer than g shards has n groups.

What would refute the idea was fixed before the first run of the study. Groups are refused if, at
equal parameters and each at its own best rate, no single rule for g (a few groups, or g = n) has a
lower test loss than MiSS, beyond noise, in three of the five tasks; or if that rule is worse than
MiSS, beyond noise, in one. The second claim, that a learning rate of LoRA can be kept, is refused
if the best rate of that rule differs from LoRA's in any task.

Contiguous groups with g = n are DiaBlo as it was published. They take the place of ours if they
have a lower test loss, beyond noise, in a task and a higher one in none; or else ours stay.

PEFT's OFT and GraLoRA run beside them in the tasks where a run takes least. Before these runs it
was fixed what would count: one of them is better than MiSS, or than LoRA, in a task if its test
loss is lower beyond noise over the three seeds, each at its own best rate. Groups are better than
LoRA by the terms that held for MiSS: a lower loss, beyond noise, in three of five tasks and a
higher one in none.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.functional import Geometry, Method, method_of
from disha.functional.shard_sums import pad_to_multiple, shard_count


class ContiguousGroups(Method):
    """dW[o, i] = D[i mod r, o] where the shard of input i is in the group of output o, else 0."""

    additive = True

    def __init__(self, name: str, groups: int) -> None:
        self.name = name
        self.groups = groups

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        """Return (r, out), as MiSS has it."""
        return (*geometry.stack, r, geometry.out_features)

    def delta(self, block: Tensor, geometry: Geometry, matrices: Tensor | None) -> Tensor:
        """Return dW (out, in)."""
        r, outputs = block.shape[-2:]
        inputs = torch.arange(geometry.in_features)
        groups = self._count(geometry.in_features, r, outputs)
        of_outputs = torch.arange(outputs) // shard_count(outputs, groups)
        same_group = of_outputs[:, None] == (inputs // r % groups)[None, :]
        return block[..., inputs % r, :].mT * same_group

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        block: Tensor,
        scale: float | Tensor,
        with_base: bool = True,
    ) -> Tensor | None:
        """Return (W + s dW) x + b by one small product for each group."""
        r, outputs = block.shape
        groups = self._count(x.shape[-1], r, outputs)
        tokens = x.reshape(-1, x.shape[-1])
        sums = pad_to_multiple(tokens, groups * r, -1).view(len(tokens), -1, groups, r).sum(1)
        of_groups = pad_to_multiple(block, groups, -1).view(r, groups, -1).transpose(0, 1)
        update = _products(sums.transpose(0, 1), of_groups).transpose(0, 1)
        update = update.reshape(len(tokens), -1)
        update = update[:, :outputs].reshape(*x.shape[:-1], outputs) * scale
        return F.linear(x, weight, bias) + update if with_base else update

    def _count(self, in_features: int, r: int, outputs: int) -> int:
        return min(self.groups, shard_count(in_features, r), outputs)


def _products(x: Tensor, matrices: Tensor) -> Tensor:
    """Return x (g, tokens, r) @ matrices (g, r, columns), rounded as single products are.

    Torch has no fast batched product of 16-bit numbers on processors. So the rounded numbers are
    multiplied in float32, and the result is rounded again.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    with torch.autocast("cpu", enabled=False):
        return (x.to(dtype).float() @ matrices.to(dtype).float()).to(dtype)


class BatGroups(Method):
    """BAT of the tiles whose shard of inputs and shard of outputs are in the same group."""

    block_axes = 3
    reads_weight = True
    additive = True

    def __init__(self, name: str, groups: int) -> None:
        self.name = name
        self.groups = groups

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        """Return the shape of BAT's block."""
        return method_of("bat").shape(geometry, r, r_out)

    def delta(self, block: Tensor, geometry: Geometry, matrices: Tensor | None) -> Tensor:
        """Return dW (out, in)."""
        r = block.shape[-1]
        groups = min(self.groups, shard_count(geometry.in_features, r))
        of_outputs = torch.arange(geometry.out_features) // r % groups
        of_inputs = torch.arange(geometry.in_features) // r % groups
        whole = method_of("bat").delta(block, geometry, matrices)
        return whole * (of_outputs[:, None] == of_inputs[None, :])


GROUPS: dict[str, tuple[str, Method]] = {
    "groups2": ("MiSS, 2 groups", method_of("bone_groups2")),
    "groups3": ("MiSS, 3 groups", method_of("bone_groups3")),
    "groups4": ("MiSS, 4 groups", method_of("bone_groups4")),
    "groups_all": ("MiSS, n groups", method_of("bone_groups_all")),
    "groups4_contiguous": (
        "MiSS, 4 groups, contiguous",
        ContiguousGroups("groups4_contiguous", 4),
    ),
    "groups3_contiguous": (
        "MiSS, 3 groups, contiguous",
        ContiguousGroups("groups3_contiguous", 3),
    ),
    "groups_all_contiguous": (
        "MiSS, n groups, contiguous",
        ContiguousGroups("groups_all_contiguous", sys.maxsize),
    ),
    "bat_groups4": ("BAT, 4 groups", BatGroups("bat_groups4", 4)),
}
"""Name in the study -> title and method. `n groups` have as many groups as a layer has shards."""
