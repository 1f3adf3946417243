"""Sharded tensors: gather them, write into them, and let all ranks fail together.

FSDP2 (`fully_shard`) turns parameters into DTensors. Each rank holds a shard of a DTensor.
Gathering it is collective: all ranks of its device mesh must take part, in the same order. So no
rank may raise an error alone while the others wait for it. Code that can fail runs inside
`Ranks.agreeing`, which raises the error on all ranks.

A tensor-parallel plan (`parallelize_module`) also turns weights into DTensors, but these stay
sharded in a forward. `Split` says how. Each rank then computes with its part of W and with the part
of the update that belongs to it:

    cut along     the rank's update              its product
    outputs       the columns of D               a shard of the outputs
    inputs        D, its rows rotated            a term of the sum over the ranks

Every rank holds all of D, and `Split.summed` adds up its gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from disha import errors
from disha.errors import ArgumentError, DishaError, ModeError


def imported_class(module: str, name: str) -> type | None:
    """Return a class if its module is imported, else None: no object of it can exist then."""
    cls: type | None = getattr(sys.modules.get(module), name, None)
    return cls


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, distributed over a device mesh."""
    cls = imported_class("torch.distributed.tensor", "DTensor")
    return cls is not None and isinstance(tensor, cls)


def is_partitioned(tensor: object) -> bool:
    """Whether DeepSpeed ZeRO-3 manages a parameter, whose values are absent most of the time."""
    return hasattr(tensor, "ds_id")


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its values. Collective if the tensor is sharded."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    # An offloaded parameter is on the CPU, where the mesh may be unable to communicate.
    full: Tensor = sharded.to(sharded.device_mesh.device_type).full_tensor()
    return full


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    part: Tensor = sharded.to_local()
    return part


def reason_against_writing(parameter: Tensor, values: Tensor) -> str | None:
    """Return why `write` can't copy the values into the parameter, or None if it can."""
    target: Any = parameter
    source: Any = values
    if not is_sharded(parameter):
        if not is_sharded(values):
            return None
        return "is sharded, but the parameter is not: gather it first (full_tensor())"
    if not is_sharded(values):
        if _in_chunks(parameter):
            return None
        return (
            f"is not sharded, but the parameter is sharded as {target.placements}: shard it in the "
            "same way"
        )
    if (source.device_mesh, source.placements) != (target.device_mesh, target.placements):
        return (
            f"is sharded as {source.placements}, must be sharded as {target.placements} on the "
            "parameter's mesh"
        )
    return None


def write(parameter: Tensor, values: Tensor, undo: ExitStack | None = None) -> None:
    """Copy values into a parameter in place, and note the former ones in `undo`.

    A sharded parameter takes all values, the same on all ranks, or values that are sharded like it.
    """
    if undo is not None:
        undo.callback(write, parameter, parameter.detach().clone())
    if is_sharded(parameter) and not is_sharded(values):
        part = tuple(slice(start, stop) for start, stop in _local_ranges(parameter))
        values = values[part]
    local_part(parameter.detach()).copy_(local_part(values.detach()))


def _in_chunks(tensor: Any) -> bool:
    """Whether `_local_ranges` knows the shards: not if FSDP shards a tensor-parallel weight."""
    return all(type(p).__name__ in ("Shard", "Replicate") for p in tensor.placements)


def _local_ranges(tensor: Any, coordinates: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Return the start and stop of a rank's part, for each dimension; of this rank by default."""
    mesh = tensor.device_mesh
    coordinates = mesh.get_coordinate() if coordinates is None else coordinates
    ranges = [(0, size) for size in tensor.shape]
    for dim, (coordinate, placement) in enumerate(zip(coordinates, tensor.placements)):
        if placement.is_shard():
            start, stop = ranges[placement.dim]
            step = -(-(stop - start) // mesh.size(dim))
            first = min(start + coordinate * step, stop)
            ranges[placement.dim] = (first, min(first + step, stop))
    return ranges


@dataclass(frozen=True)
class Split:
    """How a tensor-parallel plan has cut a weight of a shape over a mesh of ranks."""

    device_mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]

    @property
    def reason(self) -> str | None:
        """Why no adapter can act on such a weight, or None."""
        if _in_chunks(self):
            return None
        return (
            f"its weight is a DTensor placed as {self.placements}, and adapters act only on "
            "weights that are placed as Shard or Replicate"
        )

    @property
    def part(self) -> tuple[tuple[int, int], ...]:
        """This rank's part."""
        return tuple(_local_ranges(self))

    @property
    def parts(self) -> list[tuple[tuple[int, int], ...]]:
        """The parts of all ranks."""
        sizes = (range(size) for size in self.device_mesh.shape)
        return [tuple(_local_ranges(self, own)) for own in product(*sizes)]

    def whole(self, local: Tensor) -> Tensor:
        """Return the whole DTensor, given the part of each rank."""
        from torch.distributed.tensor import DTensor

        size = torch.Size(self.shape)
        stride = torch.empty(size, device="meta").stride()
        whole: Tensor = DTensor.from_local(
            local, self.device_mesh, self.placements, run_check=False, shape=size, stride=stride
        )
        return whole

    def summed(self, block: Tensor) -> Tensor:
        """Return a block that all ranks hold; its gradient is summed over those that cut W."""
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
        partial = [Partial() if one.is_shard() else Replicate() for one in self.placements]
        # In backward, this redistribution sums the gradients.
        whole = whole.redistribute(placements=everywhere)
        local: Tensor = whole.to_local(grad_placements=partial)
        return local

    def agree_on(self, block: Tensor) -> None:
        """Give all ranks the values that the first one has. Collective."""
        for dim in range(self.device_mesh.ndim):
            group = self.device_mesh.get_group(dim)
            source = torch.distributed.get_global_rank(group, 0)
            torch.distributed.broadcast(block.detach(), source, group=group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        return self  # its ranks can't be copied


def split_of(tensor: object) -> Split | None:
    """Return how a weight is cut, or None if it is not a DTensor."""
    if not is_sharded(tensor):
        return None
    sharded: Any = tensor
    return Split(sharded.device_mesh, tuple(sharded.placements), tuple(sharded.shape))


class Ranks:
    """The ranks that hold the shards of a model; only this process if the model is not sharded."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        sharded: list[Any] = [p for p in parameters if is_sharded(p)]
        self.meshes: tuple[Any, ...] = tuple(dict.fromkeys(p.device_mesh for p in sharded))

    @property
    def writes(self) -> bool:
        """Whether this rank writes the files; only the first one does."""
        return not any(any(mesh.get_coordinate()) for mesh in self.meshes)

    @contextmanager
    def agreeing(self, action: str) -> Iterator[None]:
        """Run the body; if it raises on any rank, raise on all ranks. It must not be collective."""
        if not self.meshes:
            yield
            return
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
        kind = None if problem is None else type(problem).__name__
        reports = self._exchanged((torch.distributed.get_rank(), action, kind, str(problem)))
        if problem is not None:
            raise problem
        for rank, other, kind, message in reports:
            if other != action:
                raise ArgumentError(
                    f"rank {rank} was asked to {other}, but rank {torch.distributed.get_rank()} to "
                    f"{action}. A sharded model needs the same call on all ranks"
                )
            if kind is not None:
                raise getattr(errors, kind, DishaError)(f"on rank {rank}: {message}")

    def _exchanged(self, report: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Return the reports of all ranks."""
        reports = [report]
        for mesh in self.meshes:
            for dim in range(mesh.ndim):
                group = mesh.get_group(dim)
                theirs: list[Any] = [None] * torch.distributed.get_world_size(group)
                torch.distributed.all_gather_object(theirs, reports, group)
                reports = list(dict.fromkeys(one for many in theirs for one in many))
        return reports
