"""A copy of a base with an adapter merged into its weights."""

from __future__ import annotations

from pathlib import Path

import disha
from disha.errors import ArgumentError
from disha.finetune.base import is_gguf, load_base


def require_mergeable(base: str) -> None:
    """Raise `ArgumentError` if no copy of a base can be written."""
    if is_gguf(base):
        raise ArgumentError(
            "an adapter can't be merged into a GGUF file; leave out --merge, and convert the "
            "adapter with disha convert"
        )


def merge_base(
    base: str, adapter: Path, folder: Path, scale: float | None = None, also_train: bool = True
) -> None:
    """Write a copy of a base with an adapter merged, in the dtype of the base."""
    require_mergeable(base)
    model, tokenizer = load_base(base, "auto", notes=disha.inspect_adapter(adapter).metadata)
    disha.load_adapter(model, adapter, also_train=also_train)
    if scale is not None:
        disha.set_adapter_scale(model, scale)
    disha.merge_adapters(model, untie=True, unload=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
