"""Weights that a tensor-parallel plan has cut, and what each rank computes with its part.

A tensor-parallel plan (`parallelize_module`) turns weights into DTensors that stay sharded in a
forward. `Split` says how. Each rank then computes with its part of W and with the part of the
update that belongs to it:

    cut along     the rank's update of Bone      its product
    outputs       some columns of D              a shard of the outputs
    inputs        D, its rows rotated            a term of the sum over the ranks

Every rank holds all of D, and `Split.with_all_reduced_gradient` adds up its gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from disha.errors import ModeError
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

    def with_all_reduced_gradient(self, block: Tensor) -> Tensor:
        """Return a block with the same values, whose gradient is summed over the ranks of W."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        everywhere = [Replicate()] * len(self.placements)
        whole: Any = block
        if not is_sharded(block):
            if not (block.requires_grad and torch.is_grad_enabled()):
                return block
            whole = DTensor.from_local(block, self.device_mesh, everywhere, run_check=False)
        if list(whole.placements) != everywhere:
            raise ModeError(
                f"an adapter can't act: its block is placed as {tuple(whole.placements)} beside a "
                "sharded weight, and must be Replicate; inject after parallelize_module. With "
                "fully_shard, call module.unshard() before reading its weight outside a forward"
            )
        placements_of_gradient: list[Any] = []
        for placement in self.placements:
            if placement.is_shard():
                placements_of_gradient.append(Partial())
            else:
                placements_of_gradient.append(Replicate())
        # In backward, this redistribution sums the gradients.
        whole = whole.redistribute(placements=everywhere)
        return whole.to_local(grad_placements=placements_of_gradient)

    def broadcast_from_first_rank(self, block: Tensor) -> None:
        """Write the values of the first rank into the block of every rank. Collective."""
        broadcast(block, self.device_mesh.get_all_groups())

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        return self  # its ranks can't be copied


def split_of(tensor: object) -> Split | None:
    """Return how a weight is cut, or None if it is not a DTensor."""
    if not is_sharded(tensor):
        return None
    return Split(tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape))
