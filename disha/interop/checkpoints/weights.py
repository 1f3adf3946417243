"""What conversions ask of a base checkpoint: the weights of an adapter's layers, and their shapes.

Both find a layer where merging finds it: under its name, or with one prefix more or less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from disha.errors import AdapterFileError
from disha.files.header import AdapterHeader
from disha.files.tensors import DTYPES
from disha.fingerprint import fingerprint, same_base
from disha.interop.checkpoints.names import key_of, nearest, renaming
from disha.interop.checkpoints.reading import Checkpoint

__all__ = ["base_shapes", "base_weights"]


def base_shapes(
    checkpoint: Checkpoint, names: Iterable[str]
) -> Callable[[str], tuple[int, ...] | None]:
    """Return what gives the shape of a parameter by its name in the adapter's model, or None.

    Args:
        checkpoint: the base.
        names: all parameters that will be asked for.

    Raises:
        AdapterFileError: it is unclear which tensors of the checkpoint are meant.

    Examples:
        >>> import tempfile, pathlib
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> from disha.interop.checkpoints import base_shapes, open_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "model.safetensors")
        ...     save_file({"model.0.weight": torch.zeros(2, 3)}, path)
        ...     shape = base_shapes(open_checkpoint(path), ["0.weight"])
        >>> shape("0.weight"), shape("1.weight")
        ((2, 3), None)
    """
    rename = renaming(checkpoint.path, (), tuple(names), checkpoint.tensors)

    def shape(name: str) -> tuple[int, ...] | None:
        stored = checkpoint.tensors.get(rename(name) or "")
        return None if stored is None else stored.shape

    return shape


def base_weights(checkpoint: Checkpoint, header: AdapterHeader) -> Callable[[str], Tensor]:
    """Return what gives the base weight of a layer by the layer's name, as the model has it.

    It raises `AdapterFileError` if the checkpoint has none for the layer, has it quantised, or has
    other values than the adapter was saved from.

    Args:
        checkpoint: the base.
        header: what describes the adapter.

    Raises:
        AdapterFileError: it is unclear which tensors of the checkpoint are the adapter's.

    Examples:
        >>> import tempfile, pathlib
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
        ...     bool((weight("0") == model[0].weight).all())
        True
    """
    rename = renaming(checkpoint.path, header.layers, (), checkpoint.tensors)
    records = {record.name: record for record in header.layers}

    def weight(name: str) -> Tensor:
        record = records[name]
        key = key_of(record, checkpoint.tensors, rename)
        if key is None:
            wanted = f"{name}.weight"
            close = ", ".join(nearest(wanted, checkpoint.tensors))
            raise AdapterFileError(
                f"{checkpoint.path} has no weight for layer {name!r}; the nearest names are "
                f"{close}. Give the base that the adapter was trained on"
            )
        stored = checkpoint.tensors[key]
        if stored.dtype not in DTYPES:
            raise AdapterFileError(
                f"{checkpoint.path} stores {key} as {stored.dtype}: quantised or packed; "
                "give the checkpoint that it was made from"
            )
        block = header.tensors[record.key].shape
        problem = record.weight_misfit(block, stored.shape)
        if problem is not None:
            raise AdapterFileError(
                f"{checkpoint.path} has no weight for layer {name!r} under {key}: {problem}; give "
                "the base that the adapter was trained on"
            )
        value = checkpoint.tensor(key)
        now = fingerprint(record.adapted_part(value))
        if now is not None and record.base is not None and not same_base(now, record.base):
            raise AdapterFileError(
                f"{key} of {checkpoint.path} has other values than the weight that the "
                "adapter was saved from; give the base that it was trained on"
            )
        return value

    return weight
