"""Merge an adapter file into a base checkpoint."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from disha import functional
from disha.checks import check_scale
from disha.errors import ArgumentError, MergeError
from disha.files import AdapterContents
from disha.files.contents import keep_blocks
from disha.files.disk import (
    OF_TORCH,
    PathLike,
    Writer,
    check_path,
    is_full,
    open_tensors,
    require_free,
    save,
)
from disha.functional import method_of
from disha.functional.new_rows import NewRows
from disha.interop.checkpoints.matching import (
    find_copies,
    find_keys,
    find_misfits,
    read_adapter,
    refuse,
)
from disha.interop.checkpoints.reading import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    open_checkpoint,
    ties_embeddings,
)
from disha.layers.spec import BlockSpec
from disha.model.state import is_finite_as
from disha.text import counted, printable

SUFFIX = ".safetensors"

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
"""Endings of the names of weight files. A module in a folder of its own keeps its weights."""

OTHER_FORMATS = (
    *(".index.json", ".gguf", ".h5", ".msgpack", ".ot", ".tflite"),
    *(".onnx", ".onnx_data", ".onnx.data"),
)
"""Endings of the names of indexes, and of weights in formats that no module of torch reads."""

WHOLE = ...
"""The index of all of a tensor, whatever its number of axes."""


@dataclass(frozen=True)
class MergedCheckpoint:
    """What `merge_into_checkpoint` has written; printable.

    Attributes:
        path: the folder or the file.
        layers: the adapter's layers, all merged.
        replaced: the base's tensors that were replaced by parameters of `also_train`.
    """

    path: Path
    layers: tuple[str, ...]
    replaced: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{printable(str(self.path))}: {counted(len(self.layers), 'layer')} merged"
        if self.replaced:
            parameters = counted(len(self.replaced), "parameter")
            text += f", and {parameters} taken from the adapter"
        return text


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

    The copy has the same tensor names, shards and other files as the base, except for the same
    weights in other formats, so any loader of the base reads it. It appears at `out` when it is
    complete. If the merge fails, nothing changes. The base never changes.

    Args:
        base: one safetensors file; or a folder with a `model.safetensors`, or with shards and a
            `model.safetensors.index.json`.
        adapter_path: the adapter file, or a folder of PEFT. The base has the weights under their
            names in it, or under names that begin otherwise: with more modules, fewer, or in
            another order.
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
        >>> _ = disha.merge_adapters(model)
        >>> bool((merged["0.weight"] == model[0].weight).all())
        True
    """
    out = check_path(out)
    check_target(out, check_path(base), check_path(adapter_path), overwrite)
    merge = prepare_merge(base, adapter_path, also_train=also_train, scale=scale, force=force)
    write: Writer = merge.write_folder
    if out.suffix == SUFFIX:
        write = merge.write_file
    save(out, write)
    return merge.report(out)


def prepare_merge(
    base: PathLike, adapter_path: PathLike, *, also_train: bool, scale: float | None, force: bool
) -> Merge:
    """Return a merge that can be written, as `merge_into_checkpoint` does, or raise."""
    if scale is not None:
        scale = check_scale(scale)
    checkpoint = open_checkpoint(base)
    contents: AdapterContents = read_adapter(adapter_path, checkpoint)
    if not also_train:
        contents = keep_blocks(contents)
    keys = find_keys(checkpoint, contents)
    refuse(checkpoint, find_misfits(checkpoint, contents, keys, compares_values=not force))
    if not force:
        _refuse_tied(checkpoint, contents, keys)
    return Merge(checkpoint, keys, contents, scale)


# --- checks before anything is written -----------------------------------------------------------


def check_target(out: Path, base: Path, adapter: Path, overwrite: bool) -> None:
    """Raise if a save to `out` would replace what is read, or what is no checkpoint."""
    target = out.resolve()
    for what, path in (("base", base), ("adapter", adapter)):
        if not path.exists():  # a name of the hub, or an error that is raised later
            continue
        source = path.resolve()
        if source.is_relative_to(target) or target.is_relative_to(source):
            raise ArgumentError(f"can't write to {out}: the {what} is there; name another place")
    require_free(out, overwrite)
    is_checkpoint = any((out / name).is_file() for name in (SINGLE, INDEX))
    if is_full(out) and (out.suffix == SUFFIX or not is_checkpoint):
        raise ArgumentError(
            f"{out} is not a checkpoint, and all in it would be deleted; name another folder"
        )


def _refuse_tied(
    checkpoint: Checkpoint, contents: AdapterContents, keys: Mapping[str, str]
) -> None:
    """Raise if an embedding that changes may be tied to a head that must not change."""
    embeddings = [
        layer.name
        for layer in contents.layers
        if layer.layout.pattern == "index out" and not layer.tied
    ]
    for name in contents.also_train:
        is_matrix = checkpoint.tensor(keys[name]).dim() > 1
        if is_matrix and find_copies(checkpoint, keys, name):
            embeddings.append(name)
    if embeddings and ties_embeddings(checkpoint.config()):
        raise MergeError(
            f"{embeddings[0]} may be tied to an output head, which merging would change too "
            f"(tie_word_embeddings in {CONFIG}); merge in the model, with "
            "merge_adapters(model, untie=True)"
        )


# --- tensors -------------------------------------------------------------------------------------


@dataclass
class Merge:
    """Computes and writes the tensors of the merged checkpoint."""

    checkpoint: Checkpoint
    keys: Mapping[str, str]  # the checkpoint's names of the weights, by those in the adapter
    contents: AdapterContents
    scale: float | None

    def __post_init__(self) -> None:
        keys = self.keys
        contents = self.contents
        stacks = self.checkpoint.stacks
        self._values = {keys[name]: contents.tensors[name] for name in contents.also_train}
        self._layers = defaultdict[str, list[BlockSpec]](list)
        for record in contents.layers:
            copies = find_copies(self.checkpoint, keys, record.name) if record.tied else ()
            for key in (keys[record.name], *copies):
                self._layers[key].append(record)
        # Tensor of a single expert -> its stack, and the number of the expert there.
        self._experts: dict[str, tuple[str, int]] = {}
        for stack in stacks.keys() & set(keys.values()):
            for number, names in enumerate(stacks[stack]):
                for name in names:
                    self._experts[name] = (stack, number)

    def report(self, out: Path) -> MergedCheckpoint:
        """Return what is written to `out`."""
        return MergedCheckpoint(out, tuple(self.contents.names), tuple(self._values))

    def write_file(self, path: Path) -> None:
        """Write all tensors to one file."""
        self._write(path, self.checkpoint.files)

    def write_folder(self, folder: Path) -> None:
        """Write the shards, and copies of the index and of all files without merged weights."""
        base = self.checkpoint.path
        folder.mkdir()
        for source in base.rglob("*"):
            relative = source.relative_to(base)
            if source.is_file() and _is_copied(base, relative):
                target = folder / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        shards = defaultdict(list)
        for name, file in self.checkpoint.files.items():
            shards[file].append(name)
        for file, names in shards.items():
            name_of_shard = Path(SINGLE) if file == base else file.relative_to(base)
            shard = folder / name_of_shard
            shard.parent.mkdir(parents=True, exist_ok=True)
            self._write(shard, names)

    def _write(self, path: Path, names: Collection[str]) -> None:
        """Write tensors to a file, with the metadata of the files that they come from."""
        metadata = dict(OF_TORCH)
        for file in {self.checkpoint.files[name] for name in names}:
            with open_tensors(file) as source:
                metadata |= source.metadata() or {}
        save_file({name: self._merge(name) for name in names}, path, metadata)

    def _merge(self, name: str) -> Tensor:
        """Return the new values of a tensor."""
        if name not in self._experts:
            return self._change(name, name, self.checkpoint.tensor(name))
        stack, number = self._experts[name]
        names = self.checkpoint.stacks[stack][number]
        matrices = [self.checkpoint.tensor(matrix_name) for matrix_name in names]
        joined = torch.cat(matrices)[None]  # (1, out, in)
        changed = self._change(stack, name, joined, slice(number, number + 1))[0]
        parts = torch.split(changed, [len(matrix) for matrix in matrices])
        return parts[names.index(name)].contiguous()

    def _change(self, key: str, name: str, value: Tensor, part: Any = WHOLE) -> Tensor:
        """Return the new values of a tensor, or of one expert (1, out, in) of a stack.

        The adapter has tensors for `key`, which is the tensor or its stack. `part` is the index in
        these of what changes. Errors call it `name`.
        """
        dtype = value.dtype
        changed = value
        if key in self._values:
            changed = self._values[key][part].to(dtype)
        deltas = []
        new_rows = []
        for record in self._layers[key]:
            block = self.contents.tensors[record.key]
            if record.is_new_rows:
                new_rows.append(NewRows(block, record.outputs))
                continue
            method = method_of(record.method)
            delta = method.delta_weight(record.layout, block[part], changed, record.outputs)
            deltas.append((delta, record.scale if self.scale is None else self.scale))
        if deltas:
            changed = functional.merged_weight(changed, deltas)
        for rows in new_rows:
            changed = rows.write_weight(changed)
        if changed is not value and not is_finite_as(changed, dtype) and is_finite_as(value, dtype):
            raise MergeError(f"{name} would not be finite in {dtype}; give a smaller `scale`")
        return changed


def _is_copied(base: Path, path: Path) -> bool:
    """Whether a file of a base comes along: not if it may hold the old weights, or is hidden."""
    if any(part.startswith(".") for part in path.parts):
        return False
    if path == Path(INDEX):
        return True
    if path.name.endswith(OTHER_FORMATS):
        return False
    # A module in a folder of its own, as a SentenceTransformer has it, is not merged into.
    is_module = path.parent != Path() and (base / path.parent / CONFIG).is_file()
    return is_module or not path.name.endswith(WEIGHTS)
