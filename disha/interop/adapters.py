"""Load or inspect an adapter, whichever library has saved it."""

from __future__ import annotations

from dataclasses import replace as replace_fields

import torch
from torch import nn

from disha.files import AdapterFile, file_at, find_adapter
from disha.files.contents import keep_blocks, keep_matching, read_contents
from disha.files.disk import PathLike
from disha.files.loading import load_contents
from disha.interop import image_lora
from disha.interop.checkpoints.matching import read_adapter
from disha.interop.checkpoints.reading import open_checkpoint
from disha.interop.peft_format import find_folder
from disha.interop.peft_reading import read_for_model
from disha.model.state import LoadReport
from disha.model.view import ModelView


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
    """Load an adapter into a model, injecting the layers that it describes.

    The file says which layers are adapted and how, so the model can be a plain one. If it has
    adapters already, the loaded one is added and becomes the active one.

    Of the folders of PEFT, a LoRA becomes an adapter of `method="lora"`, which trains on, and which
    `disha.interop.lora.export` writes as it was. If every A is [I_r I_r ... I_r], as `export`
    writes it for Bone, it becomes Bone again, with its groups, without loss. Experts must be
    stacked. MiSS and Bone become Bone, tile or BAT, which gets no dropout, because PEFT's has none.
    Modules in `modules_to_save` bring their parameters and buffers. DoRA and trained biases are
    refused.

    A model inside DDP or FSDP can't get new layers: load first and wrap afterwards, or load with
    `replace=True`. Call this on all ranks. If anything is wrong on one rank, all ranks raise, and
    no model changes.

    Args:
        model: the base model, or one that has other adapters.
        path: the file, a folder with a file `adapter.safetensors`, a folder that PEFT has saved (a
            LoRA, MiSS or Bone), a LoRA file of an image model, or the name of a repository on the
            Hugging Face Hub that has one of these: `"user/repo"` or `"user/repo@revision"`.
        adapter: the name that the adapter gets in this model.
        layers: a regex, searched in the names of the layers; only matching layers are loaded.
        also_train: also set the parameters and buffers that the file holds. They can
            belong to only one adapter: if another one has changed them, this raises.
        replace: if the model has an adapter of that name, copy the file's values into it, in place
            (hot swap). The shapes must agree, or the file's r divides the model's (Bone, tile).
            Without `layers`, the adapter's layers and buffers that the file lacks then act as in
            the base. Parameters of `also_train` that it lacks keep their values.
        dtype: dtype of the blocks; the file's by default.
        freeze: freeze all parameters that belong to no adapter, as `inject_adapters` does.
        activate: make a new adapter the only active one. Without it, its blocks require gradients
            too, so that it trains as soon as it is active; until then they get none.

    Returns:
        A `LoadReport` of the keys that were loaded.

    Raises:
        AdapterIOError: the file can't be read.
        AdapterFileError: it is not a valid adapter file, or does not fit the model; the message
            lists every reason.
        ConversionError: a folder of PEFT holds more than a LoRA, such as DoRA.
        ArgumentError: the name is taken and `replace` is not set, or no layer's name matches
            `layers`.
        ModeError: adapters are merged (`MergeError`), or in a context.

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
    action = f"load a file as adapter {adapter!r}"
    with view.ranks.fail_together(action):
        source = find_adapter(path)
        folder = find_folder(source)
        if folder is None:
            source = file_at(source)
            if image_lora.has_factors(source):
                contents = image_lora.read_for_model(view, source)
            else:
                contents = read_contents(source)
    if folder is not None:
        contents = read_for_model(view, folder, also_train=also_train)
    if not also_train:
        contents = keep_blocks(contents)
    with view.ranks.fail_together(action):
        contents = keep_matching(contents, layers, source)
    return load_contents(
        view,
        source,
        contents,
        adapter,
        replace=replace,
        partial=layers is not None,
        dtype=dtype,
        freeze=freeze,
        activate=activate,
    )


def inspect_adapter(path: PathLike, base: PathLike | None = None) -> AdapterFile:
    """Return what an adapter file says of the adapter, without reading any tensor.

    Args:
        path: the file, or what else `load_adapter` takes, except a LoRA file of an image model.
        base: the checkpoint of the base, which a folder of PEFT may need: MiSS does not tell the
            sizes of layers, and a LoRA of experts not how they are laid out.

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
        ...     file = disha.inspect_adapter(path)
        >>> [(layer.name, layer.r, layer.in_features) for layer in file.layers]
        [('0', 4, 8)]
        >>> file.parameters, dict(file.metadata)
        (64, {'task': 'dialogue'})
    """
    checkpoint = None
    if base is not None:
        checkpoint = open_checkpoint(base)
    file = read_adapter(path, checkpoint)
    without_values = {key: tensor.to("meta") for key, tensor in file.tensors.items()}
    return replace_fields(file, tensors=without_values)
