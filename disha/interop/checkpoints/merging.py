"""Merging an adapter into a checkpoint on disk: what is refused, and what is returned."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from disha.config import check_scale
from disha.errors import (
    AdapterFileError,
    AdapterIOError,
    ArgumentError,
    ArgumentTypeError,
    MergeError,
)
from disha.files.atomic import PathLike, checked_path, write_files, write_folder
from disha.files.contents import read_contents
from disha.files.header import AdapterFile
from disha.files.tensors import DTYPES
from disha.interop.checkpoints.reading import CONFIG, INDEX, SINGLE, Checkpoint, open_checkpoint
from disha.interop.checkpoints.verifying import BaseReport, matched
from disha.interop.checkpoints.writing import (
    SUFFIX,
    Progress,
    Work,
    fill_folder,
    merged_metadata,
)
from disha.text import printable

__all__ = ["MergedCheckpoint", "merge_into_checkpoint"]

SHOWN = 20
"""How many problems an error lists."""


@dataclass(frozen=True)
class MergedCheckpoint:
    """What `merge_into_checkpoint` has written; printable.

    Attributes:
        path: the folder or the file.
        layers: the adapter's layers, all merged.
        replaced: tensors that took the values of parameters saved beside the blocks.
        files: names of the files written.
        left_out: names of the base's files that are not in it: other weights, and links and hidden
            files.
        nbytes: size of all tensors.

    Examples:
        >>> import tempfile, pathlib
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop.checkpoints import merge_into_checkpoint
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = pathlib.Path(name)
        ...     save_file(model.state_dict(), folder / "base.safetensors")
        ...     disha.save_adapter(disha.inject_adapters(model, "0", r=4), folder / "adapter")
        ...     made = merge_into_checkpoint(
        ...         folder / "base.safetensors", folder / "adapter", folder / "merged"
        ...     )
        >>> made.layers, made.files, made.nbytes
        (('0',), ('model.safetensors',), 576)
    """

    path: Path
    layers: tuple[str, ...]
    replaced: tuple[str, ...]
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    nbytes: int

    def __str__(self) -> str:
        lines = [
            f"{printable(str(self.path))}: {len(self.layers)} layers merged, "
            f"{len(self.replaced)} tensors replaced, {self.nbytes:,} bytes of tensors in "
            f"{len(self.files)} files"
        ]
        if self.left_out:
            lines.append(f"not copied: {printable(', '.join(self.left_out))}")
        return "\n".join(lines)


def merge_into_checkpoint(
    base: PathLike,
    adapter_path: PathLike,
    out: PathLike,
    *,
    also_train: bool = True,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergedCheckpoint:
    """Write a copy of a base checkpoint with an adapter merged into its weights.

    W becomes W + s * dW, computed in float32 (float64 for float64 weights) and rounded once: bit
    for bit what `merge_adapters` computes. Parameters saved beside the blocks take their places.
    Tensor after tensor is read, merged and written, so that memory holds one of them.

    What is written has the tensors' names, the shards and the other files of the base, weights in
    other formats left out; any loader of the base reads it. All of it appears at once, when it is
    complete; a failure leaves what was there, and no part of the new. The base is only read.

    Args:
        base: one safetensors file; or a folder that holds `model.safetensors`, or shards with a
            `model.safetensors.index.json`.
        adapter_path: the adapter file. Its layers are looked for under their names; if some are
            not there, under these with one prefix more or less.
        out: the folder to write; or, if it ends with `.safetensors`, the one file, which then
            holds all tensors. Its parent exists. A base that is one file becomes a
            `model.safetensors` in a folder.
        also_train: also put the parameters saved beside the blocks in their places.
        scale: runtime scale s of all layers, in place of the adapter's own.
        dtype: dtype of all floating-point tensors of 16 bits and more, in `config.json` too; by
            default each keeps its own.
        force: merge though the weights are not those that the adapter was saved from, or though an
            embedding may be tied to an output head, which then changes as well.
        overwrite: replace the file that is there, or the folder that has a checkpoint, with all
            that is in it.
        progress: called with the bytes of tensors written, and those to write, after each.

    Returns:
        What was written, and what was left out.

    Raises:
        AdapterIOError: a file can't be read or written.
        AdapterFileError: the adapter file or the checkpoint is damaged; or they don't fit: a layer
            is missing, has another shape, is quantised, or has other weights than the adapter was
            saved from; the message lists them.
        ArgumentError: `out` is there already, or is in the base, or holds it.
        MergeError: a merged weight would not be finite; or a tied embedding.

    Examples:
        >>> import tempfile, pathlib
        >>> from safetensors.torch import load_file, save_file
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop.checkpoints import merge_into_checkpoint
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = pathlib.Path(name)
        ...     save_file(model.state_dict(), folder / "base.safetensors")
        ...     model = disha.inject_adapters(model, "0", r=4, init="kaiming")
        ...     disha.save_adapter(model, folder / "adapter")
        ...     out = folder / "merged.safetensors"
        ...     _ = merge_into_checkpoint(folder / "base.safetensors", folder / "adapter", out)
        ...     merged = load_file(out)
        >>> disha.merge_adapters(model)
        >>> bool((merged["0.weight"] == model[0].weight).all())
        True
    """
    _check_arguments(scale, dtype)
    adapter_path, out = checked_path(adapter_path), checked_path(out)
    checkpoint = open_checkpoint(base)
    _check_target(out, checkpoint, adapter_path, overwrite)
    adapter, tensors = read_contents(adapter_path, also_train=also_train)
    found = matched(checkpoint, adapter, tensors)
    _check_fit(found.report, force)
    _check_mergeable(checkpoint, adapter, force)
    work = Work(checkpoint, adapter, tensors, found, scale, dtype, progress)
    if _names_file(out):
        write_files({out: partial(work.write, checkpoint.tensors, merged_metadata(checkpoint))})
        files, left_out = {out.name}, set[str]()
    else:
        with write_folder(out, overwrite=overwrite) as folder:
            files, left_out = fill_folder(folder, work)
    return MergedCheckpoint(
        path=out,
        layers=tuple(record.name for record in adapter.layers),
        replaced=tuple(found.keys.values()),
        files=tuple(sorted(files)),
        left_out=tuple(sorted(left_out)),
        nbytes=work.total,
    )


# --- what is refused -----------------------------------------------------------------------------


def _check_arguments(scale: object, dtype: object) -> None:
    if scale is not None:
        check_scale(scale)
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError(
            f"dtype must be a torch.dtype such as torch.bfloat16, got {dtype!r} of type "
            f"{type(dtype).__name__}"
        )
    if dtype not in DTYPES.values():
        allowed = ", ".join(map(str, DTYPES.values()))
        raise ArgumentError(f"weights can't be merged in {dtype}; allowed are {allowed}")


def _check_target(out: Path, checkpoint: Checkpoint, adapter: Path, overwrite: bool) -> None:
    target = Path(os.path.realpath(out))
    for source in (checkpoint.path, *checkpoint.files, adapter):
        source = Path(os.path.realpath(source))
        if target == source or target in source.parents:
            raise ArgumentError(f"can't write to {out}: it is or holds {source}, which is read")
    if (
        checkpoint.folder is not None
        and Path(os.path.realpath(checkpoint.folder)) in target.parents
    ):
        raise ArgumentError(f"can't write to {out}: it is in the base, {checkpoint.folder}")
    if not target.parent.is_dir():
        raise AdapterIOError(f"can't write to {out}: create the folder {target.parent} first")
    if _names_file(out):
        _check_file_target(out, target, overwrite)
    else:
        _check_folder_target(out, target, overwrite)


def _names_file(out: Path) -> bool:
    return out.suffix == SUFFIX


def _check_file_target(out: Path, target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise ArgumentError(
            f"can't write to {out}: it is a folder, and a path that ends with {SUFFIX} is to be a "
            "file"
        )
    if target.exists() and not overwrite:
        raise ArgumentError(f"{out} is there already; name another, or pass overwrite=True")


def _check_folder_target(out: Path, target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ArgumentError(
            f"can't write to {out}: it is a file; name a folder, or a path that ends with {SUFFIX}"
        )
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ArgumentError(f"{out} is not empty; name another folder, or pass overwrite=True")
    if not any((target / name).is_file() for name in (SINGLE, INDEX)):
        raise ArgumentError(
            f"{out} holds no checkpoint (no {SINGLE} or {INDEX}), and would be deleted; name "
            "another folder, or delete it yourself"
        )


def _check_fit(report: BaseReport, force: bool) -> None:
    unfit, other = report.missing + report.misfits, report.other_base
    if not unfit and (force or not other):
        return
    shown = (unfit + (() if force else other))[:SHOWN]
    problems = [f"{one.name or '(the model)'}: {one.state}, {one.remark}" for one in shown]
    counts = f"{len(report.missing)} missing, {len(report.misfits)} unfit, {len(other)} of another"
    remedies = []
    if report.missing:
        remedies.append(
            "a weight that is tied to another one is stored once, under the other's name: load the "
            "adapter into the model, and merge there with merge_adapters(model, untie=True)"
        )
    if other and not force:
        remedies.append(
            "take the base that the adapter was trained on, and make sure that the adapter is not "
            "merged into it already; or pass force=True"
        )
    raise AdapterFileError(
        f"{report.adapter} does not fit {report.base} ({counts} base); nothing was written:\n"
        + "\n".join(problems + remedies)
    )


def _check_mergeable(checkpoint: Checkpoint, adapter: AdapterFile, force: bool) -> None:
    embeddings = [
        repr(record.name) for record in adapter.layers if record.layout.pattern == "index out"
    ]
    if embeddings and not force and _may_tie(checkpoint.config()):
        raise MergeError(
            f"{', '.join(embeddings[:SHOWN])} may be tied to an output head, which merging would "
            f"change too: {CONFIG} of {checkpoint.path} does not say tie_word_embeddings: false. "
            "Untie them and save that model first, or pass force=True"
        )


def _may_tie(config: Mapping[str, Any]) -> bool:
    """Whether the model of a config.json may tie its embeddings; it does where nothing is said."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return any(one is not False for one in said) or (not said and "model_type" in config)
