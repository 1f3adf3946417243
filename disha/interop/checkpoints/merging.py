"""Merge an adapter into a checkpoint on disk, one shard at a time.

Every merged weight equals the result of `merge_adapters` in memory, bit for bit. Memory holds the
adapter and one shard of the base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
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
from disha.errors import AdapterIOError, ArgumentError, ArgumentTypeError, MergeError
from disha.files.contents import Contents, read_contents
from disha.files.saving import PathLike, checked_path
from disha.functional.shards import merge_dtype
from disha.interop.checkpoints.base import (
    CONFIG,
    INDEX,
    SINGLE,
    BaseOf,
    Checkpoint,
    open_checkpoint,
    opened,
)
from disha.records import LayerRecord
from disha.state import finite_as
from disha.text import counted, printable

__all__ = ["MergedCheckpoint", "merge_into_checkpoint"]

SUFFIX = ".safetensors"

DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that `dtype` changes, and may be."""


@dataclass(frozen=True)
class MergedCheckpoint:
    """What `merge_into_checkpoint` has written; printable.

    Attributes:
        path: the folder or the file.
        layers: the adapter's layers, all merged.
        replaced: tensors that were replaced by parameters saved with the blocks.
        files: names of the files written.
        nbytes: size of all tensors.

    Examples:
        >>> import pathlib, tempfile
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
    nbytes: int

    def __str__(self) -> str:
        return (
            f"{printable(str(self.path))}: {counted(len(self.layers), 'layer')} merged, "
            f"{counted(len(self.replaced), 'tensor')} replaced, {self.nbytes:,} bytes of tensors "
            f"in {counted(len(self.files), 'file')}"
        )


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
        dtype: dtype of all floating-point tensors of 16 bits and more, and in `config.json`; by
            default each keeps its own.
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
        ArgumentTypeError: an argument is of the wrong type.

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
    _check_arguments(scale, dtype)
    adapter_path, out = checked_path(adapter_path), checked_path(out)
    checkpoint = open_checkpoint(base)
    _check_target(out, checkpoint, overwrite)
    contents = read_contents(adapter_path, also_train=also_train)
    header = contents[0]
    found = BaseOf(checkpoint, header.layers, header.also_train)
    found.refuse(found.wrong_shapes(header) or ([] if force else found.other_values(header)))
    if not force:
        _refuse_tied(checkpoint, header.layers)
    merge = _Merge(found, contents, scale, dtype)
    with _written(out) as new:
        if out.suffix == SUFFIX:
            nbytes, files = merge.write(new, list(checkpoint.files)), [out.name]
        else:
            nbytes, files = _write_folder(new, merge)
    return MergedCheckpoint(
        path=out,
        layers=tuple(record.name for record in header.layers),
        replaced=tuple(found.keys[name] for name in header.also_train),
        files=tuple(files),
        nbytes=nbytes,
    )


# --- checks before anything is written -----------------------------------------------------------


def _check_arguments(scale: object, dtype: object) -> None:
    if scale is not None:
        check_scale(scale)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    if dtype is not None and dtype not in DENSE:
        raise ArgumentError(
            f"weights can't be merged in {dtype}; allowed are {', '.join(map(str, DENSE))}"
        )


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
            f"{out} holds no checkpoint, and everything in it would be deleted; name another folder"
        )


def _refuse_tied(checkpoint: Checkpoint, layers: tuple[LayerRecord, ...]) -> None:
    """Raise if an adapted embedding may be tied, as those of models are by default."""
    embeddings = [layer.name for layer in layers if layer.layout.pattern == "index out"]
    config = checkpoint.config() if embeddings else {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    if any(said) or (not said and "model_type" in config):
        raise MergeError(
            f"{embeddings[0]} may be tied to an output head, which merging would change too: "
            f"{CONFIG} of {checkpoint.path} does not set tie_word_embeddings to false. Untie them "
            "and save that model first, or merge with `force`"
        )


# --- tensors -------------------------------------------------------------------------------------


class _Merge:
    """Computes and writes the tensors of the merged checkpoint."""

    def __init__(
        self, base: BaseOf, contents: Contents, scale: float | None, dtype: torch.dtype | None
    ) -> None:
        header, self._blocks = contents
        self.base, self.dtype, self._scale = base, dtype, scale
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

    def write(self, path: Path, names: list[str]) -> int:
        """Write some tensors to a file, and return their size."""
        metadata = {"format": "pt"}  # loaders require it
        for file in {self.base.checkpoint.files[name] for name in names}:
            with opened(file) as source:
                metadata |= source.metadata() or {}
        tensors = {name: self._merged(name) for name in names}
        save_file(tensors, path, metadata)
        return sum(tensor.nbytes for tensor in tensors.values())

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
        dtype = self.dtype if self.dtype is not None and value.dtype in DENSE else value.dtype
        if key in self._values:
            value = self._values[key][experts].to(value.dtype)
        changed = value
        if key in self._layers:
            wide = value.to(merge_dtype(value.dtype))
            with functional.without_autocast(wide.device), torch.no_grad():
                changed = functional.merged_weight(wide, self._deltas(key, wide, experts))
        changed = changed.to(dtype)
        if changed is not value and not finite_as(changed, dtype) and finite_as(value, value.dtype):
            raise MergeError(
                f"{name} would not be finite in {dtype}; nothing was written. Check the adapter's "
                "blocks and its scale, and `dtype`"
            )
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


def _write_folder(folder: Path, merge: _Merge) -> tuple[int, list[str]]:
    """Write a folder; return the size of its tensors, and the names of its files."""
    checkpoint, nbytes = merge.base.checkpoint, 0
    folder.mkdir()
    for source in checkpoint.other_files():
        target = folder / source.relative_to(checkpoint.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    if merge.dtype is not None and (folder / CONFIG).exists():
        _write_json(folder / CONFIG, _with_dtype(checkpoint.config(), merge.dtype))
    shards = sorted({*checkpoint.files.values()})
    for file in shards:
        names = [name for name, one in checkpoint.files.items() if one == file]
        nbytes += merge.write(folder / (SINGLE if checkpoint.folder is None else file.name), names)
    if checkpoint.folder is not None and shards != [checkpoint.folder / SINGLE]:
        index = json.loads((checkpoint.folder / INDEX).read_text(encoding="utf-8"))
        metadata = {**index.get("metadata", {}), "total_size": nbytes}
        if merge.dtype is not None:
            metadata = _with_dtype(metadata, merge.dtype)
        _write_json(folder / INDEX, {**index, "metadata": metadata})
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return nbytes, sorted(files)


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
