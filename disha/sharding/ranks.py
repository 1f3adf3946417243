"""The ranks that hold the shards of a model: they fail together, and one of them writes files.

Gathering is collective, so a rank that raises an error alone leaves the others waiting for it. Code
that can fail runs inside `Ranks.fail_together`, which raises the error on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from disha import errors
from disha.errors import ArgumentError, DishaError
from disha.sharding.tensors import is_sharded
from disha.sharding.zero import is_partitioned


def broadcast(tensor: Tensor, groups: Iterable[Any]) -> None:
    """Write the values of the first rank into the tensor of every rank of groups. Collective."""
    for group in groups:
        source = torch.distributed.get_global_rank(group, 0)
        torch.distributed.broadcast(tensor.detach(), source, group=group)


@contextmanager
def random_numbers_by_input(
    mesh: Any, placements: Sequence[Any], device: torch.device
) -> Iterator[None]:
    """Run the body with the same random numbers on ranks of a mesh that hold the same inputs.

    Those that hold other inputs get other numbers. Collective if any ranks hold the same ones.
    Checkpointing runs it again with the same numbers: they follow from torch's generator.
    """
    seed = torch.randint(2**62, ()).to(mesh.device_type)
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    broadcast(seed, [group for group, own in zip(groups, placements) if own.is_replicate()])
    others = [
        torch.distributed.get_rank(group)
        for group, own in zip(groups, placements)
        if not own.is_replicate()
    ]
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(hash((int(seed), *others)))
        yield


class Ranks:
    """The ranks that hold the shards of a model; only this process if the model is not sharded."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        groups = []
        self.mesh: Any = None  # of the first DTensor
        for parameter in parameters:
            if is_sharded(parameter):
                mesh = parameter.device_mesh
                self.mesh = self.mesh or mesh
                groups += [mesh.get_group(dim) for dim in range(mesh.ndim)]
            if is_partitioned(parameter):
                groups.append(parameter.ds_process_group)
        self.groups = tuple(dict.fromkeys(groups))  # each once, in the same order on all ranks
        # Only the first rank writes files.
        self.writes = all(torch.distributed.get_rank(group) == 0 for group in self.groups)

    @contextmanager
    def fail_together(self, action: str) -> Iterator[None]:
        """Run the body; if it raises on any rank, raise on all ranks. It must not be collective."""
        if not self.groups:
            yield
            return
        error_here = None
        try:
            yield
        except Exception as error:
            error_here = error
        rank_here = torch.distributed.get_rank()
        error_name = None if error_here is None else type(error_here).__name__
        reports = self._exchange((rank_here, action, error_name, str(error_here)))
        if error_here is not None:
            raise error_here
        for rank, action_there, error_name, message in reports:
            if action_there != action:
                raise ArgumentError(
                    f"rank {rank} was asked to {action_there}, but rank {rank_here} to {action}. A "
                    "sharded model needs the same call on all ranks"
                )
            if error_name is not None:
                error_class = getattr(errors, error_name, DishaError)
                raise error_class(f"on rank {rank}: {message}")

    def _exchange(self, report: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Return the reports of all ranks."""
        reports = [report]
        for group in self.groups:
            reports_by_rank: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(reports_by_rank, reports, group)
            reports = list(dict.fromkeys(chain.from_iterable(reports_by_rank)))  # each once
        return reports
