"""ModelRecord: all that the adapters of a model remember of it, in one place.

    what       since                         for
    layers     each injection                naming layers that the model has lost; refusing half of
                                             a tied weight
    flags      its flag was first changed    putting back `requires_grad`; `also_train`
    buffers    the first injection           saving those that training changed; putting them back
    group      the first injection           the contexts that cover the layers
    members    they were made                knowing that the last adapter has gone

Every adapted layer leads to the record of its model (`layer.disha.record`), and knows its own names
there. A record holds no module and no parameter, only their names at the injection. So it is found
from any part of the model, and copies and pickles of a part have it without the rest.
`NamesInRecords` tells what it calls today's modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from disha.effective.contexts import Group
from disha.layers.fingerprints import Checksums, checksums, has_changed
from disha.sharding.tensors import local_part


class Flag(NamedTuple):
    """What a record knows of the `requires_grad` of a parameter."""

    original: bool  # before disha first changed it
    claimant: str | None = None  # the adapter whose `also_train` names it, if one does
    without_adapter: bool = False  # its flag when that adapter is removed


class FormerBuffer(NamedTuple):
    """What a record knows of a buffer from before the first adapter (`model.buffers`)."""

    values: Tensor | Checksums  # checksums stand for values that adapters do not save
    claimant: str | None = None  # the adapter whose `also_train` names it, if one does

    @classmethod
    def of(cls, buffer: Tensor, *, is_saved: bool, claimant: str | None = None) -> FormerBuffer:
        """Return what a record keeps of a buffer: its values if adapters save a change of them."""
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


class ModelRecord:
    """What the adapters of one model remember. The values of its dicts are never changed."""

    def __init__(self, group: Group | None = None) -> None:
        self.group = Group() if group is None else group
        # (adapter, weight with a block of it) -> the tied parameters that borrow the block
        self.layers: dict[tuple[str, str], tuple[str, ...]] = {}
        self.flags: dict[str, Flag] = {}  # parameter -> its flag
        self.buffers: dict[str, FormerBuffer] = {}
        self.members: WeakSet[Any] = WeakSet()  # the `Adapters` of its layers

    def copy_tables(self) -> dict[str, Any]:
        """Return what the record knows now, as `vars(record).update` takes it."""
        return {name: dict(table) for name, table in vars(self).items() if isinstance(table, dict)}

    def take_over(self, other: ModelRecord, rename: Callable[[str], str | None]) -> None:
        """Add what another record knows; `rename` gives names here, None for what is elsewhere."""
        for (adapter, weight), tied in other.layers.items():
            new, *borrowers = map(rename, (weight, *tied))
            if new is not None:
                known_here = tuple(name for name in borrowers if name is not None)
                self.layers[adapter, new] = known_here
        for table in ("flags", "buffers"):
            for name, known in vars(other)[table].items():
                new = rename(name)
                if new is not None:
                    vars(self)[table].setdefault(new, known)

    def __getstate__(self) -> dict[str, Any]:
        # The layers of a copy add themselves.
        return {**vars(self), "members": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, members=WeakSet())
