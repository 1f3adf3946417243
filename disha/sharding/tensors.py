"""Sharded and partitioned tensors: how to gather their values, and how to write into them.

FSDP2 (`fully_shard`) turns parameters into DTensors. Each rank holds a shard of a DTensor.
ZeRO-3 of DeepSpeed partitions parameters: outside a forward, they are empty (`zero.py`).
Gathering is collective: all ranks that hold a part must take part, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from math import prod
from typing import Any, TypeGuard

from torch import Tensor, nn

from disha.sharding.imported import imported_class
from disha.sharding.zero import (
    gather_partition,
    gathered_parameter,
    read_trained_values,
    write_trained_values,
)

PLAIN = (nn.Parameter, Tensor)


def is_sharded(tensor: object) -> TypeGuard[Any]:
    """Whether a tensor is a DTensor, distributed over a device mesh."""
    if type(tensor) in PLAIN:  # as almost always
        return False
    return isinstance(tensor, imported_class("torch.distributed.tensor", "DTensor"))


def gather(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its values. Collective if the tensor is sharded."""
    if not is_sharded(tensor):
        return gather_partition(tensor)
    # An offloaded parameter is on the CPU, where the mesh may be unable to communicate.
    return tensor.to(tensor.device_mesh.device_type).full_tensor()


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def reason_against_writing(parameter: Tensor, values: Tensor) -> str | None:
    """Return why `write` can't copy the values into the parameter, or None if it can."""
    if not is_sharded(values):
        if not is_sharded(parameter) or is_in_chunks(parameter):
            return None
        return (
            f"is not sharded, but the parameter is sharded as {parameter.placements}: shard it in "
            "the same way"
        )
    if not is_sharded(parameter):
        return "is sharded, but the parameter is not: gather it first (full_tensor())"
    if (values.device_mesh, values.placements) == (parameter.device_mesh, parameter.placements):
        return None
    return (
        f"is sharded as {values.placements}, must be sharded as {parameter.placements} on the "
        "parameter's mesh"
    )


def write(parameter: Tensor, values: Tensor, undo: ExitStack | None = None) -> None:
    """Copy values into a parameter in place, and let `undo` put the former values back.

    A sharded parameter takes all values, the same on all ranks, or values that are sharded like it.
    """
    if undo is not None:
        former = read_trained_values(parameter)  # in the precision in which they are trained
        if former is None:
            former = gather_partition(parameter).detach().clone()
        undo.callback(write, parameter, former)
    values = values.detach()
    if is_sharded(parameter) and not is_sharded(values):
        part = tuple(slice(start, stop) for start, stop in local_ranges(parameter))
        values = values[part]
    with gathered_parameter(parameter, writes=True):
        local_part(parameter.detach()).copy_(local_part(values))
    write_trained_values(parameter, values)


def is_in_chunks(tensor: Any) -> bool:
    """Whether `local_ranges` can tell the shards: not of a weight that is packed, such as qkv."""
    for placement in tensor.placements:
        if _cuts_chunks(placement):
            if placement.split_factor != _count_chunks(tensor, placement.dim):
                return False
        elif type(placement).__name__ not in ("Shard", "Replicate"):
            return False
    return True


def _cuts_chunks(placement: Any) -> bool:
    """Whether FSDP cuts with this what a tensor-parallel plan has left to a rank."""
    return hasattr(placement, "split_factor")


def _count_chunks(tensor: Any, dim: int) -> int:
    """Return into how many chunks a tensor is cut along a dimension before FSDP cuts each."""
    return prod(
        tensor.device_mesh.size(mesh_dim)
        for mesh_dim, placement in enumerate(tensor.placements)
        if type(placement).__name__ == "Shard" and placement.dim == dim
    )


def local_ranges(tensor: Any, coordinates: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Return the range (start, stop) of a rank's part for each dimension of a tensor.

    `coordinates` are those of the rank in the mesh, of this rank by default.
    """
    mesh = tensor.device_mesh
    if coordinates is None:
        coordinates = mesh.get_coordinate()
    ranges = [(0, size) for size in tensor.shape]
    for cuts_chunks in (False, True):  # these come last
        for mesh_dim, (coordinate, placement) in enumerate(zip(coordinates, tensor.placements)):
            if hasattr(placement, "dim") and _cuts_chunks(placement) == cuts_chunks:
                start, stop = ranges[placement.dim]
                chunk = -(-(stop - start) // mesh.size(mesh_dim))  # the last ones may be smaller
                first = min(start + coordinate * chunk, stop)
                ranges[placement.dim] = (first, min(first + chunk, stop))
    return ranges
