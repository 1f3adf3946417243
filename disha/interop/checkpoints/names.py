"""How the names of an adapter's model become the names of a checkpoint.

A layer `<name>` has its weight under `<name>.weight`, a parameter under its own name. The q, k and
v of an `nn.MultiheadAttention` are rows of `<attention>.in_proj_weight`, or
`<attention>.q_proj_weight` and so on. All names of a checkpoint may have one more prefix than those
of the adapter's model (`model.` if the adapter was trained on the inner model), or lack one.
"""

from __future__ import annotations

import difflib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from disha.errors import AdapterFileError
from disha.files.header import LayerRecord
from disha.files.pieces import StoredTensor
from disha.interop.checkpoints.reading import Checkpoint
from disha.layers import PROJECTIONS
from disha.model import join

__all__ = ["Renaming", "nearest", "possible_keys", "renaming"]

PACKED = "in_proj_weight"

DEEPEST_PREFIX = 8
"""How many parts the prefix may have that one of the two models has more."""

SEARCHED, SHOWN = 2000, 3
"""Among how many names `nearest` looks, and how many it returns."""


@dataclass(frozen=True)
class Renaming:
    """How names of the adapter's model become names of the checkpoint: one prefix for another."""

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
            return f"names have the prefix {self.new!r} there"
        return f"names lack {self.old!r} there" if self.old else "names are the same there"


def possible_keys(record: LayerRecord) -> tuple[str, ...]:
    """Return where the weight of a layer may be, by the names of the adapter's model."""
    owner, _, last = record.name.rpartition(".")
    own = (join(record.name, "weight"), record.name)
    if last not in PROJECTIONS:
        return own
    return (*own, join(owner, PACKED if record.rows else f"{last}_weight"))


def renaming(checkpoint: Checkpoint, wanted: Sequence[tuple[str, ...]]) -> Renaming:
    """Return the renaming that leads to all weights in the checkpoint, or else to most.

    The names as they are come first: another prefix has to lead to more.

    Args:
        checkpoint: the checkpoint.
        wanted: the possible names of each weight.

    Raises:
        AdapterFileError: several prefixes lead to all of them, and the names as they are do not.
    """
    tensors = checkpoint.tensors
    numbers: dict[str, set[int]] = defaultdict(set)
    for number, keys in enumerate(wanted):
        for key in filter(None, keys):
            numbers[key].add(number)
    found: dict[Renaming, set[int]] = defaultdict(set)
    for key in tensors:
        for new, rest in _splits(key):
            if rest in numbers:
                found[Renaming(new=new)] |= numbers[rest]
    for key in numbers:
        for old, rest in _splits(key):
            if old and rest in tensors:
                found[Renaming(old=old)] |= numbers[key]
    complete = [one for one in found if len(found[one]) == len(wanted)]
    if Renaming() in complete or not complete:
        return max([Renaming(), *found], key=lambda one: len(found.get(one, ())))
    if len(complete) > 1:
        raise AdapterFileError(
            f"it is unclear which tensors of {checkpoint.path} are the adapter's: "
            f"{'; or '.join(str(one) for one in complete[:3])}. Load the adapter into the model, "
            "and merge there (merge_adapters)"
        )
    return complete[0]


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Yield a name unsplit, and then split at each of its first dots."""
    yield "", key
    parts = key.split(".", DEEPEST_PREFIX)
    for count in range(1, len(parts)):
        yield ".".join(parts[:count]), ".".join(parts[count:])


def nearest(key: str, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return a few names of the checkpoint that may be meant: those beside it, or like it."""
    owner = key.rpartition(".")[0]
    beside = (name for name in tensors if owner and name.startswith(f"{owner}."))
    among = itertools.islice(tensors, SEARCHED)
    return list(itertools.islice(beside, SHOWN)) or difflib.get_close_matches(
        key, among, SHOWN, cutoff=0.0
    )
