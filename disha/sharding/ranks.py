"""The ranks that hold the shards of a model: they fail together, and one of them writes files.

Gathering is collective, so no rank may raise an error alone while the others wait for it. Code that
can fail runs inside `Ranks.fail_together`, which raises the error on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from disha import errors
from disha.errors import ArgumentError, DishaError
from disha.sharding.tensors import is_sharded
from disha.sharding.zero import is_partitioned


class Ranks:
    """The ranks that hold the shards of a model; only this process if the model is not sharded."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        meshes = dict.fromkeys(p.device_mesh for p in parameters if is_sharded(p))
        groups = [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]
        groups += [p.ds_process_group for p in parameters if is_partitioned(p)]
        self.groups = tuple(dict.fromkeys(groups))
        # Only the first rank writes files.
        self.writes = not any(torch.distributed.get_rank(group) for group in self.groups)

    @contextmanager
    def fail_together(self, action: str) -> Iterator[None]:
        """Run the body; if it raises on any rank, raise on all ranks. It must not be collective."""
        if not self.groups:
            yield
            return
        problem = None
        try:
            yield
        except Exception as error:
            problem = error
        kind = None if problem is None else type(problem).__name__
        reports = self._exchange((torch.distributed.get_rank(), action, kind, str(problem)))
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

    def _exchange(self, report: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Return the reports of all ranks."""
        reports = [report]
        for group in self.groups:
            theirs: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(theirs, reports, group)
            reports = list(dict.fromkeys(report for many in theirs for report in many))
        return reports
