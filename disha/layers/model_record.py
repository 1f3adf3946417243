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
`Places` finds the names of today's modules in it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from disha.effective.contexts import Group
from disha.layers.fingerprints import Checksums, checksums, has_changed
from disha.sharding.tensors import local_part
from disha.text import join

Names = Collection[str]
"""The names of one thing in a record. Several, if modules share it."""


class Flag(NamedTuple):
    """What a record knows of the `requires_grad` of a parameter."""

    original: bool  # before disha first changed it
    adapter: str | None = None  # the adapter that it trains with, if `also_train` named it
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


class Place(NamedTuple):
    """Where a record knows a module."""

    record: ModelRecord
    name: str


class KnownNames(NamedTuple):
    """Where a record knows a parameter or a buffer, which may have several names."""

    record: ModelRecord
    names: tuple[str, ...]

    def find(self, table: str) -> Any:
        """Return what a table of the record has for it, or None."""
        known = vars(self.record)[table]
        for name in self.names:
            if name in known:
                return known[name]
        return None

    def set(self, table: str, value: Any) -> None:
        """Let a table of the record have a value for it, under all of its names."""
        vars(self.record)[table] |= dict.fromkeys(self.names, value)


class Places:
    """Finds the modules of a model, or of a part of one, in the records of its layers.

    The names of an adapted layer, today and in its record, end alike. What precedes the end says
    how all modules beside the layer are called in the record:

        today              in the record      so
        layers.0.proj      layers.0.proj      the names have not changed
        proj               layers.0.proj      "" is layers.0: a part of the model
        net.layers.0.proj  layers.0.proj      net is "": the model is in another
        layers.0.proj      layers.2.proj      layers.0 is layers.2: a list has lost two modules,
                                              and is itself where it was
    """

    def __init__(self, layers: Iterable[tuple[Names, Any]]) -> None:
        """Take today's names of each layer, and its `Adapters`."""
        votes = defaultdict[str, Counter[Place]](Counter)
        for names, adapters in layers:
            for name in names:
                for above, above_known in _match(name, adapters.names):
                    votes[above][Place(adapters.record, above_known)] += 1
        # A module with several names can match in several ways; what most layers say is right.
        places = {above: places.most_common(1)[0][0] for above, places in votes.items()}
        self._set({**_places_of_lists(places), **places})

    def _set(self, places: Mapping[str, Place | None]) -> None:
        self._places = places
        # As in almost every model, one place may tell of all that is in it. It is asked first,
        # because an injection takes 1.13 of the time without.
        self._whole = places.get("") if len(places) == 1 else None
        self._today: dict[Place, str] = {}
        for above, place in places.items():
            if place is not None:
                self._today.setdefault(place, above)

    @property
    def records(self) -> list[ModelRecord]:
        """The records that know a part of the model."""
        return list({place.record: None for place in self._today})

    def cover(self, place: Place) -> None:
        """Let one record know all modules of the model, which is at that place."""
        self._set({"": place})

    def find(self, name: str) -> Place | None:
        """Return where a module, or something in it, is known."""
        for above in _walk_up(name):
            if above in self._places:
                place = self._places[above]
                if place is None:
                    return None
                return Place(place.record, _move(name, above, place.name))
        return None

    def find_all(self, names: Names) -> KnownNames | None:
        """Return where a parameter or buffer with these names is known."""
        whole = self._whole
        if whole is not None:
            if whole.name:
                names = [join(whole.name, name) for name in names]
            return KnownNames(whole.record, tuple(names))
        places = [place for place in map(self.find, names) if place is not None]
        if not places:
            return None
        record = places[0].record
        return KnownNames(record, tuple(place.name for place in places if place.record is record))

    def find_today(self, record: ModelRecord, name: str) -> str | None:
        """Return today's name of what a record knows by a name, or None if it is elsewhere."""
        for above in _walk_up(name):
            today = self._today.get(Place(record, above))
            if today is not None:
                return _move(name, above, today)
        return None


def _places_of_lists(places: Mapping[str, Place]) -> dict[str, Place | None]:
    """Return what lists tell that have lost modules, if nothing else tells where the model is.

    Such a list is where it was. Its other modules have also moved, and who can tell where to: so
    these have no place.
    """
    found: dict[str, Place | None] = {}
    if "" in places:
        return found
    for above, place in places.items():
        name_of_list = above.rpartition(".")[0]
        has_moved = above != place.name and name_of_list == place.name.rpartition(".")[0]
        if has_moved and name_of_list:
            found[name_of_list] = None
            found[""] = Place(place.record, "")
    return found


def _walk_up(name: str) -> Iterator[str]:
    """Yield a name, and those of all that contains it."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _move(name: str, above: str, new_above: str) -> str:
    """Return a name below `above` as it is below `new_above`."""
    return join(new_above, name[len(above) :].removeprefix("."))


def _match(name: str, known_names: Names) -> list[tuple[str, str]]:
    """Return what precedes the longest common end of a name and a known one, for each of these."""
    parts = name.split(".")
    matches = defaultdict[int, list[tuple[str, str]]](list)
    for known_name in known_names:
        known_parts = known_name.split(".")
        length = 0
        for part, known_part in zip(reversed(parts), reversed(known_parts)):
            if part != known_part:
                break
            length += 1
        above = ".".join(parts[: len(parts) - length])
        matches[length].append((above, ".".join(known_parts[: len(known_parts) - length])))
    return matches[max(matches)]
