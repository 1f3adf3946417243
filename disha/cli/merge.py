"""Write a copy of a base with an adapter merged: W becomes W + s * dW, rounded once.

BASE is a safetensors file, a folder, or a name; without it, the one that the adapter file notes.
A base on disk is copied tensor by tensor. One that is only a name, or that gets new tokens, is
loaded with transformers, and OUT is then a folder. Else it is a folder, or a file if it ends with
.safetensors.

Examples:
  disha merge path/to/model adapter.safetensors path/to/merged-model
  disha merge output/adapter.safetensors path/to/merged-model
  disha merge model.safetensors adapter.safetensors merged.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disha.cli.dispatcher import Parser
from disha.cli.output import fit, tell_noted_base
from disha.files import find_adapter
from disha.finetune.flags import SCALE
from disha.finetune.merging import merge_base
from disha.finetune.notes import read_notes
from disha.finetune.templates import try_template


def main(words: Sequence[str]) -> None:
    """Merge an adapter into a base."""
    parser = Parser("merge", __doc__)
    parser.add_argument("base", nargs="?", help="the base")
    parser.add_argument("adapter", type=Path, help="an adapter file, or a folder of PEFT")
    parser.add_argument("out", type=Path, help="what to write")
    scale_help = "s of all layers, instead of the adapter's own; alpha / r of other libraries"
    parser.add_argument("--scale", type=SCALE, help=scale_help)
    parser.add_argument("--no_also_train", action="store_true", help="merge the blocks alone")
    parser.add_argument("--force", action="store_true", help="also into another or a tied base")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    flags = parser.parse(words)
    flags.adapter = find_adapter(flags.adapter)
    notes = read_notes(flags.adapter)
    base = flags.base or tell_noted_base(flags.adapter, notes)
    try_template(flags.adapter, notes)
    merged = merge_base(
        base,
        flags.adapter,
        flags.out,
        scale=flags.scale,
        also_train=not flags.no_also_train,
        force=flags.force,
        overwrite=flags.overwrite,
    )
    print(fit(str(merged)))
