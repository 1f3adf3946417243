"""Sharded models: whole values out of shards, and what all ranks of a model do together.

FSDP2 (`fully_shard`) turns parameters into DTensors, of which each rank holds a part. What needs
whole values is collective: all ranks of the model's device meshes have to take part, in the same
order. So nothing may raise on one rank alone while the others wait for it: what can fail runs
inside `Ranks.agreeing`, and then fails on all of them.
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
    "imported_class",
    "is_sharded",
    "local_part",
    "obstacle_to_write",
    "values_at",
    "whole",
    "write",
]


def imported_class(module: str, name: str) -> type | None:
    """Return a class of a module that has been imported by now, or None.

    Whoever uses the class has imported it, and importing it here could take seconds.
    """
    cls: type | None = getattr(sys.modules.get(module), name, None)
    return cls


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, spread over a device mesh."""
    cls = imported_class("torch.distributed.tensor", "DTensor")
    return cls is not None and isinstance(tensor, cls)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its values. Collective if it is sharded."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    # Parameters that are offloaded to the CPU are gathered where the mesh communicates.
    full: Tensor = sharded.to(sharded.device_mesh.device_type).full_tensor()
    return full


def local_part(tensor: Tensor) -> Tensor:
    """Return the values that this rank holds."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    part: Tensor = sharded.to_local()
    return part


def values_at(tensor: Tensor, positions: Tensor) -> Tensor:
    """Return the values at flat positions, as `torch.take`. Collective if the tensor is sharded.

    Only these values are sent.

    Args:
        tensor: of any shape, floating-point.
        positions: integer tensor (n,).

    Returns:
        Tensor (n,).
    """
    if not is_sharded(tensor):
        return torch.take(tensor, positions)
    if not _in_chunks(tensor):
        return torch.take(whole(tensor), positions)
    sharded: Any = tensor
    local, mesh = sharded.to_local(), sharded.device_mesh
    indices = list(torch.unravel_index(positions.to(local.device), tensor.shape))
    here = torch.ones_like(positions, dtype=torch.bool, device=local.device)
    for dim, (start, stop) in enumerate(_local_ranges(tensor)):
        here &= (indices[dim] >= start) & (indices[dim] < stop)
        indices[dim] = indices[dim] - start
    # Bits, not numbers: adding to zero would turn -0.0 into 0.0.
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
        return "is sharded, and the parameter is not: gather it first (full_tensor())"
    if not is_sharded(values):
        if _in_chunks(parameter):
            return None
        return f"is whole, and the parameter is sharded as {target.placements}: shard it likewise"
    if (source.device_mesh, source.placements) != (target.device_mesh, target.placements):
        return f"is sharded as {source.placements}, must be as {target.placements} on its mesh"
    return None


def write(parameter: Tensor, values: Tensor) -> None:
    """Copy values into a parameter in place: whole ones by each rank into the part that it holds.

    Args:
        parameter: sharded or not.
        values: of its shape; for a sharded parameter whole, the same on all ranks, or sharded
            likewise.
    """
    if is_sharded(parameter) and not is_sharded(values):
        part = tuple(slice(start, stop) for start, stop in _local_ranges(parameter))
        values = values[part]
    local_part(parameter.detach()).copy_(local_part(values))


def _in_chunks(tensor: Tensor) -> bool:
    """Whether the parts are the chunks of `_local_ranges`: not with tensor parallelism on top."""
    sharded: Any = tensor
    return all(type(p).__name__ in ("Shard", "Replicate") for p in sharded.placements)


def _local_ranges(tensor: Tensor) -> list[tuple[int, int]]:
    """Return, for each dimension, where the part of this rank starts and stops."""
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
    """The ranks that hold the shards of a model; this process alone if it is not sharded.

    Args:
        parameters: the model's parameters.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        sharded: list[Any] = [p for p in parameters if is_sharded(p)]
        self.meshes: tuple[Any, ...] = tuple(dict.fromkeys(p.device_mesh for p in sharded))

    @property
    def writes(self) -> bool:
        """Whether this is the rank that writes files: the first."""
        return not any(any(mesh.get_coordinate()) for mesh in self.meshes)

    @contextmanager
    def agreeing(self, action: str) -> Iterator[None]:
        """Run a body without collectives; raise on every rank what it raises on any.

        Args:
            action: what is being done, which has to be the same on all ranks.

        Raises:
            ArgumentError: the ranks are not doing the same.
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
                    f"rank {rank} was asked to {other}, and rank {torch.distributed.get_rank()} to "
                    f"{action}; a sharded model needs the same call on all ranks"
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
