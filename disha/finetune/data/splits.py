"""The notation for splits: which rows of which part of a data set.

    train                       all rows of the split "train"
    train[:100000]              its first 100000
    train[10:20], train[-5%:]   from here to there, in rows or in hundredths
    train[:10%]+train[90%:]     several, one after another

Hundredths are rounded to the nearest row, and halves to the even one, as upstream's data library
does, so that `train[:k%]` and `train[k%:]` share no row and leave none out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from disha.finetune.errors import DataError

__all__ = ["SplitPart", "parse_split", "split_name"]

NUMBER = r"(-?)\s*(\d[\d_]{0,17})(\.\d{1,9})?\s*(%?)"
PART = re.compile(
    r"\s*(?P<name>[\w.-]+?)\s*(\[\s*(?P<start>[^:\]]*?)\s*:\s*(?P<end>[^:\]]*?)\s*\]\s*)?"
)

ALIASES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
}
NAMES = {alias: name for name, aliases in ALIASES.items() for alias in aliases}


@dataclass(frozen=True)
class Bound:
    """Where a slice begins or ends.

    Args:
        value: how many rows, or how many hundredths of all of them.
        is_percent: which of both.
        from_end: whether it is counted back from the end.
    """

    value: float
    is_percent: bool
    from_end: bool

    def row(self, count: int) -> int:
        """The number of the row, among `count` rows; cut to what there is."""
        rows = round(self.value * count / 100) if self.is_percent else int(self.value)
        return max(0, count - rows) if self.from_end else min(rows, count)


@dataclass(frozen=True)
class SplitPart:
    """Rows of one split.

    Args:
        name: the split's.
        start: the first row; None: from the beginning.
        end: the row after the last; None: to the end.
    """

    name: str
    start: Bound | None
    end: Bound | None

    def rows(self, count: int) -> range:
        """The numbers of the rows meant, when the split has `count`."""
        start = 0 if self.start is None else self.start.row(count)
        end = count if self.end is None else self.end.row(count)
        return range(start, max(start, end))


def parse_split(text: str) -> tuple[SplitPart, ...]:
    """Read the notation.

    Raises:
        DataError: it is something else; the message shows what is allowed.
    """
    return tuple(_part(part, text) for part in text.split("+"))


def split_name(name: str) -> str:
    """The usual name of a split, as validation for dev."""
    return NAMES.get(name.lower(), name)


def _part(part: str, text: str) -> SplitPart:
    match = PART.fullmatch(part)
    if match is None:
        raise _unreadable(text)
    start, end = (_bound(match[which] or "", text) for which in ("start", "end"))
    return SplitPart(match["name"], start, end)


def _bound(written: str, text: str) -> Bound | None:
    if not written:
        return None
    match = re.fullmatch(NUMBER, written)
    if match is None or (match[3] and not match[4]):
        raise _unreadable(text)
    whole = match[2].replace("_", "")
    value = float(whole + match[3]) if match[3] else int(whole)
    return Bound(value, is_percent=bool(match[4]), from_end=bool(match[1]))


def _unreadable(text: str) -> DataError:
    return DataError(
        f"{text!r} is no split; it must be a name, maybe with a range of rows or percent, as in "
        "train, train[:1000], train[10:20], train[-5%:] or train[10%:30%], or several with + "
        "between them"
    )
