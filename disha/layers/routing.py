"""Which adapter each sample of a batch goes through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from disha.errors import ArgumentError

__all__ = ["Route"]


@dataclass(frozen=True)
class Route:
    """One adapter, or None for none, per sample of a batch.

    A layer may see the samples flattened, so that the leading size of its input is a multiple of
    their number: each name then covers an equal part, in order.
    """

    names: tuple[str | None, ...]

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters in use, each once."""
        return tuple(dict.fromkeys(name for name in self.names if name is not None))

    def rows(self, adapter: str, input: Tensor) -> Tensor:
        """Return the indices along the input's leading dimension that go through an adapter.

        Raises:
            ArgumentError: the leading size is no multiple of the number of names.
        """
        size, samples = input.shape[0], len(self.names)
        if size % samples:
            raise ArgumentError(
                f"route_adapters got {samples} names, and a layer an input of leading size {size}, "
                "which is no multiple of it; give one name per sample of the batch"
            )
        chosen = torch.tensor([name == adapter for name in self.names], device=input.device)
        return chosen.repeat_interleave(size // samples).nonzero().squeeze(1)
