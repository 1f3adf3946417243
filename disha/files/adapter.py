"""Save an adapter to a file, inspect a file, and load one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from disha.files.contents import adapter_contents, load_contents, read_contents, write_contents
from disha.files.header import AdapterFile
from disha.files.opening import file_at
from disha.files.saving import PathLike
from disha.layers.adapters import check_adapter_name
from disha.model import ModelView
from disha.state import LoadReport

__all__ = ["inspect_adapter", "load_adapter", "save_adapter"]


def save_adapter(
    model: nn.Module,
    path: PathLike,
    adapter: str = "default",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter, and nothing else of the model, to one safetensors file.

    The adapter is its blocks, the parameters of `also_train`, and the running statistics of norms
    that training has changed. An existing file stays until the new one is complete. The same
    adapter gives the same bytes, also from a wrapped, sharded or merged model.

    If `fully_shard` has sharded the model, call this on all ranks: they gather the adapter, and the
    first one writes the file. Otherwise, also under DDP, rank 0 is enough.

    Args:
        model: a model with adapters.
        path: the file to write. For a folder (it exists, or the path ends with a slash), the file
            is `adapter.safetensors` in it.
        adapter: the adapter's name. The file does not contain it.
        metadata: your notes, str -> str.

    Raises:
        AdapterIOError: the file can't be written. An existing file is unchanged.
        AdapterStateError: the adapter holds values that are not finite, or has no values (on the
            meta device), or its blocks differ in method or r_out.
        ArgumentError: there is no such adapter.
        ArgumentTypeError: the metadata is not str -> str.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     disha.save_adapter(model, f"{folder}/adapter.safetensors")
        ...     list(disha.inspect_adapter(folder).tensors)
        ['0.bone_block']
    """
    view = ModelView(model)
    ranks, action = view.ranks(), f"save adapter {adapter!r}"
    with ranks.agreeing(action):
        view.require(adapter)
        target = file_at(path)
    header, tensors = adapter_contents(view, adapter, metadata)
    with ranks.agreeing(action):
        if ranks.writes:
            if Path(path) != target:  # the user named a folder
                target.parent.mkdir(exist_ok=True)
            write_contents(target, header, tensors)


def inspect_adapter(path: PathLike) -> AdapterFile:
    """Return the header of an adapter file, without reading any tensor.

    Args:
        path: the file, or a folder with a file `adapter.safetensors`.

    Raises:
        AdapterIOError: the file can't be read.
        AdapterFileError: it is not a valid adapter file.

    Examples:
        >>> import tempfile, pathlib
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "adapter.safetensors")
        ...     disha.save_adapter(model, path, metadata={"task": "dialogue"})
        ...     found = disha.inspect_adapter(path)
        >>> [(layer.name, layer.r, layer.in_features) for layer in found.layers]
        [('0', 4, 8)]
        >>> found.parameters, dict(found.metadata)
        (64, {'task': 'dialogue'})
    """
    return read_contents(file_at(path))[0]


def load_adapter(
    model: nn.Module,
    path: PathLike,
    adapter: str = "default",
    *,
    layers: str | None = None,
    also_train: bool = True,
    replace: bool = False,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
    activate: bool = True,
) -> LoadReport:
    """Load an adapter file into a model, injecting the layers that it describes.

    The file says which layers are adapted and how, so the model can be a plain one. If it has
    adapters already, the loaded one is added and becomes the active one.

    A model inside DDP or FSDP can't get new layers: load first and wrap afterwards, or load with
    `replace=True`. Call this on all ranks. If anything is wrong on one rank, all ranks raise, and
    no model changes.

    Args:
        model: the base model, or one that has other adapters.
        path: the file, or a folder with a file `adapter.safetensors`.
        adapter: the name that the adapter gets in this model.
        layers: a regex, searched in the names of the layers; only matching layers are loaded.
        also_train: also set the parameters and running statistics that the file holds.
        replace: if the model has an adapter of that name, copy the file's values into it, in place
            (hot swap). The shapes must agree, or the file's r divides the model's (Bone, tile).
            Layers that the file lacks get zeros, and running statistics the values of the base.
            `also_train` parameters that the file lacks keep their values.
        dtype: dtype of the blocks; the file's by default.
        freeze: freeze all parameters that belong to no adapter, as `inject_adapters` does.
        activate: make a new adapter the only active one.

    Returns:
        A `LoadReport` of the keys that were loaded.

    Raises:
        AdapterIOError: the file can't be read.
        AdapterFileError: it is not a valid adapter file, or does not fit the model; the message
            lists every misfit.
        ArgumentError: the name is taken and `replace` is not set, or no layer's name matches
            `layers`.
        ModeError: adapters are merged (`MergeError`), disabled or routed.

    The model is unchanged whenever this raises.

    Warns:
        AdapterFileWarning: the adapter was saved from other base weights.

    Examples:
        >>> import tempfile, pathlib
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> base = nn.Sequential(nn.Linear(8, 16))
        >>> base.load_state_dict(model.state_dict(), strict=False).missing_keys
        []
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "adapter.safetensors")
        ...     disha.save_adapter(model, path)
        ...     disha.load_adapter(base, path).matched
        ('0.bone_block',)
    """
    view = ModelView(model)
    with view.ranks().agreeing(f"load a file as adapter {adapter!r}"):
        check_adapter_name(adapter)
        header, tensors = read_contents(file_at(path), also_train=also_train, layers=layers)
    return load_contents(
        view,
        header.path,
        header,
        tensors,
        adapter,
        replace=replace,
        partial=layers is not None,
        dtype=dtype,
        freeze=freeze,
        activate=activate,
    )
