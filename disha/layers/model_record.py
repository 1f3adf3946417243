"""ModelRecord: all that the adapters of a model remember of it, in one place.

    what       since                         for
    layers     each injection                naming layers that the model has lost
    ties       each injection                refusing half of a tied weight
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
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import Tensor, nn

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

    @property
    def is_saved(self) -> bool:
        """Whether adapters save a change of it."""
        return isinstance(self.values, Tensor)

    def of(self, buffer: Tensor) -> FormerBuffer:
        """Return the same for another state of the buffer, such as that of the base."""
        return remember_buffer(buffer, is_saved=self.is_saved, claimant=self.claimant)

    def is_saved_with(self, adapter: str | None) -> bool:
        """Whether a change is saved with an adapter; with None, whether any adapter saves it."""
        if not self.is_saved:
            return False
        if adapter is None or self.claimant is None:
            return True
        return self.claimant == adapter

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
        # NaN differs from itself, so places that have NaN in both are left out.
        differs = (current != former) & ~(current.isnan() & former.isnan())
        return bool(differs.any())


def remember_buffer(buffer: Tensor, *, is_saved: bool, claimant: str | None = None) -> FormerBuffer:
    """Return what a record keeps of a buffer."""
    values = local_part(buffer.detach())
    return FormerBuffer(values.clone() if is_saved else checksums(values), claimant)


class ModelRecord:
    """What the adapters of one model remember. The values of its dicts are never changed."""

    def __init__(self, group: Group | None = None) -> None:
        self.group = Group() if group is None else group
        self.layers: dict[str, tuple[str, ...]] = {}  # adapter -> names of its weights
        self.ties: dict[str, tuple[str, ...]] = {}  # weight with a block -> those that borrow it
        self.flags: dict[str, Flag] = {}  # parameter -> its flag
        self.buffers: dict[str, FormerBuffer] = {}
        self.members: WeakSet[Any] = WeakSet()  # the `Adapters` of its layers

    # --- all of it -------------------------------------------------------------------------------

    def _tables(self) -> list[dict[str, Any]]:
        return [self.layers, self.ties, self.flags, self.buffers]

    def copy_tables(self) -> list[dict[str, Any]]:
        """Return what `restore_tables` takes."""
        return [dict(table) for table in self._tables()]

    def restore_tables(self, former: list[dict[str, Any]]) -> None:
        """Make the record as it was."""
        for table, content in zip(self._tables(), former):
            table.clear()
            table.update(content)

    def take_over(self, other: ModelRecord, rename: Callable[[str], str | None]) -> None:
        """Add what another record knows; `rename` gives names here, None for what is elsewhere."""
        for adapter, names in other.layers.items():
            moved = tuple(new for name in names if (new := rename(name)) is not None)
            self.layers[adapter] = (*self.layers.get(adapter, ()), *moved)
        for tied in ((weight, *borrowers) for weight, borrowers in other.ties.items()):
            if any(rename(name) is not None for name in tied):
                weight, *borrowers = [rename(name) or name for name in tied]
                self.ties[weight] = tuple(borrowers)
        for name, flag in other.flags.items():
            if (new := rename(name)) is not None:
                self.flags.setdefault(new, flag)
        for name, buffer in other.buffers.items():
            if (new := rename(name)) is not None:
                self.buffers.setdefault(new, buffer)

    def __getstate__(self) -> dict[str, Any]:
        # The layers of a copy add themselves.
        return {**vars(self), "members": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, members=WeakSet())

    # --- flags -----------------------------------------------------------------------------------

    def find_flag(self, names: Names) -> Flag | None:
        """Return what is known of a parameter."""
        return next((self.flags[name] for name in names if name in self.flags), None)

    def set_requires_grad(self, parameter: nn.Parameter, names: Names, flag: bool) -> None:
        """Set the flag of a parameter, and remember what it was at first."""
        if parameter.requires_grad == flag:
            return
        if self.find_flag(names) is None:
            self._set_flag(names, Flag(parameter.requires_grad))
        parameter.requires_grad = flag  # lazy parameters do not have requires_grad_()

    def claim_parameter(
        self, parameter: nn.Parameter, names: Names, adapter: str, flag_without: bool
    ) -> None:
        """Train a parameter together with an adapter; `flag_without` is its flag without it."""
        known = self.find_flag(names)
        original = parameter.requires_grad if known is None else known.original
        self._set_flag(names, Flag(original, adapter, flag_without))
        parameter.requires_grad = True

    def release_parameter(self, parameter: nn.Parameter, names: Names, adapter: str) -> None:
        """Give a parameter that trains with the adapter the flag that it has without it."""
        flag = self.find_flag(names)
        if flag is not None and flag.adapter == adapter:
            self._set_flag(names, Flag(flag.original))
            self.set_requires_grad(parameter, names, flag.without_adapter)

    def _set_flag(self, names: Names, flag: Flag) -> None:
        self.flags |= dict.fromkeys(names, flag)

    # --- buffers ---------------------------------------------------------------------------------

    def find_buffer(self, names: Names) -> FormerBuffer | None:
        """Return what is known of a buffer."""
        return next((self.buffers[name] for name in names if name in self.buffers), None)

    def set_buffer(self, names: Names, buffer: FormerBuffer) -> None:
        """Remember a buffer under all of its names."""
        self.buffers |= dict.fromkeys(names, buffer)

    def forget_buffer(self, names: Names) -> None:
        """Forget what a buffer was before the first adapter."""
        for name in names:
            self.buffers.pop(name, None)


class Place(NamedTuple):
    """Where a record knows a module."""

    record: ModelRecord
    name: str


class KnownNames(NamedTuple):
    """Where a record knows a parameter or a buffer, which may have several names."""

    record: ModelRecord
    names: tuple[str, ...]


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
        lists = dict[str, tuple[str, Place]]()
        for names, adapters in layers:
            for name in names:
                for above, place in _match(name, adapters.names):
                    votes[above][Place(adapters.record, place)] += 1
                    for above_list, place_list in _match_lists(above, place):
                        name_list = above.rpartition(".")[0]
                        lists[above_list] = name_list, Place(adapters.record, place_list)
        # A module with several names can match in several ways; what most layers say is right.
        self._set({above: places.most_common(1)[0][0] for above, places in votes.items()}, lists)

    def _set(self, certain: dict[str, Place], lists: dict[str, tuple[str, Place]]) -> None:
        self._places: dict[str, Place | None] = dict(certain)
        for above, (name_list, place) in lists.items():
            if above not in certain:
                self._places[above] = place
                # Its other modules have also moved, and who can tell where to.
                self._places.setdefault(name_list, None)
        self._today: dict[Place, str] = {}
        for above, known in self._places.items():
            if known is not None:
                self._today.setdefault(known, above)

    @property
    def records(self) -> list[ModelRecord]:
        """The records that know a part of the model."""
        return list(dict.fromkeys(place.record for place in self._today))

    def cover(self, record: ModelRecord, prefix: str) -> None:
        """Let one record know all modules of the model, which is `prefix` there."""
        self._set({"": Place(record, prefix)}, {})

    def find(self, name: str) -> Place | None:
        """Return where a module, or something in it, is known."""
        above = name
        while above not in self._places:
            if not above:
                return None
            above = above.rpartition(".")[0]
        place = self._places[above]
        if place is None:
            return None
        record, prefix = place
        return Place(record, join(prefix, name[len(above) :].removeprefix(".")))

    def find_all(self, names: Names) -> KnownNames | None:
        """Return where a parameter or buffer with these names is known."""
        whole = self._places.get("") if len(self._places) == 1 else None
        if whole is not None:  # as in almost every model
            record, prefix = whole
            return KnownNames(record, tuple([join(prefix, name) for name in names]))
        places = [place for name in names if (place := self.find(name)) is not None]
        if not places:
            return None
        record = places[0].record
        return KnownNames(record, tuple(place.name for place in places if place.record is record))

    def find_today(self, record: ModelRecord, name: str) -> str | None:
        """Return today's name of what a record knows by a name, or None if it is elsewhere."""
        place = name
        while Place(record, place) not in self._today:
            if not place:
                return None
            place = place.rpartition(".")[0]
        return join(self._today[Place(record, place)], name[len(place) :].removeprefix("."))


def _match_lists(name: str, known_name: str) -> list[tuple[str, str]]:
    """Return what precedes the lists that have two modules, if their names end alike."""
    parent = name.rpartition(".")[0]
    matches = _match(parent, [known_name.rpartition(".")[0]])
    return [match for match in matches if match[0] != parent]


def _match(name: str, known_names: Names) -> list[tuple[str, str]]:
    """Return what precedes the longest common end of a name and a known one, for each of these."""
    parts = name.split(".") if name else []
    best_length = 0
    matches: list[tuple[str, str]] = []
    for known_name in known_names:
        known_parts = known_name.split(".") if known_name else []
        length = 0
        while length < min(len(parts), len(known_parts)):
            if parts[-1 - length] != known_parts[-1 - length]:
                break
            length += 1
        if length < best_length:
            continue
        if length > best_length:
            best_length = length
            matches = []
        above = ".".join(parts[: len(parts) - length])
        matches.append((above, ".".join(known_parts[: len(known_parts) - length])))
    return matches
