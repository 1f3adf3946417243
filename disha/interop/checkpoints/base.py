"""A base checkpoint on disk, and the weights of an adapter in it.

A checkpoint is one safetensors file, or a folder as Hugging Face libraries write it. Its names are
those of the adapter's model, or all of them have one prefix more, or one prefix less.

Many models of `transformers` join the experts of a layer as they load a checkpoint: the matrices
`experts.0.gate_proj.weight`, `experts.0.up_proj.weight` and so on become one parameter
`experts.gate_up_proj` (expert, out, in). An adapter names this stack, so a checkpoint gets the
names of its stacks too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disha.errors import AdapterFileError, AdapterIOError
from disha.files import inspect_adapter
from disha.files.header import AdapterHeader
from disha.files.opening import opened
from disha.files.saving import PathLike, checked_path
from disha.fingerprint import fingerprint, same_base
from disha.interop.experts import DOWN, FAMILIES, GATE_UP, SEPARATE_BEFORE, by_expert, renamed
from disha.layers.kinds import PROJECTIONS
from disha.model import join
from disha.records import LayerRecord
from disha.text import first_few

__all__ = ["Checkpoint", "base_shapes", "base_weights", "misfits", "open_checkpoint"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5")
"""Endings of the names of weight files and their indexes, which are not copied."""

DENSE = ("F64", "F32", "BF16", "F16")
"""The dtypes of weights that are not quantised, as safetensors calls them."""

_FAMILIES = {one.gate: one for one in FAMILIES.values() if one.layout == SEPARATE_BEFORE}

Stack = tuple[tuple[str, ...], ...]
"""For each expert, the tensors whose rows, one after the other, are its matrix (out, in)."""


@dataclass(frozen=True)
class Checkpoint:
    """A base checkpoint, opened but not read: its path, and the file of each tensor."""

    path: Path
    files: Mapping[str, Path]

    @property
    def folder(self) -> Path | None:
        """The folder, or None if the checkpoint is one file."""
        return self.path if self.path.is_dir() else None

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, by its name in the checkpoint."""
        with opened(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, by its name in the checkpoint."""
        with opened(self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor, as safetensors calls it, by its name in the checkpoint."""
        with opened(self.files[name]) as file:
            return str(file.get_slice(name).get_dtype())

    def config(self) -> dict[str, Any]:
        """Return the content of config.json in the folder, or beside the file; {} if none."""
        path = (self.folder or self.path.parent) / CONFIG
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def other_files(self) -> list[Path]:
        """Return the files in the folder that hold no weights; hidden ones are left out."""
        if self.folder is None:
            return []
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return [
            path
            for path in found
            if (path == self.folder / INDEX or not path.name.endswith(WEIGHTS))
            and not any(part.startswith(".") for part in path.relative_to(self.folder).parts)
        ]


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Open a base checkpoint without reading its tensors.

    Args:
        path: one safetensors file; or a folder with a `model.safetensors`, or with shards and a
            `model.safetensors.index.json`.

    Raises:
        AdapterIOError: it can't be read, or does not exist.
        AdapterFileError: it is damaged, or the index names no shards.

    Examples:
        >>> import pathlib, tempfile
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> from disha.interop.checkpoints import open_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(nn.Linear(3, 2).state_dict(), pathlib.Path(folder, "model.safetensors"))
        ...     open_checkpoint(folder).shape("weight")
        (2, 3)
    """
    path = checked_path(path)
    if path.is_dir() and not (path / SINGLE).is_file():
        return Checkpoint(path, _shards(path))
    file = path / SINGLE if path.is_dir() else path
    with opened(file) as tensors:
        return Checkpoint(path, dict.fromkeys(tensors.keys(), file))


def _shards(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    if not index.is_file():
        raise AdapterIOError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; name a checkpoint of safetensors"
        )
    names = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    if not names:
        raise AdapterFileError(f"{index}: weight_map names no tensors; get the folder again")
    return {name: folder / shard for name, shard in names.items()}


# --- the weights of an adapter -------------------------------------------------------------------


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
    header = inspect_adapter(adapter_path)
    found = BaseOf(open_checkpoint(base), header.layers, header.also_train)
    return found.wrong_shapes(header) or found.other_values(header)


def base_shapes(
    checkpoint: Checkpoint, names: Iterable[str]
) -> Callable[[str], tuple[int, ...] | None]:
    """Return a function from a parameter's name in the adapter's model to its shape, or None.

    Args:
        checkpoint: the base.
        names: all parameters that will be asked for; `AdapterFileError` if it lacks some of them.

    Examples:
        >>> import pathlib, tempfile
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> from disha.interop.checkpoints import base_shapes, open_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "model.safetensors")
        ...     save_file({"model.0.weight": nn.Linear(3, 2).weight}, path)
        ...     base_shapes(open_checkpoint(path), ["0.weight"])("0.weight")
        (2, 3)
    """
    base = BaseOf(checkpoint, (), names)

    def shape(name: str) -> tuple[int, ...] | None:
        key = base.rename(name)
        return base.shape(key) if key in base.stored else None

    return shape


def base_weights(checkpoint: Checkpoint, header: AdapterHeader) -> Callable[[str], Tensor]:
    """Return a function from the name of a layer to its base weight, as the model stores it.

    Raises `AdapterFileError` if the checkpoint is not the base that the adapter was saved from.

    Examples:
        >>> import pathlib, tempfile
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop.checkpoints import base_weights, open_checkpoint
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base, path = pathlib.Path(folder, "base.safetensors"), pathlib.Path(folder, "a")
        ...     save_file(model.state_dict(), base)
        ...     disha.save_adapter(disha.inject_adapters(model, "0", r=4), path)
        ...     weight = base_weights(open_checkpoint(base), disha.inspect_adapter(path))
        ...     tuple(weight("0").shape)
        (16, 8)
    """
    base = BaseOf(checkpoint, header.layers, ())
    base.refuse(base.wrong_shapes(header) or base.other_values(header))
    return lambda name: base.tensor(base.keys[name])


class BaseOf:
    """A checkpoint, asked for the weights of one adapter by their names in its model."""

    def __init__(
        self, checkpoint: Checkpoint, layers: Sequence[LayerRecord], beside: Iterable[str]
    ) -> None:
        self.checkpoint = checkpoint
        stacks = stacks_of(checkpoint.files)
        # A stack that is stored as one tensor too is that tensor.
        self.stacks = {name: stacks[name] for name in stacks if name not in checkpoint.files}
        self.stored: Collection[str] = self.stacks.keys() | checkpoint.files.keys()
        wanted = {layer.name: _possible_keys(layer) for layer in layers}
        wanted |= {name: (name,) for name in beside}
        self._less, self._more = self._prefix(list(wanted.values()))
        self.keys = {name: self._stored_key(keys) for name, keys in wanted.items()}

    def rename(self, name: str) -> str:
        """Return the name in the checkpoint of a parameter of the adapter's model."""
        return self._more + name.removeprefix(self._less)

    def _stored_key(self, keys: Iterable[str]) -> str:
        return next(key for key in map(self.rename, keys) if key in self.stored)

    def _prefix(self, wanted: Sequence[tuple[str, ...]]) -> tuple[str, str]:
        """Return the prefix that the checkpoint lacks, and the one that it has in addition."""
        prefixes = {("", "")}
        for key in wanted[0] if wanted else ():
            prefixes |= {("", one.removesuffix(key)) for one in self.stored if _ends(one, key)}
            prefixes |= {(key.removesuffix(one), "") for one in self.stored if _ends(key, one)}

        def missing(prefix: tuple[str, str]) -> list[str]:
            self._less, self._more = prefix
            return [
                keys[0] for keys in wanted if not any(self.rename(k) in self.stored for k in keys)
            ]

        # Names as they are win; so does the shorter prefix, to name it in the error.
        best, *others = sorted(prefixes, key=lambda one: (len(missing(one)), len(one[0] + one[1])))
        absent = missing(best)
        if absent or (best != ("", "") and any(not missing(one) for one in others)):
            there = first_few(sorted(self.stored), 5, ", ")
            lacks = f"lacks {first_few(absent, 5, ', ')}" if absent else "fits by several prefixes"
            raise AdapterFileError(
                f"{self.checkpoint.path} {lacks}; it has {there}. If "
                "a weight is tied, merge the adapter in the model (merge_adapters)"
            )
        return best

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor or a stack, by its name in the checkpoint."""
        if key not in self.stacks:
            return self.checkpoint.shape(key)
        experts = self.stacks[key]
        shapes = [self.checkpoint.shape(name) for name in experts[0]]
        return len(experts), sum(rows for rows, _ in shapes), shapes[0][1]

    def tensor(self, key: str) -> Tensor:
        """Return a tensor or a stack, by its name in the checkpoint."""
        if key not in self.stacks:
            return self.checkpoint.tensor(key)
        return torch.stack([self.matrix(names) for names in self.stacks[key]])

    def matrix(self, names: Iterable[str]) -> Tensor:
        """Return the matrix (out, in) of one expert."""
        return torch.cat([self.checkpoint.tensor(name) for name in names])

    def wrong_shapes(self, header: AdapterHeader) -> list[str]:
        """Return the weights that are quantised, or have another shape than in the adapter."""
        found = []
        for layer in header.layers:
            key = self.keys[layer.name]
            dtype = self.checkpoint.dtype(self.stacks[key][0][0] if key in self.stacks else key)
            problem = layer.reason_against_weight(header.tensors[layer.key].shape, self.shape(key))
            if dtype not in DENSE:
                problem = f"is quantised or packed there ({dtype}); give the original checkpoint"
            found += [] if problem is None else [f"{key}: {problem}"]
        for name in header.also_train:
            own, shape = tuple(header.tensors[name].shape), self.shape(self.keys[name])
            found += [] if shape == own else [f"{name}: {own}, the checkpoint has {shape}"]
        return found

    def other_values(self, header: AdapterHeader) -> list[str]:
        """Return the layers whose weights are not those that the adapter was saved from."""
        found = []
        replaced = {self.keys[name] for name in header.also_train}
        for layer in header.layers:
            key = self.keys[layer.name]
            if layer.base is None or key in replaced:
                continue
            now = fingerprint(layer.adapted_part(self.tensor(key)))
            if now is not None and not same_base(now, layer.base):
                found.append(
                    f"{key}: has other values than the weight that the adapter was saved from"
                )
        return found

    def refuse(self, problems: Sequence[str]) -> None:
        """Raise with all problems, if there are any."""
        if problems:
            raise AdapterFileError(
                f"{self.checkpoint.path} is not the base of this adapter:\n"
                f"{first_few(problems, 20)}\nGive the base that it was trained on, or merge with "
                "`force`"
            )


def _ends(name: str, key: str) -> bool:
    return bool(key) and name.endswith(f".{key}")


def _possible_keys(record: LayerRecord) -> tuple[str, ...]:
    """Return the possible names of a layer's weight, as in the adapter's model."""
    owner, _, last = record.name.rpartition(".")
    own = (join(record.name, "weight"), record.name)
    if last not in PROJECTIONS:
        return own
    # The q, k and v of an nn.MultiheadAttention are rows of one weight, or weights of their own.
    return (*own, join(owner, "in_proj_weight" if record.rows else f"{last}_weight"))


def stacks_of(names: Iterable[str]) -> dict[str, Stack]:
    """Return stack's name in the model -> the stack, for all experts that are stored one by one."""
    weights = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    found: dict[str, Stack] = {}
    for module, projections in by_expert(weights).items():
        family = next((one for gate, one in _FAMILIES.items() if gate in projections), None)
        if family is None:
            continue
        home = renamed(module, family.block, "mlp")
        for last, parts in ((GATE_UP, (family.gate, family.up)), (DOWN, (family.down,))):
            experts = [projections.get(part, {}) for part in parts]
            numbers = range(len(experts[0]))
            if all(set(one) == set(numbers) for one in experts):
                found[f"{home}.{last}"] = tuple(
                    tuple(f"{one[number]}.weight" for one in experts) for number in numbers
                )
    return found
