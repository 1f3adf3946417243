"""Base checkpoints on disk: merge an adapter file into one, or ask whether the two belong together.

A checkpoint is one safetensors file or a folder. Its names are those of the adapter's model, or
begin otherwise: `transformers` renames the text layers of models that see images as it loads them.
Single matrices of experts, which it stacks then, get the name of their stack too.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from disha import functional
from disha.config import check_scale
from disha.errors import (
    AdapterFileError,
    AdapterIOError,
    ArgumentError,
    ConversionError,
    MergeError,
)
from disha.files import AdapterContents, inspect_adapter
from disha.files.contents import read_contents
from disha.files.disk import OF_TORCH, PathLike, checked_path, opened, require_free, save
from disha.functional import METHODS
from disha.interop.experts import DOWN, FAMILIES, GATE_UP, SEPARATE_BEFORE, SINGLE_EXPERT, renamed
from disha.layers.kinds import PROJECTIONS
from disha.model.fingerprints import fingerprint, same_base
from disha.model.records import LayerRecord
from disha.model.state import finite_as
from disha.text import counted, first_few, join, printable

__all__ = ["MergedCheckpoint", "merge_into_checkpoint", "misfits"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SUFFIX = ".safetensors"

WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5")
"""Endings of the names of weight files and their indexes, which are not copied."""

DENSE = ("F64", "F32", "BF16", "F16")  # the dtypes of weights that are not quantised

_FIRST_PARTS = {
    parts[0]: (family.block, last, parts)
    for family in FAMILIES.values()
    for last, parts in ((GATE_UP, (family.gate, family.up)), (DOWN, (family.down,)))
    if family.layout == SEPARATE_BEFORE
}
"""The first matrix of an expert's part of a stack -> the block, the stack, and all matrices."""

SAME_END = re.compile(r"^(|.*?\.)(.+)\n(|.*\.)\2$")
"""Two names with the same end: how one begins, the end, and how the other begins."""

Stack = tuple[tuple[str, ...], ...]
"""For each expert, the tensors whose rows, one after the other, are its matrix (out, in)."""


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
        adapter_path: the adapter file. The base has its weights under their names, or these begin
            otherwise there, with some modules more or less, or in another order.
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
        scale = check_scale(scale)
    out = checked_path(out)
    checkpoint = open_checkpoint(base)
    _check_target(out, checkpoint, overwrite)
    contents = read_contents(checked_path(adapter_path), also_train=also_train)
    keys = _keys(checkpoint, contents)
    _refuse(checkpoint, _misfits(checkpoint, contents, keys, values=not force))
    if not force:
        _refuse_tied(checkpoint, contents, keys)
    merge = _Merge(checkpoint, keys, contents, scale)
    save(out, merge.write_file if out.suffix == SUFFIX else merge.write_folder)
    layers = tuple(contents.names)
    return MergedCheckpoint(out, layers, tuple(keys[name] for name in contents.also_train))


def misfits(base: PathLike, adapter_path: PathLike) -> list[str]:
    """Return a line for each layer of an adapter file that does not belong to a base checkpoint.

    A layer belongs there if the checkpoint has a weight of its name and shape, with the values that
    the adapter was saved from. The fingerprint of a weight consists of 64 of its values.

    Args:
        base: one safetensors file, or a folder as Hugging Face libraries write it.
        adapter_path: the adapter file.

    Raises:
        AdapterIOError: a file can't be read.
        AdapterFileError: a file is damaged, or the checkpoint lacks some of the weights.

    Examples:
        >>> import pathlib, tempfile
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop.checkpoints import misfits
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base, path = pathlib.Path(folder, "base.safetensors"), pathlib.Path(folder, "a")
        ...     save_file(model.state_dict(), base)
        ...     disha.save_adapter(disha.inject_adapters(model, "0", r=4), path)
        ...     misfits(base, path)
        []
    """
    adapter_file = inspect_adapter(adapter_path)
    checkpoint = open_checkpoint(base)
    return _misfits(checkpoint, adapter_file, _keys(checkpoint, adapter_file))


# --- a checkpoint --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A base checkpoint, opened but not read: the file of each tensor, and its stacks."""

    path: Path
    files: Mapping[str, Path]
    stacks: Mapping[str, Stack]

    def tensor(self, key: str) -> Tensor:
        """Return a tensor or a stack."""
        if key in self.stacks:
            return torch.stack(
                [torch.cat([*map(self.tensor, names)]) for names in self.stacks[key]]
            )
        with opened(self.files[key]) as file:
            return file.get_tensor(key)

    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], str]:
        """Return these of a tensor or a stack, the dtype as safetensors calls it."""
        if key in self.stacks:
            parts = [self.shape_and_dtype(name) for name in self.stacks[key][0]]
            (_, inputs), dtype = parts[0]
            outputs = sum(shape[0] for shape, _ in parts)
            return (len(self.stacks[key]), outputs, inputs), dtype
        with opened(self.files[key]) as file:
            stored = file.get_slice(key)
            return tuple(stored.get_shape()), stored.get_dtype()

    def config(self) -> dict[str, Any]:
        """Return the content of config.json in the folder, or beside the file; {} if none."""
        path = (self.path if self.path.is_dir() else self.path.parent) / CONFIG
        return json.loads(path.read_bytes()) if path.is_file() else {}


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Open a base checkpoint: a file, or a folder with one `model.safetensors` or an index."""
    path = checked_path(path)
    index = path / INDEX
    file = path / SINGLE if path.is_dir() else path
    if file == path or file.is_file():
        with opened(file) as tensors:
            files = dict.fromkeys(tensors.keys(), file)
    elif index.is_file():
        shards = json.loads(index.read_bytes())["weight_map"]
        files = {name: path / shard for name, shard in shards.items()}
    else:
        raise AdapterIOError(
            f"{path} holds neither {SINGLE} nor {INDEX}; name a checkpoint of safetensors"
        )
    return Checkpoint(path, files, _stacks_of(files))


def _stacks_of(names: Collection[str]) -> dict[str, Stack]:
    """Return stack's name in the model -> the stack, for all experts that are stored one by one."""
    found: dict[str, dict[int, tuple[str, ...]]] = {}
    for name in names:
        match = SINGLE_EXPERT.fullmatch(name.removesuffix(".weight"))
        if match is None or match[3] not in _FIRST_PARTS:
            continue
        block, last, parts = _FIRST_PARTS[match[3]]
        stack = f"{renamed(match[1], block, 'mlp')}.{last}"
        found.setdefault(stack, {})[int(match[2])] = tuple(
            f"{match[1]}.{match[2]}.{part}.weight" for part in parts
        )
    return {
        stack: tuple(experts[number] for number in sorted(experts))
        for stack, experts in found.items()
        if stack not in names  # else it is stored as one tensor too
        and max(experts) < len(experts)
        and all(name in names for rows in experts.values() for name in rows)
    }


# --- the weights of an adapter -------------------------------------------------------------------


def base_shapes(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters, by their names in the adapter's model."""
    keys = _stored(checkpoint, {name: (name,) for name in names})
    return {name: checkpoint.shape_and_dtype(key)[0] for name, key in keys.items()}


def base_weights(checkpoint: Checkpoint, contents: AdapterContents) -> Callable[[str], Tensor]:
    """Return a function from a layer's name to its base weight; it raises if the base is another.

    An adapter that asks for no weight can be of a base that is packed, or has other rows, here.
    """

    @cache
    def keys() -> dict[str, str]:
        found = _keys(checkpoint, contents)
        _refuse(checkpoint, _misfits(checkpoint, contents, found))
        return found

    def weight_of(layer: str) -> Tensor:
        key = keys()[layer]
        if not key.endswith((".weight", GATE_UP, DOWN)):  # such as attention's in_proj_weight
            raise ConversionError(
                f"{key} is not the weight of a module or a stack of experts, and LoRA adapts only "
                f"these; leave {layer} out of the adapter (`exclude`)"
            )
        return checkpoint.tensor(key)

    return weight_of


def _keys(checkpoint: Checkpoint, contents: AdapterContents) -> dict[str, str]:
    """Return layer, or parameter besides the blocks -> the name of its tensor in a checkpoint."""
    wanted: dict[str, tuple[str, ...]] = {}
    for layer in contents.layers:
        owner, _, last = layer.name.rpartition(".")
        wanted[layer.name] = (join(layer.name, "weight"), layer.name, *layer.tied)
        if last in PROJECTIONS:  # the rows of one weight of nn.MultiheadAttention, or a weight
            packed = "in_proj_weight" if layer.rows else f"{last}_weight"
            wanted[layer.name] += (join(owner, packed),)
    return _stored(checkpoint, wanted | {name: (name,) for name in contents.also_train})


def _stored(checkpoint: Checkpoint, wanted: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return name -> the first of its possible names that the checkpoint has.

    The names of a part of the model, such as its text layers, may begin otherwise there. If they
    do, fewer modules or more come before the same end, and no numbers such as those of layers. A
    `model` may come and go. No two parts have a tensor in common, and no part is in two places.
    """
    stored = checkpoint.files.keys() | checkpoint.stacks.keys()
    found = {name: key for name, keys in wanted.items() for key in reversed(keys) if key in stored}
    while len(found) < len(wanted):
        absent = [keys for name, keys in wanted.items() if name not in found]
        free = stored - set(found.values())
        starts = set()  # how names begin in the model, and in the checkpoint
        for key, name in product(absent[0], free):
            for start, _, other in SAME_END.findall(f"{key}\n{name}"):  # one, or none
                modules = {"model", *start.split(".")}
                others = {"model", *other.split(".")}
                shared = modules & others
                # The whole model may be one of several in a wrapper, such as the first.
                unnumbered = modules | others if found else shared
                if shared in (modules, others) and not any(map(str.isdigit, unnumbered)):
                    starts.add((start, other))
        parts = []
        for start, other in starts:
            part = {
                name: moved
                for name, keys in wanted.items()
                for key in reversed(keys)
                if key.startswith(start) and (moved := other + key.removeprefix(start)) in free
            }
            if part.keys().isdisjoint(found):
                parts.append(part)
        best = max(parts, key=len, default={})
        equal = [part for part in parts if len(part) == len(best)]
        if len(equal) != 1:
            names = first_few([keys[0] for keys in absent], 5, ", ")
            there = first_few(sorted(stored), 5, ", ")
            lacks = "fits by several prefixes" if equal else f"lacks {names}"
            raise AdapterFileError(
                f"{checkpoint.path} {lacks}; it has {there}. If "
                "a weight is tied, or has another name in the model, merge there (merge_adapters)"
            )
        found |= best
    return found


def _misfits(
    checkpoint: Checkpoint, contents: AdapterContents, keys: Mapping[str, str], values: bool = True
) -> list[str]:
    """Return the weights that are packed, of another shape, or of other values than the base's."""
    found = []
    replaced = {keys[name] for name in contents.also_train}
    for layer in contents.layers:
        key = keys[layer.name]
        shape, dtype = checkpoint.shape_and_dtype(key)
        problem = layer.reason_against_weight(contents.tensors[layer.key].shape, shape)
        if dtype not in DENSE:
            problem = f"is quantised or packed there ({dtype}); give the original checkpoint"
        elif problem is None and values and layer.base and key not in replaced:
            now = fingerprint(layer.layout.part(checkpoint.tensor(key), layer.rows))
            if now is not None and not same_base(layer.base, now):
                problem = "has other values than the weight that the adapter was saved from"
        found += [] if problem is None else [f"{key}: {problem}"]
    for name in contents.also_train:
        adapter_shape = contents.tensors[name].shape
        shape, _ = checkpoint.shape_and_dtype(keys[name])
        if shape != adapter_shape:
            found.append(f"{name}: {tuple(adapter_shape)}, the checkpoint has {shape}")
    return found


def _refuse(checkpoint: Checkpoint, problems: Sequence[str]) -> None:
    if problems:
        raise AdapterFileError(
            f"{checkpoint.path} is not the base of this adapter:\n{first_few(problems, 20)}\n"
            "Give the base that it was trained on, or merge with `force`"
        )


# --- checks before anything is written -----------------------------------------------------------


def _check_target(out: Path, checkpoint: Checkpoint, overwrite: bool) -> None:
    target = out.resolve()
    source = checkpoint.path.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise ArgumentError(f"can't write to {out}: the base is there; name another place")
    require_free(out, overwrite)
    is_checkpoint = any((out / name).is_file() for name in (SINGLE, INDEX))
    is_full = out.is_dir() and any(out.iterdir())
    if is_full and (out.suffix == SUFFIX or not is_checkpoint):
        raise ArgumentError(
            f"{out} is no checkpoint, and all in it would be deleted; name another folder"
        )


def _refuse_tied(
    checkpoint: Checkpoint, contents: AdapterContents, keys: Mapping[str, str]
) -> None:
    """Raise if an embedding that changes may be tied, as those of models are by default."""
    tied = [record.name for record in contents.layers if record.tied]  # there, both have the update
    embeddings = [
        record.name
        for record in contents.layers
        if record.layout.pattern == "index out" and not record.tied
    ]
    embeddings += _stored_twice(checkpoint, [*contents.also_train, *tied], keys)
    if not embeddings:
        return
    config = checkpoint.config()
    said = [
        part["tie_word_embeddings"]
        for part in (config, *config.values())
        if isinstance(part, dict) and "tie_word_embeddings" in part
    ]
    if any(said) or (not said and "model_type" in config):
        raise MergeError(
            f"{embeddings[0]} may be tied to an output head, which merging would change too "
            f"(tie_word_embeddings in {CONFIG}); merge in the model, with "
            "merge_adapters(model, untie=True)"
        )


def _stored_twice(
    checkpoint: Checkpoint, names: Iterable[str], keys: Mapping[str, str]
) -> list[str]:
    """Return the parameters whose matrix is stored under another name too, as a tied one may be."""
    matrices = {
        name: keys[name] for name in names if len(checkpoint.shape_and_dtype(keys[name])[0]) > 1
    }
    stored = checkpoint.files if matrices else ()
    marks = Counter(fingerprint(checkpoint.tensor(key)) for key in stored)
    return [n for n, key in matrices.items() if marks[fingerprint(checkpoint.tensor(key))] > 1]


# --- tensors -------------------------------------------------------------------------------------


class _Merge:
    """Computes and writes the tensors of the merged checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        keys: Mapping[str, str],
        contents: AdapterContents,
        scale: float | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._blocks = contents.tensors
        self._scale = scale
        self._values = {keys[name]: contents.tensors[name] for name in contents.also_train}
        self._layers = defaultdict[str, list[LayerRecord]](list)
        for record in contents.layers:
            self._layers[keys[record.name]].append(record)
        # Matrix of one expert -> its stack, and the number of the expert.
        self._parts = {
            name: (key, expert)
            for key in keys.values()
            for expert, names in enumerate(checkpoint.stacks.get(key, ()))
            for name in names
        }

    def write_file(self, path: Path) -> None:
        """Write all tensors to one file."""
        self._write(path, self._checkpoint.files)

    def _write(self, path: Path, names: Collection[str]) -> None:
        """Write some tensors to a file."""
        metadata = OF_TORCH
        for file in {self._checkpoint.files[name] for name in names}:
            with opened(file) as source:
                metadata = metadata | (source.metadata() or {})
        save_file({name: self._merged(name) for name in names}, path, metadata)

    def write_folder(self, folder: Path) -> None:
        """Write the shards, and copies of the index and of all other files that hold no weights."""
        base = self._checkpoint.path
        files = self._checkpoint.files
        folder.mkdir()
        for source in base.rglob("*"):
            target = source.relative_to(base)
            is_weights = source.name.endswith(WEIGHTS) and target != Path(INDEX)
            if source.is_file() and not is_weights and not re.search(r"(^|/)\.", target.as_posix()):
                (folder / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, folder / target)
        for file in {*files.values()}:
            names = [name for name, other in files.items() if other == file]
            self._write(folder / (SINGLE if file == base else file.name), names)

    def _merged(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._changed(name, name, self._checkpoint.tensor(name))
        key, expert = self._parts[name]
        names = self._checkpoint.stacks[key][expert]
        parts = [*map(self._checkpoint.tensor, names)]
        only = slice(expert, expert + 1)
        matrix = self._changed(key, name, torch.cat(parts)[None], only)[0]
        return torch.split(matrix, [*map(len, parts)])[names.index(name)].contiguous()

    def _changed(self, key: str, name: str, value: Tensor, experts: Any = ...) -> Tensor:
        """Return the new values of a tensor, or of one expert (1, out, in) of a stack."""
        dtype = value.dtype
        changed = value
        if key in self._values:
            changed = self._values[key][experts].to(dtype)
        if key in self._layers:
            changed = functional.merged_weight(changed, self._deltas(key, changed, experts))
        if changed is not value and not finite_as(changed, dtype) and finite_as(value, dtype):
            raise MergeError(f"{name} would not be finite in {dtype}; give a smaller `scale`")
        return changed

    def _deltas(self, key: str, weight: Tensor, experts: Any) -> Iterator[tuple[Tensor, float]]:
        for record in self._layers[key]:
            block = self._blocks[record.key][experts]
            method = METHODS[record.method]
            delta = method.delta_weight(record.layout, block, weight, record.rows, record.r)
            yield delta, record.scale if self._scale is None else self._scale
