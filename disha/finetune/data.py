"""The rows of a run: read by `datasets`, brought into form, mixed, and some held out."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    Features,
    Json,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError

from disha.errors import ArgumentError
from disha.finetune.arguments import DataArguments, TrainingArguments
from disha.finetune.forms import form_rows
from disha.text import first_few

CHECKED_ROWS = 64
"""How many training rows stand for held-out rows where none are given."""

SUFFIXES = (".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tsv", ".txt")
"""How the files of rows in a folder end."""

TEXT = Value("string")
AS_WRITTEN = {"csv": TEXT, "json": Json()}
"""A format whose values `datasets` may take for others -> the kind that keeps them."""


def make_rows(
    data: DataArguments, training: TrainingArguments, tokenizer: Any
) -> tuple[Dataset, Dataset]:
    """Return the rows to train on, mixed, and those to measure, in the forms that trl trains."""
    splits = data.dataset_split
    if len(splits) == 1:
        splits = splits * len(data.data)
    if len(splits) != len(data.data):
        raise ArgumentError("give one --dataset_split for all data, or one for each")

    def read(name: str, split: str) -> Dataset:
        rows = load_rows(name, split, data.dataset_config)
        return form_rows(rows, data.dataset_field, tokenizer, learn_all=training.learns_all)

    sets = list(map(read, data.data, splits))
    held_out: list[Dataset] = []
    if data.eval_data or data.eval_split:
        names = [data.eval_data] if data.eval_data else data.data
        held_out = [read(name, data.eval_split or "train") for name in names]
    elif data.eval_fraction:
        # Before rows are drawn by weight: a row that is drawn twice must not be in both parts.
        parts = [rows.train_test_split(data.eval_fraction, seed=training.seed) for rows in sets]
        sets = [part["train"] for part in parts]
        held_out = [part["test"] for part in parts]
    rows = mix_rows(sets, data.data_weights, training.seed)
    if held_out:
        return rows, mix_rows(held_out, (), training.seed)
    return rows, rows.select(range(min(len(rows), CHECKED_ROWS)))


def load_rows(data: str, split: str = "train", config: str | None = None) -> Dataset:
    """Return the rows of a file, a glob, a folder or a data set; `split` is as in `datasets`."""
    is_folder = Path(data).is_dir()
    files = sorted(glob.glob(data))
    if Path(data).is_file():  # a name may hold [ or *
        files = [data]
    place = data
    options: dict[str, Any] = {} if config is None else {"name": config}
    if files and not is_folder:
        paths = [os.path.abspath(file) for file in files]
        place = os.path.dirname(paths[0])
        options["data_files"] = [glob.escape(path) for path in paths]
    try:
        rows = _read_as_written(place, split, options)
    except (DatasetGenerationError, OSError, ValueError) as error:
        if is_folder:
            files = [str(path) for path in _data_files_in(data)]
        if files != [data]:
            for file in files:  # the one that is wrong raises
                load_rows(file)
        raise ArgumentError(f"can't read {data}: {error.__cause__ or error}") from error
    if rows.info.builder_name == "text":
        rows = rows.filter(lambda row: row["text"].strip())
    if len(rows) == 0:
        raise ArgumentError(f"{data} has no rows")
    if is_folder:
        _name_unread_files(data)
    rows.info.description = data if split == "train" else f"{data}, {split}"
    return rows


def _read_as_written(place: str, split: str, options: dict[str, Any]) -> Dataset:
    """Return rows whose values are as they are written: 007 is no number, and NA is a text."""
    rows = load_dataset(place, split=split, **options)
    read_by = rows.info.builder_name
    # What `datasets` has taken for a number or a date is read a second time.
    kinds = {
        name: AS_WRITTEN.get(read_by, kind)
        for name, kind in rows.features.items()
        if read_by == "csv" or "timestamp[" in str(kind)
    }
    if not kinds:
        return rows
    options = {**options, "features": Features(rows.features | kinds)}
    if read_by == "csv":  # which has text such as NA for missing values
        options |= {"keep_default_na": False, "na_values": [""]}
    return load_dataset(place, split=split, **options)


def _data_files_in(folder: str) -> list[Path]:
    return sorted(
        path
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in SUFFIXES and path.stat().st_size
    )


def _name_unread_files(folder: str) -> None:
    """Warn of the files in a folder that are in no split: `datasets` chooses by name and format."""
    read = set()
    for files in load_dataset_builder(folder).config.data_files.values():
        read |= {Path(file).resolve() for file in files}
    unread = [path.name for path in _data_files_in(folder) if path.resolve() not in read]
    if unread:
        warnings.warn(f"{folder}: not read: {first_few(unread, 5, ', ')}", stacklevel=3)


def mix_rows(sets: list[Dataset], weights: Sequence[float], seed: int) -> Dataset:
    """Return the rows of several sets: each row once, or drawn by weight until all were seen."""
    if any(rows.features != sets[0].features for rows in sets):
        forms = {", ".join(sorted(rows.column_names)) for rows in sets}
        raise ArgumentError(
            "the data sets must have one form, all of texts or all of messages, got "
            f"{' and '.join(sorted(forms))}"
        )
    if not weights:
        return concatenate_datasets(sets)
    if len(weights) != len(sets) or min(weights) <= 0:
        raise ArgumentError(f"{len(sets)} data sets need as many weights above 0, got {weights}")
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(
        sets, probabilities=shares, seed=seed, stopping_strategy="all_exhausted"
    )
