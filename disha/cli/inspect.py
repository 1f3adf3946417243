"""Show what an adapter file or a folder of PEFT holds: its layers, their sizes, and its notes.

With --base, also say whether it belongs to this checkpoint; the exit code is 1 if it does not.

Examples:
  disha inspect adapter.safetensors
  disha inspect adapter.safetensors --base path/to/model
  disha inspect adapter.safetensors --json | jq '.layers[].name'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import disha
from disha.cli.dispatcher import DONE, FAILED, Parser
from disha.cli.output import show
from disha.interop.checkpoints import misfits, summarize_misfits


def main(words: Sequence[str]) -> int:
    """Show an adapter file."""
    parser = Parser("inspect", __doc__)
    parser.add_argument("file", type=Path, help="the adapter file")
    parser.add_argument("--base", type=Path, help="a safetensors file, or a folder of them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse(words)
    adapter_file = disha.inspect_adapter(flags.file, flags.base)
    lines = [str(adapter_file)]
    reasons: list[str] = []
    if flags.base is not None:
        reasons = misfits(flags.base, flags.file)
        verdict = "does not belong" if reasons else "belongs"
        lines += [*summarize_misfits(reasons), f"{flags.file} {verdict} to {flags.base}"]
    show(flags.json, "\n".join(lines), _fields_of(adapter_file, reasons))
    return FAILED if reasons else DONE


def _fields_of(adapter_file: disha.AdapterFile, reasons: Sequence[str]) -> dict[str, Any]:
    """Return what --json prints."""

    def describe(key: str) -> dict[str, Any]:
        tensor = adapter_file.tensors[key]
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {"key": key, "shape": tuple(tensor.shape), "dtype": dtype}

    layers = [layer.to_json() | describe(layer.key) for layer in adapter_file.layers]
    also_train = [{"name": key, **describe(key)} for key in adapter_file.also_train]
    return {
        "path": str(adapter_file.path),
        "format": adapter_file.format,
        "bytes": adapter_file.nbytes,
        "parameters": adapter_file.parameters,
        "config": adapter_file.config.to_json(),
        "layers": layers,
        "also_train": also_train,
        "metadata": dict(adapter_file.metadata),
        "misfits": list(reasons),
    }
