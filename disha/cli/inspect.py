"""``disha inspect``: what an adapter file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from disha.cli.flags import FileArgument, Flags, parsed
from disha.cli.output import show, shown
from disha.files import AdapterFile, inspect_adapter
from disha.files.statistics import TensorStatistics, statistics_of
from disha.tables import table

__all__ = ["run"]

DESCRIPTION = """Show what an adapter file holds: its layers, their sizes, and what it was made of.

No tensor is read unless --stats asks for it.

examples:
  disha inspect adapter.safetensors
  disha inspect adapter.safetensors --stats
  disha inspect adapter.safetensors --json | jq '.layers[].name'"""


@dataclass(frozen=True)
class InspectFlags(Flags):
    """The arguments of `disha inspect`."""

    file: FileArgument
    """The adapter file."""

    stats: bool = False
    """Also read the tensors, and show their norms; that of dW where the block tells it."""


def run(arguments: Sequence[str]) -> None:
    """Show what an adapter file holds, as command-line `arguments` say."""
    flags = parsed(InspectFlags, "inspect", arguments, DESCRIPTION)
    described = inspect_adapter(flags.file)
    statistics: dict[str, TensorStatistics] = {}
    if flags.stats:
        statistics = dict(
            shown(statistics_of(described), len(described.tensors), "reading tensors")
        )
    text = str(described)
    if statistics:
        after_table = text.splitlines()[1 + len(described.layers) :]
        text = "\n".join([_statistics_table(described, statistics), *after_table])
    show(flags.json, text, fields_of(described, statistics))


def fields_of(described: AdapterFile, statistics: Mapping[str, TensorStatistics]) -> dict[str, Any]:
    """Return what a file says about itself, as `--json` prints it."""
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


def _statistics_table(described: AdapterFile, statistics: Mapping[str, TensorStatistics]) -> str:
    names = {layer.key: layer.name or "(the model)" for layer in described.layers}
    rows = [
        (
            names.get(key, key),
            "x".join(map(str, described.tensors[key].shape)),
            _number(found.norm),
            _number(found.rms),
            _number(found.largest),
            _number(found.delta_norm),
            f"{found.zeros:,}",
            f"{found.infinite:,}",
        )
        for key, found in statistics.items()
    ]
    header = ("tensor", "shape", "norm", "rms", "largest", "norm of dW", "zeros", "not finite")
    return table(header, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
