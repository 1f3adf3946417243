"""NamesInRecords: what the records call the modules of a model, or of a part of one.

A record keeps the names that modules had at the injection (`model_record`). The names of an adapted
layer, today and in its record, end alike. What precedes the end says how all modules beside the
layer are called in the record:

    today              in the record      so
    layers.0.proj      layers.0.proj      the names have not changed
    proj               layers.0.proj      "" is layers.0: a part of the model
    net.layers.0.proj  layers.0.proj      net is "": the model is in another
    layers.0.proj      layers.2.proj      layers.0 is layers.2: a list has lost two modules,
                                          and is itself where it was
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from disha.layers.model_record import ModelRecord
from disha.text import cut_common_end, join

Names = Collection[str]
"""The names of one thing. Several, if modules share it."""


class NameInRecord(NamedTuple):
    """What a record calls a module, a parameter or a buffer."""

    record: ModelRecord
    name: str


class NamesInRecords:
    """Finds what records call the modules of a model, by the names of its adapted layers."""

    def __init__(self, layers: Iterable[tuple[Names, Any]]) -> None:
        """Take today's names of each layer, and its `Adapters`."""
        votes = defaultdict[str, Counter[NameInRecord]](Counter)
        for names, adapters in layers:
            for name in names:
                for above, above_in_record in _match(name, adapters.names):
                    votes[above][NameInRecord(adapters.record, above_in_record)] += 1
        # A module with several names can match in several ways; what most layers say is right.
        found = {above: known.most_common(1)[0][0] for above, known in votes.items()}
        self._set({**_find_lists(found), **found})

    def _set(self, known: Mapping[str, NameInRecord | None]) -> None:
        self._known = known
        # As in almost every model, one name may tell all that are below it. It is asked first,
        # because an injection takes 1.13 of the time without.
        self._model = known.get("") if len(known) == 1 else None
        self._today: dict[NameInRecord, str] = {}
        for above, in_record in known.items():
            if in_record is not None:
                self._today.setdefault(in_record, above)

    @property
    def records(self) -> list[ModelRecord]:
        """The records that know a part of the model."""
        return list({in_record.record: None for in_record in self._today})

    def cover(self, model: NameInRecord) -> None:
        """Let one record know all modules of the model, and call the model so."""
        self._set({"": model})

    def find(self, name: str) -> NameInRecord | None:
        """Return what a record calls a module, or something in it; None if none knows it."""
        for above in _walk_up(name):
            if above in self._known:
                known = self._known[above]
                if known is None:
                    return None
                return NameInRecord(known.record, _move(name, above, known.name))
        return None

    def find_all(self, names: Names) -> list[NameInRecord]:
        """Return what a record calls a thing that has these names; empty if none knows it."""
        if self._model is not None:
            record, above = self._model
            return [NameInRecord(record, join(above, name)) for name in names]
        found = [known for known in map(self.find, names) if known is not None]
        return [known for known in found if known.record is found[0].record]

    def find_today(self, record: ModelRecord, name: str) -> str | None:
        """Return today's name of what a record knows by a name, or None if it is elsewhere."""
        for above in _walk_up(name):
            today = self._today.get(NameInRecord(record, above))
            if today is not None:
                return _move(name, above, today)
        return None


def _find_lists(found: Mapping[str, NameInRecord]) -> dict[str, NameInRecord | None]:
    """Return what lists tell that have lost modules, if nothing else tells where the model is.

    Such a list is where it was. Its other modules have also moved, and who can tell where to: what
    is in the list has no name in the record.
    """
    lists: dict[str, NameInRecord | None] = {}
    if "" in found:
        return lists
    for above, known in found.items():
        name_of_list = above.rpartition(".")[0]
        has_moved = above != known.name and name_of_list == known.name.rpartition(".")[0]
        if has_moved and name_of_list:
            lists[name_of_list] = None
            lists[""] = NameInRecord(known.record, "")
    return lists


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
    """Return what precedes the longest end that a name shares with a known one, in both."""
    starts = [cut_common_end(name, known_name) for known_name in known_names]
    shortest = min(len(start) for start, _ in starts)
    return [
        (".".join(start), ".".join(known_start))
        for start, known_start in starts
        if len(start) == shortest
    ]
