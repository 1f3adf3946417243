"""Merge an adapter into a checkpoint on disk, one tensor at a time.

Every merged weight equals the result of `merge_adapters` in memory, bit for bit. Every other tensor
is copied byte by byte. Memory holds only the adapter and one tensor of the base, or the matrix of
one expert.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from disha import functional
from disha.config import check_scale
from disha.errors import (
    AdapterFileError,
    AdapterIOError,
    ArgumentError,
    ArgumentTypeError,
    MergeError,
)
from disha.files.atomic import (
    PathLike,
    checked_path,
    resolved,
    write_files,
    write_folder,
)
from disha.files.contents import unread_contents
from disha.files.header import AdapterFile, LayerRecord
from disha.files.json_files import read_json
from disha.files.pieces import Piece, write_pieces, write_tensor
from disha.files.reading import explained, found_at
from disha.files.tensors import DTYPES, HELD, NAMES, opened
from disha.functional.shards import merge_dtype
from disha.interop.checkpoints.matching import BaseReport, Matching, matched, stored_twice
from disha.interop.checkpoints.reading import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    may_tie,
    open_checkpoint,
    vocabulary_sizes,
)
from disha.interop.checkpoints.stacks import Part
from disha.state import finite_as
from disha.text import counted, first_few, printable

__all__ = ["MergedCheckpoint", "merge_into_checkpoint"]

SHOWN = 20
"""How many problems an error lists."""

SUFFIX = ".safetensors"

Progress = Callable[[int, int], None]
"""Called with the bytes of tensors written so far, and the total."""


@dataclass(frozen=True)
class MergedCheckpoint:
    """What `merge_into_checkpoint` has written; printable.

    Attributes:
        path: the folder or the file.
        layers: the adapter's layers, all merged.
        replaced: tensors that were replaced by parameters saved with the blocks.
        files: names of the files written.
        left_out: names of the base's files that were not copied: other weights, links that lead
            out of the base, and hidden files.
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
            f"{printable(str(self.path))}: {counted(len(self.layers), 'layer')} merged, "
            f"{counted(len(self.replaced), 'tensor')} replaced, {self.nbytes:,} bytes of tensors "
            f"in {counted(len(self.files), 'file')}"
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
    for bit what `merge_adapters` computes. Parameters saved with the blocks replace the base's.
    Each tensor is read, merged and written before the next, so memory holds one of them.

    The copy has the same tensor names, shards and other files as the base, except for weights in
    other formats, so any loader of the base reads it. It appears at `out` when it is complete. If
    the merge fails, nothing changes. The base never changes.

    Args:
        base: one safetensors file; or a folder with a `model.safetensors`, or with shards and a
            `model.safetensors.index.json`.
        adapter_path: the adapter file. If the base does not have some of its layers, their names
            are also tried with a prefix added or removed.
        out: the folder to write. If it ends with `.safetensors`, the file to write, which then
            holds all tensors. Its parent must exist. In a folder, a base that is one file becomes
            `model.safetensors`.
        also_train: also merge the parameters saved with the blocks.
        scale: runtime scale s of all layers, in place of the adapter's own.
        dtype: dtype of all floating-point tensors of 16 bits and more, and in `config.json`; by
            default each keeps its own.
        force: merge even if the adapter was saved from other weights, or if an adapted embedding
            may be tied to an output head, which then changes too.
        overwrite: replace an existing file, or an existing folder that holds a checkpoint, with
            everything in it.
        progress: called after each tensor with the bytes written so far, and the total.

    Returns:
        What was written, and what was left out.

    Raises:
        AdapterIOError: a file can't be read or written.
        AdapterFileError: the adapter file or the checkpoint is damaged; or they do not fit,
            because a layer is missing, has another shape, is quantised, or has other weights than
            the adapter was saved from. The message lists these layers.
        ArgumentError: `out` exists, is inside the base, or contains the base.
        MergeError: a merged weight would not be finite, or an embedding or an output head that
            would change may be tied to another tensor.

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
    with opened(adapter_path) as file:
        adapter, unread = unread_contents(file, also_train=also_train)
        found = matched(checkpoint, adapter, unread)
        _check_fit(found.report, force)
        tensors = dict(unread)
    _check_untied(checkpoint, adapter, found, force)
    merge = _Merge(checkpoint, adapter, tensors, found, scale, dtype, progress)
    if out.suffix == SUFFIX:
        write_files({out: partial(merge.write, checkpoint.tensors, checkpoint.files)})
        files, left_out = {out.name}, set[str]()
    else:
        with write_folder(out, overwrite=overwrite) as folder:
            files, left_out = _write_folder(folder, merge)
    return MergedCheckpoint(
        path=out,
        layers=tuple(record.name for record in adapter.layers),
        replaced=tuple(found.keys.values()),
        files=tuple(sorted(files)),
        left_out=tuple(sorted(left_out)),
        nbytes=merge.total,
    )


# --- checks before anything is written -----------------------------------------------------------


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
    target = resolved(out)
    sources = [resolved(one) for one in (checkpoint.path, *checkpoint.files, adapter)]
    around = [source for source in sources if target in (source, *source.parents)]
    if around:
        problem: str | None = f"it is or contains {around[0]}, which is an input"
    elif checkpoint.folder is not None and sources[0] in target.parents:
        problem = f"it is inside the base, {checkpoint.folder}"
    elif found_at(target.parent) != "folder":
        raise AdapterIOError(f"can't write to {out}: create the folder {target.parent} first")
    elif found_at(target) is None:
        problem = None
    elif out.suffix == SUFFIX:
        problem = _why_no_file(target, overwrite)
    else:
        problem = _why_no_folder(target, overwrite)
    if problem is not None:
        raise ArgumentError(f"can't write to {out}: {problem}")


def _why_no_file(target: Path, overwrite: bool) -> str | None:
    """Return why a file can't replace the target, or None if it can."""
    if found_at(target) == "folder":
        return f"it is a folder, and a path that ends with {SUFFIX} names a file"
    return None if overwrite else "it exists; choose another name, or set `overwrite`"


def _why_no_folder(target: Path, overwrite: bool) -> str | None:
    """Return why a folder can't replace the target, or None if it can."""
    if found_at(target) != "folder":
        return f"it is a file; name a folder, or a path that ends with {SUFFIX}"
    with explained(target):
        is_empty = not os.listdir(target)
    if is_empty:
        return None
    if not overwrite:
        return "it is not empty; choose another folder, or set `overwrite`"
    if any(found_at(target / name) == "file" for name in (SINGLE, INDEX)):
        return None
    return (
        f"it holds no checkpoint (no {SINGLE} or {INDEX}), and everything in it would be deleted; "
        "name another folder, or delete it yourself"
    )


def _check_fit(report: BaseReport, force: bool) -> None:
    unfit, other = report.missing + report.misfits, () if force else report.other_base
    if not unfit and not other:
        return
    found = [f"{one.name or '(the model)'}: {one.state}, {one.remark}" for one in unfit + other]
    lines = [first_few(found, SHOWN)]
    if report.missing:
        lines.append(
            "if a missing weight is tied to another one, it is stored under the other's name: load "
            "the adapter into the model, and merge there with merge_adapters(model, untie=True)"
        )
    if other:
        lines.append(
            "give the base that the adapter was trained on, without any merged adapter, or merge "
            "with `force`"
        )
    raise AdapterFileError(
        f"{report.adapter} does not fit {report.base} ({len(report.missing)} missing, "
        f"{len(report.misfits)} unfit, {len(report.other_base)} from another base); nothing was "
        "written:\n" + "\n".join(lines)
    )


def _check_untied(
    checkpoint: Checkpoint, adapter: AdapterFile, found: Matching, force: bool
) -> None:
    if force:
        return
    embeddings = [repr(one.name) for one in adapter.layers if one.layout.pattern == "index out"]
    if embeddings and may_tie(checkpoint.config()):
        raise MergeError(
            f"{first_few(embeddings, SHOWN, ', ')} may be tied to an output head, which merging "
            f"would change too: {CONFIG} of {checkpoint.path} does not set tie_word_embeddings to "
            "false. Untie them and save that model first, or merge with `force`"
        )
    for name, other in stored_twice(checkpoint, {*found.weights.values(), *found.keys.values()}):
        config = checkpoint.config()
        rows = checkpoint.tensors[name].shape[0]
        if may_tie(config) and rows in vocabulary_sizes(config):
            raise MergeError(
                f"{name} and {other} hold the same values, and may be one parameter: {CONFIG} of "
                f"{checkpoint.path} does not set tie_word_embeddings to false. Merging would "
                f"change {name} only. If they are tied, leave {other} out of the base, as "
                "save_pretrained does. If they are not, set it to false. Or merge with `force`"
            )


# --- tensors -------------------------------------------------------------------------------------


class _Merge:
    """Computes and writes the tensors of the merged checkpoint.

    Args:
        checkpoint: the base.
        adapter: the adapter's header.
        tensors: its tensors.
        found: the tensors of the checkpoint that they change.
        scale: replaces the adapter's scale.
        dtype: dtype of floating-point tensors.
        progress: called with the bytes written so far, and the total.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: AdapterFile,
        tensors: Mapping[str, Tensor],
        found: Matching,
        scale: float | None,
        dtype: torch.dtype | None,
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self._tensors, self._scale, self._progress = tensors, scale, progress
        self._values = {key: tensors[name] for name, key in found.keys.items()}
        self._layers: dict[str, list[LayerRecord]] = {}
        for record in adapter.layers:
            self._layers.setdefault(found.weights[record.name], []).append(record)
        self._stacks = {
            name: stack
            for name, stack in found.stacks.items()
            if name in self._layers or name in self._values
        }
        self._parts: dict[str, Part] = {}
        for name, stack in self._stacks.items():
            self._parts |= stack.parts(name)
        # The new matrix of an expert of which gate is written and up is not, or the other way
        # round. A file has one after the other, so there is at most one.
        self._half_written: dict[tuple[str, int], Tensor] = {}
        self._done = 0
        self.total = sum(self._piece(name).nbytes for name in checkpoint.tensors)

    def write(self, names: Iterable[str], files: Iterable[Path], path: str) -> None:
        """Write some of the tensors to a file.

        Args:
            names: the tensors.
            files: files of the base, whose metadata is copied.
            path: the file.
        """
        metadata = {"format": "pt"}  # loaders require it
        for file in files:
            metadata |= self.checkpoint.indexes[file].metadata
        write_pieces(path, {name: self._piece(name) for name in names}, metadata)

    def _piece(self, name: str) -> Piece:
        stored = self.checkpoint.tensors[name]
        dtype, nbytes = stored.dtype, stored.nbytes
        if self.dtype is not None and stored.dtype in DTYPES:
            dtype = NAMES[self.dtype]
            nbytes = math.prod(stored.shape) * self.dtype.itemsize
        acts = any(name in some for some in (self._layers, self._values, self._parts))
        changed = acts or dtype != stored.dtype

        def write(file: BinaryIO) -> None:
            if changed:
                write_tensor(self._changed(name, HELD[dtype]), file)
            else:
                with self.checkpoint.file_of(name) as source:
                    file.writelines(source.chunks(name))
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self.total)

        return Piece(dtype, stored.shape, nbytes, write)

    def _changed(self, name: str, dtype: torch.dtype) -> Tensor:
        part = self._parts.get(name)
        if part is None:
            return self._changed_whole(name, name, self.checkpoint.tensor(name), dtype)
        # Rows of an expert's matrix, which is changed as a whole.
        changed = self._half_written.pop((part.stack, part.expert), None)
        if changed is None:
            matrix = self._stacks[part.stack].matrix(self.checkpoint, part.expert)[None]
            one = slice(part.expert, part.expert + 1)
            changed = self._changed_whole(part.stack, name, matrix, dtype, one)[0]
            if part.last - part.first < len(changed):
                self._half_written = {(part.stack, part.expert): changed}
        return changed[part.first : part.last].contiguous()

    def _changed_whole(
        self, key: str, name: str, value: Tensor, dtype: torch.dtype, experts: Any = ...
    ) -> Tensor:
        """Return the new values of a tensor, or of one expert of a stack.

        Args:
            key: the tensor or the stack.
            name: the tensor that is written, for errors.
            value: the values of the base; (1, out, in) for an expert.
            dtype: of the result.
            experts: the index of that expert in the stack.
        """
        if key in self._values:
            value = self._values[key][experts].to(value.dtype)
        if key not in self._layers:
            return _cast(name, value, dtype)
        weight = value.to(merge_dtype(value.dtype))
        del value
        merged = self._merged(self._layers[key], weight, experts).to(dtype)
        if not finite_as(merged, dtype):
            names = ", ".join(repr(record.name) for record in self._layers[key])
            raise MergeError(
                f"merging {names} into {name} gives values that are not finite in {dtype}; nothing "
                "was written. Check the adapter's blocks and its scale, and the base"
            )
        return merged

    def _merged(self, layers: Iterable[LayerRecord], weight: Tensor, experts: Any) -> Tensor:
        """Return W + sum of s dW: exactly what `merge_adapters` computes before it rounds."""
        deltas = (
            (
                functional.method_of(one.method).delta_weight(
                    one.layout, self._tensors[one.key][experts], weight, one.rows
                ),
                one.scale if self._scale is None else self._scale,
            )
            for one in layers
        )
        with functional.without_autocast(weight.device), torch.no_grad():
            return functional.merged_weight(weight, deltas)


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.to(dtype)
    if not finite_as(cast, dtype) and bool((value.isfinite() & ~cast.isfinite()).any()):
        raise MergeError(
            f"{name} has values that are not finite in {dtype}; nothing was written. Choose "
            "another `dtype`, or leave it out"
        )
    return cast


# --- a folder ------------------------------------------------------------------------------------


def _write_folder(folder: Path, merge: _Merge) -> tuple[set[str], set[str]]:
    """Fill an empty folder with the checkpoint; return the names written and left out."""
    checkpoint = merge.checkpoint
    others, left_out = checkpoint.other_files()
    for name, source in others.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if source.name == CONFIG and merge.dtype is not None:
            _write_json(folder / name, _with_dtype(read_json(source), merge.dtype))
        else:
            shutil.copyfile(source, folder / name)
    written = set(others)
    for file in checkpoint.files:
        name = SINGLE if checkpoint.folder is None else file.name
        held = [key for key, stored in checkpoint.tensors.items() if stored.path == file]
        merge.write(held, [file], str(folder / name))
        written.add(name)
    if checkpoint.index is not None:
        _write_json(folder / INDEX, _index(checkpoint.index, merge))
        written.add(INDEX)
    return written, left_out


def _index(former: Mapping[str, Any], merge: _Merge) -> dict[str, Any]:
    metadata = former.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    metadata["total_size"] = merge.total
    if merge.dtype is not None:
        metadata = _with_dtype(metadata, merge.dtype)
    tensors = merge.checkpoint.tensors
    weight_map = {name: tensors[name].path.name for name in sorted(tensors)}
    return {**former, "metadata": metadata, "weight_map": weight_map}


def _with_dtype(fields: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a configuration with another dtype in every field that names one, at any depth."""
    name = str(dtype).removeprefix("torch.")
    changed = dict(fields)
    for key, value in fields.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            changed[key] = name
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            changed[key] = _with_dtype(value, dtype)
    return changed


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
