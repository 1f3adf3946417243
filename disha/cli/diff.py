"""``disha diff``: what differs between two adapter files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import disha
from disha.cli.dispatcher import DONE, NO
from disha.cli.flags import Flags, parsed
from disha.cli.output import number, show, with_progress
from disha.files.differences import (
    FieldDifference,
    TensorDifference,
    header_differences,
    tensor_differences,
)
from disha.tables import table

__all__ = ["run"]

DESCRIPTION = """Show what differs between two adapter files: configuration, layers, numbers.

The exit code is 0 if nothing differs, 1 if something does, and 2 if a file can't be read.

examples:
  disha diff before.safetensors after.safetensors
  disha diff a.safetensors b.safetensors --json | jq '.layers[] | select(.relative > 0.01)'
  disha diff a.safetensors b.safetensors > /dev/null || echo 'not the same'"""


@dataclass(frozen=True)
class DiffFlags(Flags):
    """The arguments of `disha diff`.

    Args:
        first: An adapter file.
        second: Another one.
    """

    first: Path
    second: Path


def run(arguments: Sequence[str]) -> int:
    """Show what differs between two files, with the given command-line arguments."""
    flags = parsed(DiffFlags, "diff", arguments, DESCRIPTION)
    first, second = disha.inspect_adapter(flags.first), disha.inspect_adapter(flags.second)
    fields = header_differences(first, second)
    count = len({*first.tensors, *second.tensors})
    tensors = list(with_progress(tensor_differences(first, second), count, "comparing"))
    same = not fields and all(one.same for one in tensors)
    show(
        flags.json,
        f"{first.path} and {second.path} hold the same adapter"
        if same
        else _text(first, second, fields, tensors),
        {
            "first": str(first.path),
            "second": str(second.path),
            "same": same,
            "fields": [asdict(one) for one in fields],
            "layers": [_fields(one) for one in tensors if one.layer],
            "also_train": [_fields(one) for one in tensors if not one.layer],
        },
    )
    return DONE if same else NO


def _fields(difference: TensorDifference) -> dict[str, Any]:
    fields = {**asdict(difference), "same": difference.same}
    del fields["layer"]
    return fields


def _text(
    first: disha.AdapterFile,
    second: disha.AdapterFile,
    fields: Sequence[FieldDifference],
    tensors: Sequence[TensorDifference],
) -> str:
    different = [one for one in tensors if not one.same]
    lines = [str(field) for field in fields]
    if different:
        rows = [
            (
                one.name or "(the model)",
                number(one.largest, 3),
                number(one.relative, 3),
                _remark(one, first, second),
            )
            for one in different
        ]
        lines.append(table(("tensor", "largest", "relative", "besides"), rows))
    lines.append(
        f"{first.path} | {second.path}: {len(different)} of {len(tensors)} tensors differ; "
        f"other fields that differ: {len(fields)}"
    )
    return "\n".join(lines)


def _remark(
    difference: TensorDifference, first: disha.AdapterFile, second: disha.AdapterFile
) -> str:
    if difference.held != "both":
        return f"only in {first.path if difference.held == 'first' else second.path}"
    return ", ".join(map(str, difference.fields))
