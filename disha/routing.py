"""Which adapter each sample of a batch goes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from disha.errors import ArgumentError
from disha.text import counted

__all__ = ["Route", "Run"]


class Run(NamedTuple):
    """Entries `start` to `stop` of a leading dimension, which go through one adapter, or none."""

    adapter: str | None
    start: int
    stop: int


@dataclass(frozen=True)
class Route:
    """An adapter for each sample of a batch, or None for no adapter.

    A layer may get the samples flattened. Then the leading size of its input is a multiple of the
    number of samples, and each name covers an equal part, in order.
    """

    names: tuple[str | None, ...]
    _kept: dict[tuple[tuple[int, ...], torch.device], Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters of the route, each once."""
        return tuple(dict.fromkeys(name for name in self.names if name is not None))

    def parts(self, size: int) -> int:
        """Return how many entries of a leading dimension of this size each name covers.

        Raises:
            ArgumentError: the size is not a multiple of the number of names.
        """
        samples = len(self.names)
        if size % samples:
            raise ArgumentError(
                f"route_adapters got {counted(samples, 'name')}, but a layer got an input with the "
                f"leading size {size}; it must be a multiple of the number of names, so give one "
                "name for each sample of the batch"
            )
        return size // samples

    @property
    def is_uniform(self) -> bool:
        """Whether all samples have the same adapter, or none."""
        return len(set(self.names)) == 1

    def runs(self, size: int) -> list[Run]:
        """Return the runs along a leading dimension, in the order of the samples.

        An adapter may have several runs.
        """
        return self._runs_of(self.names, self.parts(size))

    def sorted_runs(self, size: int) -> list[Run]:
        """Return the runs after sorting by adapter: one for each, and one without adapter last.

        `order` returns the indices that sort.
        """
        return self._runs_of([self.names[i] for i in self._sorted], self.parts(size))

    def order(self, size: int, device: torch.device) -> Tensor:
        """Return the indices along a leading dimension that sort it by adapter."""
        parts = self.parts(size)
        indices = (range(sample * parts, (sample + 1) * parts) for sample in self._sorted)
        return self._on_device(tuple(i for part in indices for i in part), device)

    @property
    def _sorted(self) -> tuple[int, ...]:
        place = {adapter: index for index, adapter in enumerate(self.adapters)}
        order = sorted(
            range(len(self.names)), key=lambda i: place.get(self.names[i] or "", len(place))
        )
        return tuple(order)

    @staticmethod
    def _runs_of(names: Sequence[str | None], parts: int) -> list[Run]:
        runs, start = [], 0
        for name, same in groupby(names):
            stop = start + parts * len(list(same))
            runs.append(Run(name, start, stop))
            start = stop
        return runs

    def rows(self, adapter: str, size: int, device: torch.device) -> Tensor:
        """Return the indices along a leading dimension that go through an adapter."""
        parts = self.parts(size)
        starts = (sample * parts for sample, name in enumerate(self.names) if name == adapter)
        return self._on_device(tuple(r for s in starts for r in range(s, s + parts)), device)

    def choices(self, adapters: Sequence[str], device: torch.device) -> Tensor:
        """Return the index of each sample's adapter, or the number of adapters for no adapter."""
        order = {adapter: index for index, adapter in enumerate(adapters)}
        chosen = (
            len(order) if name is None else order.get(name, len(order)) for name in self.names
        )
        return self._on_device(tuple(chosen), device)

    def _on_device(self, indices: tuple[int, ...], device: torch.device) -> Tensor:
        # Kept because every layer needs the same indices, and a captured graph can't copy them.
        key = (indices, device)
        if key not in self._kept:
            with torch.inference_mode(False):
                self._kept[key] = torch.tensor(indices, dtype=torch.int64, device=device)
        return self._kept[key]
