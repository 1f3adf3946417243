"""Rows of numbers, for models that take tensors and not text."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disha.finetune.data.encoding import Outcome, Tally
from disha.finetune.data.order import permutation
from disha.finetune.data.rows import Row, Rows
from disha.finetune.errors import BadRowError, DataError
from disha.finetune.hashing import add_state
from disha.text import brief

__all__ = ["Samples", "TensorBatch", "TensorRows", "read_samples"]


@dataclass(frozen=True)
class TensorBatch:
    """A batch of samples.

    Args:
        inputs: (batch, ...) float32.
        targets: (batch,) classes, int64; or (batch, ...) numbers to predict, float32.
        size: how many samples there are.
        weight: how many terms the summed loss has: one for each class or number.
        classes: how many classes the model must have at least; 0 if targets are numbers.
    """

    inputs: Tensor
    targets: Tensor
    size: int
    weight: int
    classes: int = 0

    def to(self, device: torch.device) -> TensorBatch:
        """Return the batch on a device."""
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))


@dataclass(frozen=True)
class Samples:
    """Rows of numbers in memory.

    Args:
        inputs: (rows, ...) float32.
        targets: (rows,) classes, int64; or (rows, ...) numbers, float32.
        tally: how many rows could not be used, and why.
    """

    inputs: Tensor
    targets: Tensor
    tally: Tally

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def are_classes(self) -> bool:
        """Whether the targets are classes, rather than numbers to predict."""
        return self.targets.dtype == torch.int64

    def digest(self) -> str:
        """Return a hash of all samples."""
        digest = hashlib.sha256()
        add_state(digest, {"inputs": self.inputs, "targets": self.targets})
        return digest.hexdigest()

    def batch(self, indices: Sequence[int]) -> TensorBatch:
        """Return a batch of the samples with these numbers."""
        chosen = torch.tensor(list(indices))
        targets = self.targets[chosen]
        # Count them here, on the CPU, so that the GPU never has to wait for it.
        classes = int(targets.max()) + 1 if self.are_classes else 0
        return TensorBatch(self.inputs[chosen], targets, len(chosen), targets.numel(), classes)


@dataclass(frozen=True)
class TensorRows:
    """Samples in memory, shuffled again in every epoch.

    Args:
        samples: the samples to train on.
        size: samples per batch; the last may be smaller.
        seed: decides the order.
    """

    samples: Samples
    size: int
    seed: int

    def batches(self, epoch: int) -> Iterator[Sequence[int]]:
        """Yield the batches of an epoch, counted from 1, as numbers of samples."""
        order = permutation(len(self.samples), self.seed + epoch)
        return (order[i : i + self.size] for i in range(0, len(order), self.size))

    def batches_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return math.ceil(len(self.samples) / self.size)

    def digest(self) -> str:
        """Return a hash of all rows."""
        return self.samples.digest()

    def weight(self, batch: Sequence[int]) -> int:
        """How many terms the summed loss of a batch has."""
        return len(batch) * self.samples.targets[:1].numel()

    def collate(self, batch: Sequence[int]) -> TensorBatch:
        """Return a batch as a model takes it."""
        return self.samples.batch(batch)


def read_samples(
    rows: Rows,
    fields: tuple[str, str],
    *,
    skip_bad_rows: bool = False,
    like: Samples | None = None,
) -> Samples:
    """Turn rows into tensors.

    A field holds a number, or a list of numbers nested to any depth, or either of these as JSON
    text. Targets are classes if every row has a whole number, written without a decimal point.

    Args:
        rows: one or more rows.
        fields: the names of the input field and the target field.
        skip_bad_rows: count rows that can't be used, and leave them out.
        like: samples that these must match, in shape and in whether targets are classes.

    Raises:
        BadRowError: something is wrong with a row, and `skip_bad_rows` is False.
        DataError: no row can be used, or a class is negative.
    """
    tally, found, first = Tally(), list[_Sample](), None
    if like is not None:
        first = _Sample(like.inputs[0], like.targets[0], like.are_classes, "training")
    for row in rows:
        try:
            sample = _sample(row, row.names or fields)
            first = first or sample
            _require_like(
                first, sample, fields, must_be_class=like is not None and like.are_classes
            )
        except BadRowError as error:
            if not skip_bad_rows:
                raise
            tally.add(Outcome(complaint=str(error)))
        else:
            tally.used += 1
            found.append(sample)
    if not found:
        why = f", such as: {tally.complaints[0]}" if tally.complaints else ""
        raise DataError(f"none of the {len(rows)} rows can be used{why}")
    are_classes = all(one.is_class for one in found) if like is None else like.are_classes
    if are_classes:
        _require_classes(found, fields[1])
    targets = torch.stack([one.target for one in found])
    return Samples(
        torch.stack([one.inputs.float() for one in found]),
        targets.long() if are_classes else targets.float(),
        tally,
    )


class _Sample(NamedTuple):
    inputs: Tensor
    target: Tensor
    is_class: bool
    place: str


def _sample(row: Row, fields: tuple[str, ...]) -> _Sample:
    inputs, target = (_value(row, name) for name in fields)
    is_class = isinstance(target, int) and not isinstance(target, bool)
    return _Sample(
        _numbers(inputs, row, fields[0]), _numbers(target, row, fields[1]), is_class, row.place
    )


def _value(row: Row, name: str) -> Any:
    value = row[name]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)  # every field of a CSV file is text
    except (ValueError, RecursionError) as error:
        raise BadRowError(
            f"{row.place}: field {name!r} must be a number or a list of numbers, "
            f"found {brief(value):.60}"
        ) from error


def _numbers(value: Any, row: Row, name: str) -> Tensor:
    try:
        # Use float64 first, because it holds whole numbers exactly.
        numbers = torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadRowError(
            f"{row.place}: field {name!r} must be a number or a list of numbers, nested lists all "
            f"of one length, found {brief(value):.60}"
        ) from error
    if not numbers.numel() or not bool(torch.isfinite(numbers.float()).all()):
        raise BadRowError(
            f"{row.place}: field {name!r} must hold finite numbers, at least one, found "
            f"{brief(value):.60}"
        )
    return numbers


def _require_like(
    first: _Sample, sample: _Sample, fields: tuple[str, str], *, must_be_class: bool
) -> None:
    for name, expected, found in zip(fields, first[:2], sample[:2], strict=True):
        if expected.shape != found.shape:
            raise BadRowError(
                f"{sample.place}: field {name!r} has the shape {tuple(found.shape)}, but must have "
                f"{tuple(expected.shape)} as in {first.place}"
            )
    if must_be_class and not sample.is_class:
        raise BadRowError(
            f"{sample.place}: field {fields[1]!r} must be a class, a whole number from 0, as in "
            f"{first.place}"
        )


def _require_classes(found: Sequence[_Sample], target: str) -> None:
    for sample in found:
        if sample.target < 0:
            raise DataError(
                f"{sample.place}: field {target!r} is {int(sample.target)}, but whole numbers are "
                "classes, from 0; write numbers to predict with a decimal point"
            )
