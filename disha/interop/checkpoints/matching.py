"""Find the weights of an adapter in a base checkpoint, and ask whether the two belong together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import product

from torch import Tensor

from disha.errors import (
    AdapterFileError,
    ConversionError,
)
from disha.files import AdapterContents, inspect_adapter
from disha.files.disk import PathLike
from disha.interop.checkpoints.reading import Checkpoint, open_checkpoint
from disha.interop.experts import DOWN, GATE_UP
from disha.layers.kinds import PROJECTIONS
from disha.model.fingerprints import fingerprint, same_base
from disha.text import first_few, join

DENSE = ("F64", "F32", "BF16", "F16")  # the dtypes of weights that are not quantised

SAME_END = re.compile(r"^(|.*?\.)(.+)\n(|.*\.)\2$")
"""Two names with the same end: how one begins, the end, and how the other begins."""


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
    return find_misfits(checkpoint, adapter_file, find_keys(checkpoint, adapter_file))


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
        found = find_keys(checkpoint, contents)
        refuse(checkpoint, find_misfits(checkpoint, contents, found))
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


def find_keys(checkpoint: Checkpoint, contents: AdapterContents) -> dict[str, str]:
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


def find_misfits(
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


def refuse(checkpoint: Checkpoint, problems: Sequence[str]) -> None:
    if problems:
        raise AdapterFileError(
            f"{checkpoint.path} is not the base of this adapter:\n{first_few(problems, 20)}\n"
            "Give the base that it was trained on, or merge with `force`"
        )
