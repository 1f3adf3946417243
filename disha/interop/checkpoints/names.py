"""Map the names in an adapter's model to the names in a checkpoint.

The weight of a layer is named `<name>.weight`; a parameter has its own name. The q, k and v of an
`nn.MultiheadAttention` are rows of `<attention>.in_proj_weight`, or `<attention>.q_proj_weight` and
so on. All names in a checkpoint may have a prefix that the adapter's model lacks (`model.` if the
adapter was trained on the inner model), or the other way round.
"""

from __future__ import annotations

import difflib
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from disha.errors import AdapterFileError
from disha.files.header import LayerRecord
from disha.files.tensors import StoredTensor
from disha.layers import PROJECTIONS
from disha.model import join

__all__ = ["Renaming", "nearest", "possible_keys", "renaming"]

PACKED = "in_proj_weight"

DEEPEST_PREFIX = 8
"""Largest number of parts in a prefix that only one of the two has."""

SEARCHED, SHOWN = 2000, 3
"""How many names `nearest` searches, and how many it returns."""


@dataclass(frozen=True)
class Renaming:
    """Maps names in the adapter's model to names in the checkpoint: replaces a prefix."""

    old: str = ""
    new: str = ""

    def __call__(self, name: str) -> str | None:
        """Return the checkpoint's name, or None for a name without the old prefix."""
        if not self.old:
            return join(self.new, name)
        rest = name.removeprefix(f"{self.old}.")
        return None if rest == name else join(self.new, rest)

    def __str__(self) -> str:
        if self.new:
            return f"with the prefix {self.new!r}"
        return f"without the prefix {self.old!r}" if self.old else "with the same names"


def possible_keys(record: LayerRecord) -> tuple[str, ...]:
    """Return the possible names of a layer's weight, as in the adapter's model."""
    owner, _, last = record.name.rpartition(".")
    own = (join(record.name, "weight"), record.name)
    if last not in PROJECTIONS:
        return own
    return (*own, join(owner, PACKED if record.rows else f"{last}_weight"))


def renaming(path: Path, stored: Collection[str], wanted: Sequence[tuple[str, ...]]) -> Renaming:
    """Return the renaming that finds all weights in a checkpoint, or else most of them.

    Unchanged names win: a prefix must find more weights than they do.

    Args:
        path: the checkpoint, for errors.
        stored: the names in it.
        wanted: the possible names of each weight.

    Raises:
        AdapterFileError: several prefixes find all of them, and the unchanged names do not.
    """
    numbers: dict[str, set[int]] = defaultdict(set)
    for number, keys in enumerate(wanted):
        for key in filter(None, keys):
            numbers[key].add(number)
    found: dict[Renaming, set[int]] = defaultdict(set)
    for key in stored:
        for new, rest in _splits(key):
            if rest in numbers:
                found[Renaming(new=new)] |= numbers[rest]
    for key in numbers:
        for old, rest in _splits(key):
            if old and rest in stored:
                found[Renaming(old=old)] |= numbers[key]
    complete = [one for one in found if len(found[one]) == len(wanted)]
    if Renaming() in complete or not complete:
        return max([Renaming(), *found], key=lambda one: len(found.get(one, ())))
    if len(complete) > 1:
        raise AdapterFileError(
            f"it is unclear which tensors of {path} the adapter changes: those "
            f"{', or those '.join(str(one) for one in complete[:3])}. Load the adapter into the "
            "model, and merge there (merge_adapters)"
        )
    return complete[0]


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Yield the prefix and the rest of a name: unsplit, then split at each of its first dots."""
    yield "", key
    parts = key.split(".", DEEPEST_PREFIX)
    for count in range(1, len(parts)):
        yield ".".join(parts[:count]), ".".join(parts[count:])


def nearest(key: str, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return a few names of the checkpoint that may be meant: in the same module, or similar."""
    owner = key.rpartition(".")[0]
    beside = (name for name in tensors if owner and name.startswith(f"{owner}."))
    among = itertools.islice(tensors, SEARCHED)
    return list(itertools.islice(beside, SHOWN)) or difflib.get_close_matches(
        key, among, SHOWN, cutoff=0.0
    )
