"""``disha inspect``: what an adapter file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import disha
from disha.cli.flags import Flags, parsed
from disha.cli.output import number, show, with_progress
from disha.files.statistics import TensorStatistics, statistics_of
from disha.tables import table

__all__ = ["run"]

DESCRIPTION = """Show what an adapter file holds: its layers, their sizes, and its notes.

Tensors are read only with --stats.

examples:
  disha inspect adapter.safetensors
  disha inspect adapter.safetensors --stats
  disha inspect adapter.safetensors --json | jq '.layers[].name'"""


@dataclass(frozen=True)
class InspectFlags(Flags):
    """The arguments of `disha inspect`.

    Args:
        file: The adapter file.
        stats: Also read the tensors and show their norms. For Bone and tile, show the norm of dW
            too.
    """

    file: Path
    stats: bool = False


def run(arguments: Sequence[str]) -> None:
    """Show what an adapter file holds, with the given command-line arguments."""
    flags = parsed(InspectFlags, "inspect", arguments, DESCRIPTION)
    described = disha.inspect_adapter(flags.file)
    text = str(described)
    statistics: dict[str, TensorStatistics] = {}
    if flags.stats:
        statistics = dict(
            with_progress(statistics_of(described), len(described.tensors), "reading tensors")
        )
        after_table = text.splitlines()[1 + len(described.layers) :]
        text = "\n".join([_statistics_table(described, statistics), *after_table])
    show(flags.json, text, _fields(described, statistics))


def _fields(
    described: disha.AdapterFile, statistics: Mapping[str, TensorStatistics]
) -> dict[str, Any]:
    entries = described.entries()
    for key, found in statistics.items():
        entries[key]["stats"] = asdict(found)
    return {
        "path": str(described.path),
        "format": described.format,
        "bytes": described.nbytes,
        "parameters": described.parameters,
        "config": described.config.to_json(),
        "layers": [entries[layer.key] for layer in described.layers],
        "also_train": [entries[key] for key in described.also_train],
        "metadata": dict(described.metadata),
    }


def _statistics_table(
    described: disha.AdapterFile, statistics: Mapping[str, TensorStatistics]
) -> str:
    names = {layer.key: layer.name or "(the model)" for layer in described.layers}
    rows = [
        (
            names.get(key, key),
            "x".join(map(str, described.tensors[key].shape)),
            *(number(one, 4) for one in (found.norm, found.rms, found.largest, found.delta_norm)),
            f"{found.zeros:,}",
            f"{found.not_finite:,}",
        )
        for key, found in statistics.items()
    ]
    header = ("tensor", "shape", "norm", "rms", "largest", "norm of dW", "zeros", "not finite")
    return table(header, rows)
