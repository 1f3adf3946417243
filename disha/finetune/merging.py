"""A copy of a base with an adapter merged into its weights, and with what the adapter notes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import disha
from disha.errors import AdapterFileWarning, ArgumentError
from disha.files import save
from disha.finetune.notes import EOS_KEY, TEMPLATE_KEY, TOKENS_KEY, read_notes
from disha.finetune.source import is_gguf

ANSWERS = {EOS_KEY, TEMPLATE_KEY}
"""The notes for which a merged folder has files of their own."""


def require_mergeable(base: str) -> None:
    """Raise `ArgumentError` if no copy of a base can be written."""
    if is_gguf(base):
        raise ArgumentError(
            "an adapter can't be merged into a GGUF file; do not merge, and convert the adapter "
            "with disha convert"
        )


def merge_base(
    base: str,
    adapter: Path,
    out: Path,
    *,
    scale: float | None = None,
    also_train: bool = True,
    force: bool = False,
    overwrite: bool = False,
    in_model: bool = False,
) -> disha.interop.checkpoints.MergedCheckpoint:
    """Write a copy of a base with an adapter merged, in the dtype of the base.

    A base on disk is copied tensor by tensor. One that is a name, or that gets more rows, is loaded
    with `transformers`, and so is every one with `in_model`. The other arguments are those of
    `disha.interop.checkpoints.merge_into_checkpoint`.
    """
    require_mergeable(base)
    disha.interop.checkpoints.check_target(out, Path(base), adapter, overwrite)
    notes = read_notes(adapter)
    is_file = out.suffix == ".safetensors"
    if Path(base).exists() and TOKENS_KEY not in notes and not in_model:
        merge = disha.interop.checkpoints.prepare_merge(
            base, adapter, also_train=also_train, scale=scale, force=force
        )
        copy: Callable[[Path], object] = partial(_write_folder, merge, notes)
        if is_file:
            copy = merge.write_file
            _warn_of_unwritten(out, notes)
        save(out, copy)
        return merge.report(out)
    if is_file:
        raise ArgumentError(f"{out} would be a folder, because the base is loaded; name a folder")
    action: Any = "default" if force else "error"
    with warnings.catch_warnings(action=action, category=AdapterFileWarning):
        write = _merge_in_model(base, adapter, notes, scale, also_train)
    save(out, write)
    file = disha.inspect_adapter(adapter, out)
    replaced = file.also_train if also_train else ()
    return disha.interop.checkpoints.MergedCheckpoint(out, tuple(file.names), replaced)


def _warn_of_unwritten(out: Path, notes: Mapping[str, str]) -> None:
    """Warn of the notes for which a file of weights has no place."""
    unwritten = sorted(ANSWERS.intersection(notes))
    if unwritten:
        warnings.warn(
            f"{out} has weights alone; for the {' and '.join(unwritten)} of the adapter, merge the "
            "folder of the base into a folder",
            stacklevel=3,
        )


def _merge_in_model(
    base: str, adapter: Path, notes: Mapping[str, str], scale: float | None, also_train: bool
) -> Callable[[Path], object]:
    """Return what writes a base, loaded with `transformers` and merged, into a folder."""
    from disha.finetune.base import load_base  # transformers takes seconds to import

    model, tokenizer = load_base(base, "auto", notes=notes)
    disha.load_adapter(model, adapter, also_train=also_train)
    if scale is not None:
        disha.set_adapter_scale(model, scale)
    disha.merge_adapters(model, untie=True, unload=True)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return write


def _write_folder(
    merge: disha.interop.checkpoints.Merge, notes: Mapping[str, str], folder: Path
) -> None:
    """Write a merged folder, with the chat template and the end of answers that the notes name."""
    merge.write_folder(folder)
    if ANSWERS.isdisjoint(notes):
        return
    from transformers import AutoConfig, GenerationConfig

    from disha.finetune.tokenizer import end_answers, load_tokenizer

    tokenizer, _ = load_tokenizer(str(folder), notes)
    tokenizer.save_pretrained(folder)
    try:
        generation = GenerationConfig.from_pretrained(folder)
    except OSError:  # the base has none
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        generation = GenerationConfig.from_model_config(config)
    end_answers(generation, tokenizer, notes)
    generation.save_pretrained(folder)
