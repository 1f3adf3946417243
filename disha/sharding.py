"""Sharded tensors: gather them, write into them, and let all ranks fail together.

FSDP2 (`fully_shard`) turns parameters into DTensors, of which each rank holds a shard. Gathering a
tensor is collective: all ranks of its device mesh must take part, in the same order. So no rank may
raise an error alone while the others wait for it. Code that can fail runs inside `Ranks.agreeing`,
which raises the error on all ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from disha import errors
from disha.errors import ArgumentError, DishaError

__all__ = [
    "Ranks",
    "gathered",
    "imported_class",
    "is_sharded",
    "local_part",
    "obstacle_to_write",
    "values_at",
    "write",
]


def imported_class(module: str, name: str) -> type | None:
    """Return a class of a module if the module is imported already, else None.

    No object of the class can exist otherwise, and importing the module here could take seconds.
    """
    cls: type | None = getattr(sys.modules.get(module), name, None)
    return cls


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, distributed over a device mesh."""
    cls = imported_class("torch.distributed.tensor", "DTensor")
    return cls is not None and isinstance(tensor, cls)


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


def values_at(tensor: Tensor, positions: Tensor) -> Tensor:
    """Return the values at flat positions, as `torch.take`. Collective if the tensor is sharded.

    The ranks exchange only these values.

    Args:
        tensor: of any shape, floating-point.
        positions: integer tensor (n,).

    Returns:
        Tensor (n,).
    """
    if not is_sharded(tensor):
        return torch.take(tensor, positions)
    if not _in_chunks(tensor):
        return torch.take(gathered(tensor), positions)
    sharded: Any = tensor
    local, mesh = sharded.to_local(), sharded.device_mesh
    indices = list(torch.unravel_index(positions.to(local.device), tensor.shape))
    here = torch.ones_like(positions, dtype=torch.bool, device=local.device)
    for dim, (start, stop) in enumerate(_local_ranges(tensor)):
        here &= (indices[dim] >= start) & (indices[dim] < stop)
        indices[dim] = indices[dim] - start
    # This sums the bits, not the numbers, because 0.0 + -0.0 is 0.0.
    bits = torch.zeros(len(positions), dtype=torch.int64, device=local.device)
    bits[here] = local[tuple(index[here] for index in indices)].double().view(torch.int64)
    bits = bits.to(mesh.device_type)
    for dim, placement in enumerate(sharded.placements):
        if placement.is_shard():
            torch.distributed.all_reduce(bits, group=mesh.get_group(dim))
    return bits.view(torch.float64).to(tensor.dtype)


def obstacle_to_write(parameter: Tensor, values: Tensor) -> str | None:
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
        return f"is not sharded, but the parameter is as {target.placements}: shard it likewise"
    if (source.device_mesh, source.placements) != (target.device_mesh, target.placements):
        return f"is sharded as {source.placements}, must be as {target.placements} on its mesh"
    return None


def write(parameter: Tensor, values: Tensor) -> None:
    """Copy values into a parameter in place. Each rank writes the part that it holds.

    Args:
        parameter: sharded or not.
        values: of the parameter's shape. For a sharded parameter, either all values, the same on
            all ranks, or values that are sharded like the parameter.
    """
    if is_sharded(parameter) and not is_sharded(values):
        part = tuple(slice(start, stop) for start, stop in _local_ranges(parameter))
        values = values[part]
    local_part(parameter.detach()).copy_(local_part(values))


def _in_chunks(tensor: Tensor) -> bool:
    """Whether `_local_ranges` gives the shards: not if FSDP is combined with tensor parallelism."""
    sharded: Any = tensor
    return all(type(p).__name__ in ("Shard", "Replicate") for p in sharded.placements)


def _local_ranges(tensor: Tensor) -> list[tuple[int, int]]:
    """Return the start and stop of this rank's part, for each dimension."""
    sharded: Any = tensor
    mesh = sharded.device_mesh
    ranges = [(0, size) for size in tensor.shape]
    for dim, (coordinate, placement) in enumerate(
        zip(mesh.get_coordinate(), sharded.placements, strict=True)
    ):
        if placement.is_shard():
            start, stop = ranges[placement.dim]
            step = -(-(stop - start) // mesh.size(dim))
            first = min(start + coordinate * step, stop)
            ranges[placement.dim] = (first, min(first + step, stop))
    return ranges


class Ranks:
    """The ranks that hold the shards of a model; only this process if the model is not sharded.

    Args:
        parameters: the model's parameters.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        sharded: list[Any] = [p for p in parameters if is_sharded(p)]
        self.meshes: tuple[Any, ...] = tuple(dict.fromkeys(p.device_mesh for p in sharded))

    @property
    def writes(self) -> bool:
        """Whether this rank writes the files; only the first one does."""
        return not any(any(mesh.get_coordinate()) for mesh in self.meshes)

    @contextmanager
    def agreeing(self, action: str) -> Iterator[None]:
        """Run the body; if it raises on any rank, raise on all ranks. It must not be collective.

        Args:
            action: the action, such as "save an adapter"; it must be the same on all ranks.

        Raises:
            ArgumentError: the ranks do different things.
        """
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
