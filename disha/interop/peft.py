"""Adapters in PEFT folders of MiSS (PEFT's current name for Bone) and of Bone (its former name).

`export` and `load` have the model, so they can check that PEFT would compute the same results.
`write_folder`, `read_folder` and `contents_of` work without a model:

- A folder does not say how large a layer's input is, so `contents_of` asks for the shapes of the
  base's weights.
- Only `export` can write parameters that were trained with the blocks. PEFT saves complete
  modules, and an adapter file does not say what else a module contains.

`export` and `write_folder` refuse what PEFT can't store, before they write anything: layers other
than `nn.Linear`, a scale, a different r in each layer, BAT with sizes that r does not divide or
with dropout. They leave out your own notes and the fingerprint of the base.
"""

from __future__ import annotations

import torch
from torch import nn

from disha.files.atomic import PathLike, checked_path
from disha.files.contents import adapter_contents, load_contents
from disha.interop.miss import (
    CANT_EXPRESS,
    BaseShapes,
    PeftFolder,
    contents_of,
    inexpressible,
    peft_config,
    read_folder,
    write,
    write_folder,
)
from disha.interop.peft_files import exact_targets, refuse_to_load
from disha.interop.peft_view import PeftView, other_buffers, refuse_to_write
from disha.layers import check_adapter_name, original_class
from disha.model import ModelView
from disha.state import LoadReport

__all__ = [
    "BaseShapes",
    "PeftFolder",
    "contents_of",
    "export",
    "load",
    "read_folder",
    "write_folder",
]


def export(
    model: nn.Module,
    folder: PathLike,
    adapter: str = "default",
    *,
    dropout: float | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write an adapter as a folder that PEFT loads, with the same results.

    `PeftModel.from_pretrained(base, folder)` of PEFT 0.18 and later reads it. `target_modules`
    in the configuration selects the adapted layers and no other module of this model. Parameters
    that were trained with the adapter become `modules_to_save`, or `bias`. Bone is also exactly a
    LoRA, which `disha.interop.lora` writes.

    The folder keeps the dtype of the blocks. PEFT casts blocks of 16 bits to float32 when it
    loads them, unless it gets `autocast_adapter_dtype=False`.

    With several processes, call it as you call `save_adapter`.

    Args:
        model: a model with adapters.
        folder: created if it does not exist. Other files in it stay, and each file that is
            replaced stays until the new ones are complete.
        adapter: the adapter's name. The folder does not contain it.
        dropout: written in place of the adapter's dropout.
        base_model_name_or_path: where PEFT's `AutoPeftModel` finds the base.
        task_type: PEFT's, such as `"CAUSAL_LM"`.

    Raises:
        AdapterIOError: the folder can't be written; what was there is unchanged.
        ConversionError: PEFT's MiSS can't express the adapter; the message lists every reason.
        ArgumentError: there is no such adapter, or `dropout` is out of range.
        AdapterStateError: as for `save_adapter`.

    Nothing is written if this raises.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     disha.interop.peft.export(model, folder)
        ...     config = json.loads(pathlib.Path(folder, "adapter_config.json").read_text())
        ...     base = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        ...     disha.interop.peft.load(base, folder).matched
        ('0.bone_block',)
        >>> config["peft_type"], config["r"], config["target_modules"]
        ('MISS', 4, ['0'])
    """
    view = ModelView(model)
    ranks, action = view.ranks(), f"export adapter {adapter!r} to PEFT"
    notes = {"base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
    with ranks.agreeing(action):
        target = checked_path(folder)
    header, tensors = adapter_contents(view, adapter)
    with ranks.agreeing(action):
        peft, names = PeftView(view), [layer.name for layer in header.layers]
        saved = peft.saved(header.also_train, names, biases=True)
        problems = inexpressible(header, dropout)
        problems += peft.obstacles(names, _unknown_to_miss, exporting=True)
        refuse_to_write(CANT_EXPRESS, problems + list(saved.problems))
        targets = exact_targets(names, peft.modules)
        config = peft_config(header, dropout, targets, saved, notes)
    beside = saved.copies()
    with ranks.agreeing(action):
        if ranks.writes:
            write(target, header, tensors, config, beside)


def load(
    model: nn.Module,
    folder: PathLike,
    adapter: str = "default",
    *,
    also_train: bool = True,
    replace: bool = False,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> LoadReport:
    """Load a PEFT folder of MiSS or of Bone into a model, with the same results as in PEFT.

    The folder's tensors say which layers are adapted. A list in `target_modules` must agree with
    them; regexes and other fields that select layers are not evaluated. Every other field of
    `adapter_config.json` means what it means in PEFT, or is refused. `modules_to_save` and `bias`
    become parameters trained with the adapter. BAT gets no dropout, because PEFT's BAT has none.

    Args:
        model: the base model, or one that has other adapters.
        folder: the folder, written by PEFT's `save_pretrained` or by `export`.
        adapter: the name that the adapter gets in this model.
        also_train: also set the parameters that the folder holds besides the blocks.
        replace: if the model has an adapter of that name, copy the folder's values into it.
        dtype: dtype of the blocks; the folder's by default.
        freeze: freeze all parameters that belong to no adapter, as `inject_adapters` does.

    Returns:
        A `LoadReport` of the keys that were loaded.

    Raises:
        AdapterIOError: the folder can't be read.
        AdapterFileError: it is not a valid folder of MiSS or Bone, or does not fit the model, or
            its results here would differ from those in PEFT; the message lists every reason.
        ArgumentError: the name is taken and `replace` is not set.
        ModeError: adapters are merged (`MergeError`), disabled or routed.

    The model is unchanged if this raises.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> base, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), torch.ones(1, 8)
        >>> weights = base.state_dict()
        >>> model = disha.inject_adapters(base, "0", r=4, init="kaiming")
        >>> fresh = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     disha.interop.peft.export(model, folder)
        ...     _ = fresh.load_state_dict(weights)
        ...     print(disha.interop.peft.load(fresh, folder))
        1 key fits
        >>> torch.equal(fresh(x), model(x))
        True
    """
    view = ModelView(model)
    with view.ranks().agreeing(f"load a PEFT folder as adapter {adapter!r}"):
        check_adapter_name(adapter)
        peft, found = PeftView(view), read_folder(folder)
        buffers = peft.buffers()
        problems = peft.obstacles(found.blocks, _unknown_to_miss, exporting=False)
        refuse_to_load(found.path, problems + other_buffers(buffers, found.beside))
        contents = contents_of(found.without(buffers), peft.shape, also_train=also_train)
        header, tensors = peft.under_first_names(found.path, contents)
    return load_contents(
        view, found.path, header, tensors, adapter, replace=replace, dtype=dtype, freeze=freeze
    )


def _unknown_to_miss(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return None
    return f"PEFT's MiSS adapts nn.Linear only, not {original_class(module).__name__}"
