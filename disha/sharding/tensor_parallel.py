"""Weights that a tensor-parallel plan has cut, and what each rank holds of their blocks.

A tensor-parallel plan (`parallelize_module`) turns weights into DTensors that stay sharded in a
forward. `Split` says how. Each rank then computes with its part of W and with the part of the
update that belongs to it:

    cut along     the rank holds of a Bone     it multiplies by    its product
    outputs       some columns of D            these               a shard of the outputs
    inputs        D                            D, rows rotated     a term of the sum over the ranks

A block is a DTensor too, cut like W where each rank needs a part of it, as with outputs. Where the
ranks need all of it, they add up its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from disha.sharding.ranks import broadcast
from disha.sharding.tensors import is_in_chunks, is_sharded, local_ranges


@dataclass(frozen=True)
class Split:
    """How a tensor-parallel plan has cut a weight of a shape over a mesh of ranks."""

    device_mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]

    @property
    def reason(self) -> str | None:
        """Why no adapter can act on such a weight, or None."""
        if is_in_chunks(self):
            return None
        return (
            f"its weight is a DTensor placed as {self.placements}, and adapters act only on "
            "weights that are placed as Shard or Replicate"
        )

    @property
    def part(self) -> list[tuple[int, int]]:
        """This rank's part."""
        return local_ranges(self)

    @property
    def parts(self) -> list[list[tuple[int, int]]]:
        """The parts of all ranks."""
        ranges_of_mesh = [range(size) for size in self.device_mesh.shape]
        return [local_ranges(self, coordinates) for coordinates in product(*ranges_of_mesh)]

    def make_whole(self, local: Tensor) -> Tensor:
        """Return the DTensor of which every rank has this part."""
        from torch.distributed.tensor import DTensor

        size = torch.Size(self.shape)
        stride = torch.empty(size, device="meta").stride()
        return DTensor.from_local(
            local, self.device_mesh, self.placements, run_check=False, shape=size, stride=stride
        )

    def only_where(self, is_kept: Sequence[bool]) -> Split:
        """Return the same split, but along these dimensions of the mesh only."""
        from torch.distributed.tensor import Replicate

        placements = [
            placement if keeps else Replicate()
            for placement, keeps in zip(self.placements, is_kept, strict=True)
        ]
        return Split(self.device_mesh, tuple(placements), self.shape)

    def held_part(self, block: Any) -> list[tuple[int, int]]:
        """Return the part of the weight whose block this rank holds: at least its own part."""
        return self.only_where([placement.is_shard() for placement in block.placements]).part

    def reads(self, block: Any, made_for: Split | None) -> bool:
        """Whether a rank has what it needs of a block that was made for a weight that was cut so.

        It has all of a replicated block. How FSDP shards a block has nothing to do with W.
        """
        if not is_sharded(block) or block.device_mesh != self.device_mesh:
            return False
        is_whole = all(placement.is_replicate() for placement in block.placements)
        return is_whole or made_for == self

    def read_block(self, block: Any, tokens_cut: Sequence[bool]) -> Tensor:
        """Return what this rank holds of a block, whose gradient is summed over the ranks.

        `tokens_cut` says for each dimension of the mesh whether its ranks have different tokens.
        """
        from torch.distributed.tensor import Partial

        if not (block.requires_grad and torch.is_grad_enabled()):
            return block.to_local()
        gradients = []
        for of_block, of_weight, has_other_tokens in zip(
            block.placements, self.placements, tokens_cut, strict=True
        ):
            is_term = not of_block.is_shard() and (of_weight.is_shard() or has_other_tokens)
            gradients.append(Partial() if is_term else of_block)
        if gradients != list(block.placements):
            # In backward, this redistribution sums the gradients.
            block = block.redistribute(placements=block.placements)
        return block.to_local(grad_placements=gradients)

    def broadcast_from_first_rank(self, values: Tensor) -> None:
        """Write the values of the first rank into the tensor of every rank. Collective."""
        broadcast(values, self.device_mesh.get_all_groups())

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        return self  # its ranks can't be copied


def split_of(tensor: object) -> Split | None:
    """Return how a weight is cut, or None if it is not a DTensor."""
    if not is_sharded(tensor):
        return None
    return Split(tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape))


def whole_on(mesh: Any, weight: Tensor | None) -> Split | None:
    """Return the split of a weight of which every rank of a mesh has all, or None."""
    if mesh is None or weight is None or weight.is_meta:
        return None
    from torch.distributed.tensor import Replicate

    return Split(mesh, (Replicate(),) * mesh.ndim, tuple(weight.shape))
