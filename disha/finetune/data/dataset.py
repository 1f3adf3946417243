"""From the settings to the rows to train on and those to measure on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from disha.finetune.data.files import read_file
from disha.finetune.data.folders import find_files
from disha.finetune.data.held_out import split_held_out
from disha.finetune.data.rows import Dataset, JoinedRows, Rows
from disha.finetune.data.splits import SplitPart, parse_split, split_name
from disha.finetune.errors import DataError
from disha.finetune.settings.data import DataSettings

__all__ = ["open_rows", "read_dataset"]


def read_dataset(settings: DataSettings, seed: int) -> Dataset:
    """Return the rows that the settings name.

    Args:
        settings: where rows are, which of them to use, and how many to hold out.
        seed: decides which rows are held out, where a part of them is.

    Raises:
        DataError: a file can't be read, a split is unknown or has no rows.
        MissingDependencyError: a package for a file's format is not installed.
    """
    training = open_rows(settings.data, settings.dataset_split, streaming=settings.streaming)
    if settings.eval_path is None and settings.eval_split is None:
        return split_held_out(training, settings.eval_fraction, seed)
    held_out = open_rows(
        settings.eval_path or settings.data, settings.eval_split, streaming=settings.streaming
    )
    return Dataset(training, held_out)


def open_rows(path: Path, split: str | None, *, streaming: bool) -> Rows:
    """Return rows of a data file, or of a folder of them.

    Args:
        path: the file or folder.
        split: which rows, as in ``train[:1000]``; None takes the only split there is.
        streaming: leave rows on disk until they are asked for.

    Raises:
        DataError: a file can't be read, the split is unknown or has no rows, or files hold
            different things.
        MissingDependencyError: a package for a file's format is not installed.
    """
    files = find_files(path)
    parts = parse_split(_only_split(path, files) if split is None else split)
    splits = _opened_splits(path, files, parts, streaming=streaming)
    rows = [_selected(part, splits) for part in parts]
    chosen = rows[0] if len(rows) == 1 else JoinedRows(rows)
    if not len(chosen):
        found = ", ".join(f"{name!r} has {len(rows)} rows" for name, rows in splits.items())
        raise DataError(f"the split {split!r} of {path} leaves no rows: {found}; name another")
    return chosen


def _only_split(path: Path, files: Mapping[str, Sequence[Path]]) -> str:
    if len(files) > 1 and path.is_dir():
        raise DataError(
            f"{path} holds several splits: {_quoted(files)}; say which to measure on, "
            f"as in --eval_split {min(files)}"
        )
    return next(iter(files))


def _opened_splits(
    path: Path,
    files: Mapping[str, Sequence[Path]],
    parts: Sequence[SplitPart],
    *,
    streaming: bool,
) -> dict[str, Rows]:
    opened: dict[str, Rows] = {}
    for part in parts:
        name = _known(part.name, path, files)
        if name not in opened:
            opened[name] = _joined(files[name], streaming=streaming)
    return opened


def _selected(part: SplitPart, splits: Mapping[str, Rows]) -> Rows:
    rows = splits[part.name] if part.name in splits else splits[split_name(part.name)]
    wanted = part.rows(len(rows))
    return rows if len(wanted) == len(rows) else rows[wanted.start : wanted.stop]


def _known(name: str, path: Path, files: Mapping[str, Sequence[Path]]) -> str:
    for known in (name, split_name(name)):
        if known in files:
            return known
    raise DataError(f"{path} has no split {name!r}; it has: {_quoted(files)}")


def _joined(files: Sequence[Path], *, streaming: bool) -> Rows:
    opened = [read_file(file, streaming=streaming) for file in files]
    filled = [rows for rows in opened if len(rows)]
    if not filled:
        raise DataError(f"{' and '.join(map(str, files))} hold{'s' * (len(files) == 1)} no rows")
    _require_like_fields(filled)
    return filled[0] if len(filled) == 1 else JoinedRows(filled)


def _require_like_fields(parts: Sequence[Rows]) -> None:
    firsts = [row for row in (rows[0] for rows in parts) if row.complaint is None]
    for row in firsts[1:]:
        if not row.fields.keys() & firsts[0].fields.keys():
            raise DataError(
                f"files of one split must hold like rows, but {firsts[0].place} has the fields "
                f"{_quoted(firsts[0].fields)} and {row.place} has {_quoted(row.fields)}; "
                "name one file, or move one of them to a folder of its own"
            )


def _quoted(names: Mapping[str, object]) -> str:
    return ", ".join(map(repr, names)) or "none"
