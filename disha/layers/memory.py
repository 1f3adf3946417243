"""What the adapters of a model remember of it: one immutable state, and where its modules are.

    in the state    written by             for
    specs           each injection         naming layers that the model has lost; refusing half of a
                                           tied weight
    flags           freezing, also_train   putting back `requires_grad`
    buffers         the first injection    saving those that training changed; putting them back
    merged          a merge                refusing what would mix merged and unmerged
    routing         each injection         refusing to route samples

Every adapted layer leads to the memory of its model (`layer.disha.memory`). To change the model is
to compute another state and to set it; the values in a state never change.

The state knows modules by their names at the last change, and `PLACES` knows each module's name
there. So a part of a model, a model inside another one, and a list that has lost modules answer
for what they were. A copy or a pickle has other modules. Its adapted layers still know their
names, so another module of it has the name that it has beside the first adapted layer. What was
put into the copy since can't be told from what was copied (`place_copy`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from disha.effective.contexts import Group
from disha.layers.fingerprints import Checksums, checksums, has_changed
from disha.layers.spec import BlockSpec
from disha.layers.value import Value
from disha.sharding.tensors import local_part
from disha.text import cut_common_end, join

Names = tuple[str, ...]
"""The names of one thing. Several, if modules share it."""


class Flag(NamedTuple):
    """What a state knows of the `requires_grad` of a parameter."""

    original: bool  # before disha first changed it
    claimant: str | None = None  # the adapter whose `also_train` names it, if one does
    without_adapter: bool = False  # its flag when that adapter is removed


class FormerBuffer(NamedTuple):
    """What a state knows of a buffer from before the first adapter."""

    values: Tensor | Checksums  # checksums stand for values that adapters do not save
    claimant: str | None = None  # the adapter whose `also_train` names it, if one does

    @classmethod
    def of(cls, buffer: Tensor, *, is_saved: bool, claimant: str | None = None) -> FormerBuffer:
        """Return what a state keeps of a buffer: its values if adapters save a change of them."""
        values = local_part(buffer.detach())
        if is_saved:
            return cls(values.clone(), claimant)
        return cls(checksums(values), claimant)

    @property
    def is_saved(self) -> bool:
        """Whether adapters save a change of it."""
        return isinstance(self.values, Tensor)

    def differs_from(self, buffer: Tensor) -> bool:
        """Whether a buffer may have changed."""
        current = local_part(buffer.detach())  # all of it: a DTensor among buffers is replicated
        if not isinstance(self.values, Tensor):
            return has_changed(current, self.values)
        if self.values.is_meta or current.is_meta:
            return True  # unknown, and saved to be safe
        former = self.values.to(current)
        if current.shape != former.shape:
            return True
        return not torch.allclose(current, former, 0, 0, equal_nan=True)


@dataclass(frozen=True)
class ModelState(Value):
    """What the adapters of a model remember of it, as a value."""

    specs: Mapping[tuple[str, str], BlockSpec] = field(default_factory=dict)
    """(adapter, name of a weight) -> the spec of its block."""
    flags: Mapping[str, Flag] = field(default_factory=dict)
    """Parameter -> its flag. A tied one stands there under each of its names."""
    buffers: Mapping[str, FormerBuffer] = field(default_factory=dict)
    merged: tuple[str, ...] = ()
    """The adapters that are merged into some layer."""
    routing: Mapping[str, str | None] = field(default_factory=dict)
    """Adapter -> why samples can't be routed to it, or None; only of those of the whole model."""

    @cached_property
    def adapters(self) -> frozenset[str]:
        """The names of the adapters."""
        return frozenset(adapter for adapter, _ in self.specs)

    def renamed(self, rename: Callable[[str], str | None]) -> ModelState:
        """Return what the state knows of a part; `rename` gives names there, or None."""
        specs = {}
        for (adapter, name), spec in self.specs.items():
            new = rename(name)
            if new is not None:
                specs[adapter, new] = spec.renamed(rename)
        return self.but(
            specs=specs, flags=_rename(self.flags, rename), buffers=_rename(self.buffers, rename)
        )

    def joined(self, other: ModelState) -> ModelState:
        """Return what this state and another one know; this one comes first."""
        return ModelState(
            {**other.specs, **self.specs},
            {**other.flags, **self.flags},
            {**other.buffers, **self.buffers},
            tuple(dict.fromkeys((*self.merged, *other.merged))),
            {**other.routing, **self.routing},
        )


def _rename(table: Mapping[str, Any], rename: Callable[[str], str | None]) -> dict[str, Any]:
    renamed = {}
    for name, known in table.items():
        new = rename(name)
        if new is not None:
            renamed[new] = known
    return renamed


class ModelMemory:
    """The state of a model's adapters, to which all of its adapted layers lead."""

    def __init__(self, group: Group | None = None) -> None:
        self.group = Group() if group is None else group  # the contexts that cover the layers
        self.state = ModelState()
        self.members: WeakSet[Any] = WeakSet()  # the `Adapters` of its layers

    def __getstate__(self) -> dict[str, Any]:
        # The layers of a copy add themselves.
        return {**vars(self), "members": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, members=WeakSet())


# --- where the modules of a model are ------------------------------------------------------------


class Place(NamedTuple):
    """What the memory of a model calls a module."""

    memory: ModelMemory
    names: Names


PLACES: WeakKeyDictionary[nn.Module, Place] = WeakKeyDictionary()
"""The modules of models that have adapters, or have had some -> what their memories call them."""


NOWHERE = Place(ModelMemory(), ())
"""The place of a module that no memory knows."""


def place_copy(names: Mapping[nn.Module, Names], layers: Iterable[tuple[nn.Module, Any]]) -> None:
    """Place the modules of a copy, if this is one, by its adapted layers.

    A layer of a copy is not placed, but its `Adapters` know its name. What that has in front of
    the end that it shares with today's name is the place of what has so much of today's name.
    """
    copied = [(layer, adapters) for layer, adapters in layers if layer not in PLACES]
    for layer, adapters in copied:
        PLACES[layer] = Place(adapters.memory, adapters.names)
    for layer, adapters in copied:
        above, above_in_memory = _cut_longest_end(names[layer], adapters.names)
        for module, todays_names in names.items():
            below = [name for name in todays_names if is_below(name, above)]
            if below and module not in PLACES:
                moved = tuple(move(name, above, above_in_memory) for name in below)
                PLACES[module] = Place(adapters.memory, moved)


def _cut_longest_end(names: Names, names_in_memory: Names) -> tuple[str, str]:
    """Return what precedes the end that two of the names share, where most of today's is shared."""
    starts = [cut_common_end(name, in_memory) for name in names for in_memory in names_in_memory]
    above, above_in_memory = min(starts, key=lambda start: len(start[0]))
    return ".".join(above), ".".join(above_in_memory)


def walk_up(name: str) -> Iterator[str]:
    """Yield a name, and those of all that contains it."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def is_below(name: str, above: str) -> bool:
    """Whether a name is that of a module, or of something in it."""
    return not above or name == above or name.startswith(f"{above}.")


def move(name: str, above: str, new_above: str) -> str:
    """Return a name below `above` as it is below `new_above`."""
    return join(new_above, name[len(above) :].removeprefix("."))
