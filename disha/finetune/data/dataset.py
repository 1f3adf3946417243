"""Finds the training rows and the held-out rows that the settings ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from disha.finetune.data.files import read_file
from disha.finetune.data.order import permutation
from disha.finetune.data.rows import Dataset, RowFile, Rows
from disha.finetune.data.splits import find_files, parse_split, split_name
from disha.finetune.errors import DataError
from disha.finetune.settings import DataSettings, RowSettings

__all__ = ["open_rows", "read_dataset", "read_rows", "split_held_out"]


def read_dataset(settings: DataSettings, seed: int) -> Dataset:
    """Return the rows that the settings name.

    Args:
        settings: where rows are, which of them to use, and how many to hold out.
        seed: decides which rows are held out, if a fraction of them is.

    Raises:
        DataError: a file can't be read, or a split is unknown or has no rows.
        MissingPackageError: a package for a file's format is not installed.
    """
    training = _opened(settings)
    if settings.eval_path is not None:
        held_out = [open_rows(settings.eval_path, settings.eval_split)]
    elif settings.eval_split is not None:
        held_out = _opened(settings, settings.eval_split)
    else:
        parts = [split_held_out(rows, settings.eval_fraction, seed) for rows in training]
        training = [part.training for part in parts]
        held_out = [part.held_out for part in parts]
    names = [one.fields for one in settings.sets]
    return Dataset(Rows.joined(training, names), Rows.joined(held_out, names))


def read_rows(settings: RowSettings) -> Rows:
    """Return the rows of all data sets that the settings name.

    Raises:
        DataError: a file can't be read, or a split is unknown or has no rows.
        MissingPackageError: a package for a file's format is not installed.
    """
    return Rows.joined(_opened(settings), [one.fields for one in settings.sets])


def _opened(settings: RowSettings, split: str | None = None) -> list[Rows]:
    """Return the rows of each data set: of the given split, or else of its own."""
    return [open_rows(one.path, split or one.split) for one in settings.sets]


def open_rows(path: Path, split: str | None) -> Rows:
    """Return rows of a data file, or of a folder of data files.

    Args:
        path: the file or folder.
        split: which rows, as in ``train[:1000]``; None takes the only split.

    Raises:
        DataError: a file can't be read, the split is unknown or has no rows, or the files of a
            split have no field in common.
        MissingPackageError: a package for a file's format is not installed.
    """
    files = find_files(path)
    parts = parse_split(_only_split(path, files) if split is None else split)
    names = [_known(part.name, path, files) for part in parts]
    opened = {name: [read_file(file) for file in files[name]] for name in dict.fromkeys(names)}
    numbers: dict[str, range] = {}
    count = 0
    for name, members in opened.items():
        _require_rows_alike(members, files[name])
        numbers[name] = range(count, count + sum(map(len, members)))
        count = numbers[name].stop
    chosen = [part.of(numbers[name]) for name, part in zip(names, parts, strict=True)]
    rows = Rows(list(chain.from_iterable(opened.values())))
    # One range of rows takes no memory; several take 8 bytes a row.
    selected = Rows(rows.files, chosen[0]) if len(chosen) == 1 else rows.select(chain(*chosen))
    if not len(selected):
        found = ", ".join(f"{name!r} has {len(its)} rows" for name, its in numbers.items())
        raise DataError(f"the split {split!r} of {path} leaves no rows: {found}; name another")
    return selected


def split_held_out(rows: Rows, fraction: float, seed: int) -> Dataset:
    """Set a random part of the rows aside. Both parts keep their order, and no row is read.

    Args:
        rows: the rows to divide.
        fraction: how much to hold out: at least 0, and less than 1. It is rounded to whole rows,
            and to at least one row unless it is 0.
        seed: decides which rows.

    Raises:
        DataError: no row would be left to train on.
    """
    if fraction == 0:
        return Dataset(rows, rows[:0])
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise DataError(
            f"holding out {fraction:g} of {len(rows)} rows leaves none to train on; "
            "give more rows or a smaller --eval_fraction"
        )
    held_out = bytearray(len(rows))
    for index in permutation(len(rows), seed)[:count]:
        held_out[index] = True
    training, measured = (
        rows.select(index for index, is_held_out in enumerate(held_out) if is_held_out == wanted)
        for wanted in (False, True)
    )
    return Dataset(training, measured)


def _only_split(path: Path, files: Mapping[str, Sequence[Path]]) -> str:
    if len(files) > 1 and path.is_dir():
        raise DataError(
            f"{path} holds several splits: {_quoted(files)}; say which to measure on, "
            f"as in --eval_split {min(files)}"
        )
    return next(iter(files))


def _known(name: str, path: Path, files: Mapping[str, Sequence[Path]]) -> str:
    for known in (name, split_name(name)):
        if known in files:
            return known
    raise DataError(f"{path} has no split {name!r}; it has: {_quoted(files)}")


def _require_rows_alike(files: Sequence[RowFile], paths: Sequence[Path]) -> None:
    """Check that the files of a split have rows, and that their first rows share a field."""
    firsts = [next(iter(file)) for file in files if len(file)]
    if not firsts:
        raise DataError(f"{' and '.join(map(str, paths))} hold{'s' * (len(paths) == 1)} no rows")
    readable = [row for row in firsts if row.complaint is None]
    for row in readable[1:]:
        if not row.fields.keys() & readable[0].fields.keys():
            raise DataError(
                f"files of one split must share a field, but {readable[0].place} has the fields "
                f"{_quoted(readable[0].fields)} and {row.place} has {_quoted(row.fields)}; "
                "name one file, or move one of them to a folder of its own"
            )


def _quoted(names: Iterable[object]) -> str:
    return ", ".join(map(repr, names)) or "none"
