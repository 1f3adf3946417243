"""Write a copy of a base with an adapter merged: W becomes W + s * dW, rounded once.

BASE is a safetensors file, a folder, or a name; without it, the one that the adapter file notes.
A base on disk is copied tensor by tensor, and a base that is only a name is loaded with
transformers. OUT is a folder, or a file if it ends with .safetensors.

Examples:
  disha merge path/to/model adapter.safetensors path/to/merged-model
  disha merge output/adapter.safetensors path/to/merged-model
  disha merge model.safetensors adapter.safetensors merged.safetensors
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import disha
from disha.cli.dispatcher import Parser
from disha.cli.output import tell_noted_base
from disha.errors import AdapterFileWarning
from disha.files.disk import file_at, require_free
from disha.finetune.notes import TEMPLATE_KEY, TEMPLATE_NAME, TOKENS_KEY
from disha.interop.checkpoints import merge_into_checkpoint


def main(words: Sequence[str]) -> None:
    """Merge an adapter into a base."""
    parser = Parser("merge", __doc__)
    parser.add_argument("base", nargs="?", help="the base")
    parser.add_argument("adapter", type=file_at, help="the adapter file")
    parser.add_argument("out", type=Path, help="what to write")
    parser.add_argument("--scale", type=float, help="s of all layers, instead of the adapter's own")
    parser.add_argument("--no_also_train", action="store_true", help="merge the blocks alone")
    parser.add_argument("--force", action="store_true", help="also into another or a tied base")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    flags = parser.parse(words)
    require_free(flags.out, flags.overwrite)
    base = flags.base
    if base is None:
        base, _ = tell_noted_base(flags.adapter)
    notes = disha.inspect_adapter(flags.adapter).metadata
    if Path(base).exists() and TOKENS_KEY not in notes:
        _merge_files(base, flags, notes)
    else:  # a name, or a base that gets more rows
        _merge_model(base, flags)


def _merge_files(base: str, flags: Namespace, notes: Mapping[str, str]) -> None:
    """Merge tensor by tensor, without the model."""
    merged = merge_into_checkpoint(
        base,
        flags.adapter,
        flags.out,
        scale=flags.scale,
        also_train=not flags.no_also_train,
        force=flags.force,
        overwrite=flags.overwrite,
    )
    if TEMPLATE_KEY in notes and flags.out.is_dir():
        (flags.out / TEMPLATE_NAME).write_text(notes[TEMPLATE_KEY], encoding="utf-8")
    print(merged)


def _merge_model(base: str, flags: Namespace) -> None:
    """Load the base with transformers, merge, and save the model."""
    from disha.finetune.merging import merge_base  # transformers takes seconds to import

    action: Any = "default" if flags.force else "error"
    with warnings.catch_warnings(action=action, category=AdapterFileWarning):
        merge_base(
            base,
            flags.adapter,
            flags.out,
            scale=flags.scale,
            also_train=not flags.no_also_train,
        )
    print(f"{flags.out}: {flags.adapter} merged into {base}")
