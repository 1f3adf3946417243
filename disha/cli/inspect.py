"""Show what an adapter file holds: its layers, their sizes, and its notes.

With --base, also say whether it belongs to this checkpoint; the exit code is 1 if it does not.

Examples:
  disha inspect adapter.safetensors
  disha inspect adapter.safetensors --base path/to/model
  disha inspect adapter.safetensors --json | jq '.layers[].name'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import disha
from disha.cli.dispatcher import DONE, FAILED, Parser
from disha.cli.output import show
from disha.interop.checkpoints import misfits


def main(words: Sequence[str]) -> int:
    """Show an adapter file."""
    parser = Parser("inspect", __doc__)
    parser.add_argument("file", type=Path, help="the adapter file")
    parser.add_argument("--base", type=Path, help="a safetensors file, or a folder of them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse(words)
    adapter_file = disha.inspect_adapter(flags.file)
    wrong = [] if flags.base is None else misfits(flags.base, flags.file)
    lines = [str(adapter_file), *wrong]
    if flags.base is not None:
        lines.append(f"{flags.file} {'does not belong' if wrong else 'belongs'} to {flags.base}")
    entries = adapter_file.entries()
    fields = {
        "path": str(adapter_file.path),
        "format": adapter_file.format,
        "bytes": adapter_file.nbytes,
        "parameters": adapter_file.parameters,
        "config": adapter_file.config.to_json(),
        "layers": [entries[layer.key] for layer in adapter_file.layers],
        "also_train": [entries[key] for key in adapter_file.also_train],
        "metadata": dict(adapter_file.metadata),
        "misfits": wrong,
    }
    show(flags.json, "\n".join(lines), fields)
    return FAILED if wrong else DONE
