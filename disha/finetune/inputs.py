"""The inputs of a run: the opened base model, and the rows in batches.

The run itself and the fresh process that verifies it both start here, with only the settings.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from disha.finetune.answering import noted_template
from disha.finetune.base_model import BaseModel, demo_model, open_base_model
from disha.finetune.data.batches import Batch, BatchSource, TextBatches, batch_by_length
from disha.finetune.data.dataset import read_dataset
from disha.finetune.data.docstrings import docstring_pairs
from disha.finetune.data.encoding import Encoder, Tally, encode_rows
from disha.finetune.data.examples import StoredExamples
from disha.finetune.data.rows import Dataset, Rows, pieces
from disha.finetune.data.tensors import Samples, TensorRows, read_samples
from disha.finetune.errors import DataError
from disha.finetune.settings import FinetuneSettings, RowSettings, require, require_unchanged
from disha.finetune.text.templates import Template, given_template
from disha.finetune.text.tokenizer import Tokenizer

__all__ = ["Checked", "Inputs", "encoder_for", "first_rows", "load_inputs", "require_context"]

MOST_CHECKED_TRAINING_ROWS = 64
"""How many training rows losses are compared on if no rows are held out."""

CHECKED_BATCH = 16
"""How many rows are in a batch when losses are compared."""


@dataclass(frozen=True)
class Checked:
    """The rows to compare losses on: held-out rows, or the first training rows if there are none.

    Args:
        name: their name, for reports.
        rows: token ids, or samples for a model that takes no text.
        held_out: whether these rows are kept out of training.
        tally: how many of the rows were used, cut or left out.
    """

    name: str
    rows: StoredExamples | Samples
    held_out: bool
    tally: Tally

    def batches(self) -> Iterator[Batch]:
        """Yield the rows in batches."""
        if isinstance(self.rows, Samples):
            yield from map(self.rows.batch, pieces(range(len(self.rows)), CHECKED_BATCH))
        else:
            yield from batch_by_length(self.rows, CHECKED_BATCH)


@dataclass(frozen=True)
class Inputs:
    """Model and data of a run.

    Args:
        base: the base model.
        dataset: the rows as they were read.
        encoder: turns rows into token ids; None for a model that takes no text.
        source: the batches to train on.
        tally: how many training rows were used, cut or left out.
        checked: the rows to compare losses on.
        drawn: how many rows an epoch draws from each data set, if they have weights.
        now: the time that the chat template sees, in seconds since 1970; None for the present.
    """

    base: BaseModel
    dataset: Dataset
    encoder: Encoder | None
    source: BatchSource[Any]
    tally: Tally
    checked: Checked
    drawn: Sequence[int] = ()
    now: float | None = None

    def contents(self) -> dict[str, str]:
        """Return hashes of the rows that are learned, and of those that losses are measured on."""
        return {
            "set of rows": self.source.digest(),
            "set of held-out rows": self.checked.rows.digest(),
        }

    def shared_rows(self) -> int:
        """Return how many of the rows to train on are held-out rows too, with the same tokens.

        Rows of numbers are not counted.
        """
        rows, source = self.checked.rows, self.source
        if isinstance(rows, Samples) or not isinstance(source, TextBatches):
            return 0
        held_out = set(rows.hashes()) if self.checked.held_out else set()
        return sum(one in held_out for one in source.examples.hashes()) if held_out else 0


def load_inputs(settings: FinetuneSettings, now: float | None = None) -> Inputs:
    """Read the data and the tokenizer, and open the model, so that mistakes show up early.

    Args:
        settings: the settings of the run.
        now: the time that the chat template sees, in seconds since 1970; None for the present.

    Raises:
        DataError: a data file is damaged, or no row can be used.
        CheckpointError: the model can't be read.
        TokenizerError: its tokenizer is not supported.
        SettingsError: the settings don't fit the model.
        MissingPackageError: the demo's model is not installed.
    """
    data = settings.data
    dataset = docstring_pairs() if settings.demo else read_dataset(data, settings.training.seed)
    model = settings.model
    if settings.demo and not model.is_named:
        model = replace(model, base_model_name_or_path=demo_model())
    base = open_base_model(model)
    if base.tokenizer is None:
        return _of_numbers(settings, base, dataset)
    require_context(data, base)
    encoder = encoder_for(data, replace(base.tokenizer, now=now), settings.adapter.adapter)
    if len(dataset.held_out):
        rows, held_out_tally = encode_rows(dataset.held_out, encoder)
        checked = Checked("held-out", rows, True, held_out_tally)
    else:
        usable = filter(None, map(encoder.encode, dataset.training))
        first = StoredExamples(itertools.islice(usable, MOST_CHECKED_TRAINING_ROWS))
        checked = Checked("first training rows'", first, False, Tally())
    examples, tally = encode_rows(
        dataset.training,
        encoder,
        data.data_weights,
        workers=data.dataloader_num_workers,
        on_disk=data.streaming,
    )
    row_length = data.max_seq_length if data.packing else None
    size = settings.training.per_device_train_batch_size
    source = TextBatches(examples, size, settings.training.seed, row_length, data.group_by_length)
    drawn = examples.drawn if data.data_weights else ()
    return Inputs(base, dataset, encoder, source, tally, checked, drawn, now)


def encoder_for(data: RowSettings, tokenizer: Tokenizer, adapter: Path | None) -> Encoder:
    """Return the encoder that turns rows into token ids.

    Args:
        data: the settings of the data.
        tokenizer: the model's tokenizer.
        adapter: an adapter file. If it notes a template, that one is used for `auto`.

    Raises:
        DishaError: the template or the adapter file can't be used.
    """
    return Encoder(
        tokenizer,
        data.dataset_field[:2],
        data.max_seq_length,
        _template(data, tokenizer, adapter) if len(data.dataset_field) > 1 else None,
        skip_bad_rows=data.skip_bad_rows,
    )


def _template(data: RowSettings, tokenizer: Tokenizer, adapter: Path | None) -> Template:
    noted = noted_template(adapter, tokenizer) if data.template == "auto" else None
    return noted or given_template(data.template, tokenizer)


def require_context(data: RowSettings, base: BaseModel) -> None:
    """Raise `SettingsError` if rows may be longer than the model takes."""
    require(
        base.context is None or data.max_seq_length <= base.context,
        f"--max_seq_length must be at most {base.context}, the longest sequence that {base.title} "
        f"takes, got {data.max_seq_length}",
    )


def first_rows(dataset: Dataset) -> Rows:
    """Return the rows to take samples from: held-out rows, or training rows if there are none."""
    return dataset.held_out if len(dataset.held_out) else dataset.training


def _of_numbers(settings: FinetuneSettings, base: BaseModel, dataset: Dataset) -> Inputs:
    """Return the inputs for a model without a tokenizer."""
    data, training = settings.data, settings.training
    require_unchanged(
        data,
        ("packing", "group_by_length", "streaming", "data_weights"),
        f"is for text, but {base.title} came without a tokenizer; leave it out, or let the "
        "function return a pair of the model and a tokenizer",
    )
    require(
        training.metric_for_best_model != "exact_match",
        f"--metric_for_best_model exact_match compares texts, but {base.title} came without a "
        "tokenizer; use loss",
    )
    if len(data.dataset_field) == 1:
        raise DataError(
            f"{base.title} came without a tokenizer, so --dataset_field must name two fields of "
            f"numbers, the input and the target, got {' '.join(data.dataset_field)}"
        )
    fields = (data.dataset_field[0], data.dataset_field[1])
    samples = read_samples(dataset.training, fields, skip_bad_rows=data.skip_bad_rows)
    if len(dataset.held_out):
        held_out = read_samples(
            dataset.held_out, fields, skip_bad_rows=data.skip_bad_rows, like=samples
        )
        checked = Checked("held-out", held_out, True, held_out.tally)
    else:
        end = MOST_CHECKED_TRAINING_ROWS
        first = Samples(samples.inputs[:end], samples.targets[:end], samples.tally)
        checked = Checked("first training rows'", first, False, Tally())
    source = TensorRows(samples, training.per_device_train_batch_size, training.seed)
    return Inputs(base, dataset, None, source, samples.tally, checked)
