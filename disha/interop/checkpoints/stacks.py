"""Stacks of experts whose matrices a checkpoint stores one by one.

Many models of `transformers` join the experts of a layer as they load a checkpoint. The matrices
`experts.0.gate_proj.weight`, `experts.0.up_proj.weight`, `experts.1.gate_proj.weight` and so on
become one parameter `experts.gate_up_proj` of shape (expert, out, in). An adapter names the stack,
so this module gives the checkpoint the names of its stacks too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from disha.files.tensors import StoredTensor
from disha.interop.checkpoints.reading import Checkpoint
from disha.interop.experts import DOWN, FAMILIES, GATE_UP, SEPARATE_BEFORE, by_expert, renamed

__all__ = ["Part", "Stack", "stacks_of"]

_WEIGHT = ".weight"
_FAMILIES = {one.gate: one for one in FAMILIES.values() if one.layout == SEPARATE_BEFORE}


class Part(NamedTuple):
    """The place of a stored matrix in a stack.

    Attributes:
        stack: the name of the stack.
        expert: the number of the expert.
        first: the first of its rows in the expert's matrix.
        last: the row after the last one.
    """

    stack: str
    expert: int
    first: int
    last: int


@dataclass(frozen=True)
class Stack:
    """A stack (expert, out, in) that a checkpoint stores as single matrices.

    Attributes:
        names: for each expert, the tensors whose rows, one after the other, are its matrix.
        stored: the tensors of the first expert. Those of all others have the same shapes and dtype.
    """

    names: tuple[tuple[str, ...], ...]
    stored: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> str:
        """The name of its dtype in the files."""
        return self.stored[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape: (expert, out, in)."""
        rows = sum(one.shape[0] for one in self.stored)
        return len(self.names), rows, self.stored[0].shape[1]

    def parts(self, name: str) -> Iterator[tuple[str, Part]]:
        """Yield each of its tensors with its place.

        Args:
            name: the name of the stack.
        """
        for expert, names in enumerate(self.names):
            first = 0
            for key, one in zip(names, self.stored, strict=True):
                yield key, Part(name, expert, first, first + one.shape[0])
                first += one.shape[0]

    def matrix(self, checkpoint: Checkpoint, expert: int) -> Tensor:
        """Return the matrix (out, in) of one expert.

        Args:
            checkpoint: where it is stored.
            expert: its number.
        """
        return torch.cat([checkpoint.tensor(name) for name in self.names[expert]])

    def tensor(self, checkpoint: Checkpoint) -> Tensor:
        """Return the stack (expert, out, in).

        Args:
            checkpoint: where it is stored.
        """
        return torch.stack([self.matrix(checkpoint, one) for one in range(len(self.names))])

    def values_at(self, checkpoint: Checkpoint, positions: Tensor) -> Tensor:
        """Return the values at flat positions (n,) of the stack, without reading all of it.

        Args:
            checkpoint: where it is stored.
            positions: the positions.
        """
        values = []
        for position in positions.tolist():
            expert, rest = divmod(position, math.prod(self.shape[1:]))
            for name, one in zip(self.names[expert], self.stored, strict=True):
                size = math.prod(one.shape)
                if 0 <= rest < size:
                    with checkpoint.file_of(name) as file:
                        values.append(file.values_at(name, torch.tensor([rest], device="cpu")))
                rest -= size
        return torch.cat(values)


def stacks_of(checkpoint: Checkpoint) -> dict[str, Stack]:
    """Return stack's name in the model -> the stack, for all experts that are stored one by one.

    Experts of which a matrix is missing, or has another shape than the others, are no stack.

    Args:
        checkpoint: the checkpoint.
    """
    weights = (key for key in checkpoint.tensors if key.endswith(_WEIGHT))
    modules = by_expert(key.removesuffix(_WEIGHT) for key in weights)
    found = {}
    for module, projections in modules.items():
        family = next((one for gate, one in _FAMILIES.items() if gate in projections), None)
        if family is None:
            continue
        home = renamed(module, family.block, "mlp")
        for last, names in ((GATE_UP, (family.gate, family.up)), (DOWN, (family.down,))):
            stack = _stack(checkpoint.tensors, [projections.get(name, {}) for name in names])
            if stack is not None:
                found[f"{home}.{last}"] = stack
    return found


def _stack(
    tensors: Mapping[str, StoredTensor], projections: Sequence[Mapping[int, str]]
) -> Stack | None:
    """Return the stack of some projections, each expert -> layer; None if they are not one."""
    count = len(projections[0])
    if not count or any(set(one) != set(range(count)) for one in projections):
        return None
    names = tuple(tuple(one[expert] + _WEIGHT for one in projections) for expert in range(count))
    kinds = {tuple((tensors[key].dtype, tensors[key].shape) for key in some) for some in names}
    (kind, *others) = kinds
    alike = not others and len({(dtype, shape[1:]) for dtype, shape in kind}) == 1
    if not alike or len(kind[0][1]) != 2:
        return None
    return Stack(names, tuple(tensors[key] for key in names[0]))
