"""Merge an adapter into a checkpoint on disk, one shard at a time.

Every merged weight equals the result of `merge_adapters` in memory, bit for bit. Memory holds the
adapter and one shard of the base.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from disha import functional
from disha.config import check_scale
from disha.errors import AdapterIOError, ArgumentError, MergeError
from disha.files.contents import Contents, read_contents
from disha.files.opening import opened
from disha.files.saving import PathLike, checked_path
from disha.functional.shards import merge_dtype, without_autocast
from disha.interop.checkpoints.base import (
    CONFIG,
    INDEX,
    SINGLE,
    BaseOf,
    Checkpoint,
    open_checkpoint,
)
from disha.records import LayerRecord
from disha.state import finite_as
from disha.text import counted, printable

__all__ = ["MergedCheckpoint", "merge_into_checkpoint"]

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class MergedCheckpoint:
    """What `merge_into_checkpoint` has written; printable.

    Attributes:
        path: the folder or the file.
        layers: the adapter's layers, all merged.
        replaced: tensors that were replaced by parameters saved with the blocks.
    """

    path: Path
    layers: tuple[str, ...]
    replaced: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{printable(str(self.path))}: {counted(len(self.layers), 'layer')} merged, "
            f"{counted(len(self.replaced), 'tensor')} replaced"
        )


def merge_into_checkpoint(
    base: PathLike,
    adapter_path: PathLike,
    out: PathLike,
    *,
    also_train: bool = True,
    scale: float | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> MergedCheckpoint:
    """Write a copy of a base checkpoint with an adapter merged into its weights.

    W becomes W + s * dW, computed in float32 (float64 for float64 weights) and rounded once: bit
    for bit what `merge_adapters` computes. Parameters saved with the blocks replace the base's.

    The copy has the same tensor names, shards and other files as the base, except for weights in
    other formats, so any loader of the base reads it. It appears at `out` when it is complete. If
    the merge fails, nothing changes. The base never changes.

    Args:
        base: one safetensors file; or a folder with a `model.safetensors`, or with shards and a
            `model.safetensors.index.json`.
        adapter_path: the adapter file. The base has its weights under their names, or all of them
            with one prefix more or less.
        out: the folder to write. If it ends with `.safetensors`, the file to write, which then
            holds all tensors. In a folder, a base that is one file becomes `model.safetensors`.
        also_train: also merge the parameters saved with the blocks.
        scale: runtime scale s of all layers, in place of the adapter's own.
        force: merge even if the adapter was saved from other weights, or if an adapted embedding
            may be tied to an output head.
        overwrite: replace an existing checkpoint.

    Returns:
        A `MergedCheckpoint`.

    Raises:
        AdapterIOError: a file can't be read or written.
        AdapterFileError: the adapter or the checkpoint is damaged, or they don't belong together.
        MergeError: an adapted embedding may be tied, or a merged weight is not finite.
        ArgumentError: an argument is out of range, or something is at `out` already.

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import pathlib, tempfile
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
    if scale is not None:
        check_scale(scale)
    adapter_path, out = checked_path(adapter_path), checked_path(out)
    checkpoint = open_checkpoint(base)
    _check_target(out, checkpoint, overwrite)
    contents = read_contents(adapter_path, also_train=also_train)
    header = contents[0]
    found = BaseOf(checkpoint, header.layers, header.also_train)
    found.refuse(found.wrong_shapes(header) or ([] if force else found.other_values(header)))
    if not force:
        _refuse_tied(checkpoint, header.layers)
    merge = _Merge(found, contents, scale)
    with _written(out) as new:
        if out.suffix == SUFFIX:
            merge.write(new, list(checkpoint.files))
        else:
            _write_folder(new, merge)
    layers = tuple(record.name for record in header.layers)
    return MergedCheckpoint(out, layers, tuple(found.keys[name] for name in header.also_train))


# --- checks before anything is written -----------------------------------------------------------


def _check_target(out: Path, checkpoint: Checkpoint, overwrite: bool) -> None:
    target, source = out.resolve(), checkpoint.path.resolve()
    if target in (source, *source.parents) or source in target.parents:
        raise ArgumentError(f"can't write to {out}: the base is there; name another place")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ArgumentError(f"{out} exists; choose another name, or set `overwrite`")
    is_checkpoint = any((out / name).is_file() for name in (SINGLE, INDEX))
    if out.is_dir() and (out.suffix == SUFFIX or not is_checkpoint):
        raise ArgumentError(
            f"{out} is no checkpoint, and all in it would be deleted; name another folder"
        )


def _refuse_tied(checkpoint: Checkpoint, layers: tuple[LayerRecord, ...]) -> None:
    """Raise if an adapted embedding may be tied, as those of models are by default."""
    embeddings = [layer.name for layer in layers if layer.layout.pattern == "index out"]
    config = checkpoint.config() if embeddings else {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    if any(said) or (not said and "model_type" in config):
        raise MergeError(
            f"{embeddings[0]} may be tied to an output head, which merging would change too "
            f"(tie_word_embeddings in {CONFIG}); untie them first, or merge with `force`"
        )


# --- tensors -------------------------------------------------------------------------------------


class _Merge:
    """Computes and writes the tensors of the merged checkpoint."""

    def __init__(self, base: BaseOf, contents: Contents, scale: float | None) -> None:
        header, self._blocks = contents
        self.base, self._scale = base, scale
        self._values = {base.keys[name]: self._blocks[name] for name in header.also_train}
        self._layers: dict[str, list[LayerRecord]] = {}
        for record in header.layers:
            self._layers.setdefault(base.keys[record.name], []).append(record)
        # Matrix of one expert -> its stack, and the number of the expert.
        self._parts = {
            name: (key, expert)
            for key in self._layers.keys() | self._values.keys()
            for expert, names in enumerate(base.stacks.get(key, ()))
            for name in names
        }

    def write(self, path: Path, names: list[str]) -> None:
        """Write some tensors to a file."""
        metadata = {"format": "pt"}  # loaders require it
        for file in {self.base.checkpoint.files[name] for name in names}:
            with opened(file) as source:
                metadata |= source.metadata() or {}
        save_file({name: self._merged(name) for name in names}, path, metadata)

    def _merged(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._changed(name, name, self.base.checkpoint.tensor(name))
        key, expert = self._parts[name]
        names = self.base.stacks[key][expert]
        rows = [self.base.checkpoint.shape(one)[0] for one in names]
        one = slice(expert, expert + 1)
        matrix = self._changed(key, name, self.base.matrix(names)[None], one)[0]
        return torch.split(matrix, rows)[names.index(name)].contiguous()

    def _changed(self, key: str, name: str, value: Tensor, experts: Any = ...) -> Tensor:
        """Return the new values of a tensor, or of one expert (1, out, in) of a stack."""
        dtype, changed = value.dtype, value
        if key in self._values:
            changed = self._values[key][experts].to(dtype)
        if key in self._layers:
            wide = changed.to(merge_dtype(dtype))
            with without_autocast(wide.device), torch.no_grad():
                changed = functional.merged_weight(wide, self._deltas(key, wide, experts)).to(dtype)
        if changed is not value and not finite_as(changed, dtype) and finite_as(value, dtype):
            raise MergeError(f"{name} would not be finite in {dtype}; give a smaller `scale`")
        return changed

    def _deltas(self, key: str, weight: Tensor, experts: Any) -> Iterator[tuple[Tensor, float]]:
        for one in self._layers.get(key, ()):
            block = self._blocks[one.key][experts]
            method = functional.method_of(one.method)
            delta = method.delta_weight(one.layout, block, weight, one.rows)
            yield delta, one.scale if self._scale is None else self._scale


# --- files ---------------------------------------------------------------------------------------


@contextmanager
def _written(out: Path) -> Iterator[Path]:
    """Give a path beside `out`. What is there in the end takes the place of `out`."""
    new = out.with_name(f"{out.name}.new")
    try:
        _remove(new)
        yield new
        _remove(out)
        new.rename(out)
    except (OSError, SafetensorError) as error:
        raise AdapterIOError(f"can't write {out}: {error}") from error
    finally:
        _remove(new)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_folder(folder: Path, merge: _Merge) -> None:
    """Write a folder: the shards, and copies of all other files and of the index."""
    checkpoint = merge.base.checkpoint
    folder.mkdir()
    for source in checkpoint.other_files():
        target = folder / source.relative_to(checkpoint.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    for file in sorted({*checkpoint.files.values()}):
        names = [name for name, one in checkpoint.files.items() if one == file]
        merge.write(folder / (SINGLE if checkpoint.folder is None else file.name), names)
