"""Adapters in PEFT folders of MiSS (PEFT's current name for Bone) and of Bone (its former name).

The blocks have the same values and shapes in PEFT. What PEFT can't store is refused before anything
is written: layers other than `nn.Linear`, a scale, a different r in each layer, BAT with sizes that
r does not divide or with dropout. Your own notes and the fingerprint of the base are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disha.checks import check_type
from disha.config import AdapterConfig
from disha.errors import AdapterFileError, DishaError
from disha.files.disk import PathLike, check_path
from disha.files.header import AdapterContents, reasons_against_blocks
from disha.files.loading import load_contents
from disha.files.saving import adapter_contents
from disha.functional import Layout
from disha.interop.low_rank import LoraLayer, LoraReport
from disha.interop.peft_format import (
    FROZEN,
    NOTES,
    THE_MODEL_ITSELF,
    PeftFolder,
    compare_untrained,
    exact_targets,
    find_saved_modules,
    keep_for_model,
    module_names,
    notes_of,
    read_config,
    read_peft_files,
    reasons_against,
    refuse_to_load,
    refuse_to_write,
    write_peft_files,
)
from disha.layers.blocks import original_class
from disha.model.records import LayerRecord, Tensors
from disha.model.state import LoadReport
from disha.model.view import ModelView
from disha.text import brief, join

__all__ = ["export", "load", "read_config"]

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the base's parameters by name, such as "layers.0.q_proj.weight": (out, in)."""

ShapesOf = Callable[[Sequence[str]], Shapes]
"""Takes the names of parameters, and returns their shapes.

If the base lacks a parameter, its shape is left out, or an error says that the base lacks it.
"""

LINEAR = Layout("out in")

MISS_BLOCK, BONE_BLOCK = ".miss_block", ".bone_block"
"""The ends of the keys of blocks, in folders of MiSS and of Bone."""

BAT = "bat"
"""The method for which PEFT has no padding and no dropout."""

TILE = "mini"
"""PEFT's word for a tile in `init_weights`."""

INIT_WEIGHTS = {"bone": True, BAT: BAT}
"""Method -> PEFT's word for it in `init_weights`, except for a tile."""

READ_INIT_WEIGHTS = {True: "bone", False: "bone", BAT: BAT, TILE: "bone"}
"""PEFT's word -> the method. False means random values at the start of training."""

CANT_EXPRESS = "the adapter can't be written for PEFT's MiSS"
ELSE = "Write a LoRA (disha.interop.lora), which holds more, or merge (merge_adapters)"

# --- a model -------------------------------------------------------------------------------------


def export(
    model: nn.Module,
    folder: PathLike,
    adapter: str = "default",
    *,
    dropout: float | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> LoraReport:
    """Write an adapter as a folder that PEFT loads, with the same results.

    `PeftModel.from_pretrained(base, folder)` of PEFT 0.18 and later reads it. `target_modules`
    in the configuration selects the adapted layers and no other module of this model. Parameters
    that were trained with the adapter become `modules_to_save`. Bone is also exactly a
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

    Returns:
        A `LoraReport`. Every layer is exact, and has its r as the rank.

    Raises:
        AdapterIOError: the folder can't be written. What was there is unchanged, unless the message
            says that one of the two files is replaced already.
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
        ...     report = disha.interop.peft.export(model, folder)
        ...     config = json.loads(pathlib.Path(folder, "adapter_config.json").read_text())
        ...     base = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        ...     disha.interop.peft.load(base, folder).matched
        ('0.bone_block',)
        >>> config["peft_type"], config["r"], config["target_modules"]
        ('MISS', 4, ['0'])
    """
    view = ModelView(model)
    ranks = view.ranks
    action = f"export adapter {adapter!r} to PEFT"
    given = {"base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
    given = {note: value for note, value in given.items() if value is not None}
    with ranks.fail_together(action):
        target = check_path(folder)
        for note, value in given.items():
            check_type(note, value, str, "a str")
    contents = adapter_contents(view, adapter, with_fingerprints=False)
    with ranks.fail_together(action):
        names = contents.names
        saved = find_saved_modules(view, contents.also_train, names)
        problems = _reasons_against_miss(contents, dropout)
        problems += reasons_against(view, names, _reason_if_unknown, exporting=True)
        refuse_to_write(CANT_EXPRESS, [*problems, *saved.problems], ELSE)
        notes = notes_of(view.modules[""]) | given
        fields = _fields_of(contents, dropout, module_names(view), saved.modules, notes)
    others = saved.copies()
    with ranks.fail_together(action):
        if ranks.writes:
            write_peft_files(target, fields, _blocks_of(contents) | others)
    layers = [
        LoraLayer(record.name, record.method, record.r, record.r, 0.0) for record in contents.layers
    ]
    return LoraReport(target, tuple(layers), tuple(others))


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

    The folder's tensors say which layers are adapted; fields that select layers are not evaluated.
    Modules in `modules_to_save` become parameters trained with the adapter. A folder with trained
    biases (`bias`) is refused. BAT gets no dropout, because PEFT's BAT has none.

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
        ModeError: adapters are merged (`MergeError`), or in a context.

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
        ...     _ = disha.interop.peft.export(model, folder)
        ...     _ = fresh.load_state_dict(weights)
        ...     print(disha.interop.peft.load(fresh, folder))
        1 key fits
        >>> torch.equal(fresh(x), model(x))
        True
    """
    view = ModelView(model)
    action = f"load a PEFT folder as adapter {adapter!r}"
    with view.ranks.fail_together(action):
        blocks, rest, config = _read(folder, also_train)
        problems = reasons_against(view, blocks, _reason_if_unknown, exporting=False)
        refuse_to_load(rest.path, problems)
    untrained = compare_untrained(view, rest)
    with view.ranks.fail_together(action):
        rest = keep_for_model(view, rest, untrained)
        contents = _contents_of(rest, config, blocks, partial(_shapes_in, view))
    return load_contents(
        view, rest.path, contents, adapter, replace=replace, dtype=dtype, freeze=freeze
    )


def _shapes_in(view: ModelView, names: Iterable[str]) -> Shapes:
    """Return the shapes of those of these parameters and buffers that a model has."""
    tensors: dict[str, Tensor] = {buffer.name: buffer.value for buffer in view.buffers}
    for name, parameter in view.parameters_by_name.items():
        tensors[name] = parameter.value
    shapes = {name: tuple(tensors[name].shape) for name in names if name in tensors}
    for name, module in view.modules.items():
        if isinstance(module, nn.Linear):  # the weight may be packed
            shapes[join(name, "weight")] = (module.out_features, module.in_features)
    return shapes


def _reason_if_unknown(module: nn.Module) -> str | None:
    """Return why PEFT's MiSS can't adapt a module, or None if it can."""
    if isinstance(module, nn.Linear):
        return None
    return f"PEFT's MiSS adapts nn.Linear only, not {original_class(module).__name__}"


# --- without a model -----------------------------------------------------------------------------


def read_folder(
    folder: PathLike, base_shapes: ShapesOf, *, also_train: bool = True
) -> AdapterContents:
    """Return the adapter that a folder holds, as `load` reads it for a base of these shapes."""
    blocks, rest, config = _read(folder, also_train)
    return _contents_of(rest, config, blocks, base_shapes)


def _read(folder: PathLike, also_train: bool) -> tuple[Tensors, PeftFolder, AdapterConfig]:
    """Return the blocks in a PEFT folder of MiSS or Bone, the rest of it, and its settings."""
    peft_folder = read_peft_files(folder, (MISS_BLOCK, BONE_BLOCK), also_train)
    _check_settings(peft_folder)
    end = BONE_BLOCK if _is_legacy(peft_folder) else MISS_BLOCK
    blocks, rest = peft_folder.split(end)
    if not blocks:
        refuse_to_load(peft_folder.path, [f"there is no tensor that ends in {end}"])
    return blocks, rest, _read_config(peft_folder)


def _is_legacy(folder: PeftFolder) -> bool:
    """Whether a folder is one of Bone, as PEFT called MiSS before."""
    return folder.fields.get("peft_type") == "BONE"


def _check_settings(folder: PeftFolder) -> None:
    """Raise unless the settings of a folder are known, and those of MiSS or of Bone."""
    fields = folder.fields
    peft_type = fields.get("peft_type")
    init = fields.get("init_weights", True)
    is_known = init in list(READ_INIT_WEIGHTS)  # not in the dict: a file may have an unhashable one
    problems = []
    if peft_type not in ("MISS", "BONE"):
        problems.append(f"its peft_type is {peft_type!r} (disha.interop.lora reads 'LORA')")
    elif not is_known or (_is_legacy(folder) and init == TILE):
        problems.append(f"init_weights={brief(init)} is unknown")
    if fields.get("bias", "none") != "none":
        problems.append(f"bias={brief(fields['bias'])} has no place here; merge it in PEFT")
    refuse_to_load(folder.path, problems)


def _read_config(folder: PeftFolder) -> AdapterConfig:
    """Return the settings of a folder as an adapter's configuration."""
    fields = folder.fields
    init = fields.get("init_weights", True)
    method = READ_INIT_WEIGHTS[init]
    dropout = 0.0
    # In PEFT, Bone and BAT have no dropout, whatever the field says.
    if not _is_legacy(folder) and method != BAT:
        dropout = fields.get("miss_dropout", 0.0)
    r_out = None
    if init == TILE:
        r_out = fields.get("mini_r", 1)
    try:
        return AdapterConfig(
            fields.get("r", 64), target=None, method=method, r_out=r_out, dropout=dropout
        )
    except DishaError as error:
        raise AdapterFileError(
            f"{folder.path} has a configuration that can't be loaded: {error}"
        ) from error


def _contents_of(
    folder: PeftFolder, config: AdapterConfig, blocks: Tensors, shapes_of: ShapesOf
) -> AdapterContents:
    """Return the adapter in a PEFT folder, from which the blocks were taken."""
    others = {name: value for name, value in folder.tensors.items() if folder.saves(name)}
    weights = [join(name, "weight") for name in blocks]
    shapes = shapes_of([*weights, *others])
    problems = [
        f"{name}: it is not a block, and not in a module that modules_to_save names"
        for name in folder.tensors
        if name not in others and not name.endswith(FROZEN)
    ]
    layers = []
    for name in blocks:
        shape = shapes.get(join(name, "weight"), ())
        if len(shape) == 2:
            layers.append(_record_of(name, config, shape))
        else:
            problems.append(f"{name}: the base has no matrix {join(name, 'weight')!r}")
    problems += [
        f"{name}: {tuple(value.shape)}, the base has {shapes.get(name)}"
        for name, value in others.items()
        if shapes.get(name) != value.shape
    ]
    tensors = {layer.key: blocks[layer.name] for layer in layers} | others
    names = tuple(sorted(others))
    contents = AdapterContents(config, tuple(layers), names, tensors, folder.notes())
    refuse_to_load(folder.path, problems + reasons_against_blocks(contents))
    return contents


def _record_of(name: str, config: AdapterConfig, shape: tuple[int, ...]) -> LayerRecord:
    """Return the record of a linear layer whose weight has this shape (out, in)."""
    out, inputs = shape
    return LayerRecord(
        name,
        method=config.method,
        r=config.r,
        r_out=config.r_out,
        in_features=inputs,
        out_features=out,
        scale=1.0,
        base=None,
        layout=LINEAR,
    )


def write_folder(folder: Path, contents: AdapterContents, *, dropout: float | None = None) -> None:
    """Write an adapter as `export` does, without the model; with its notes that PEFT knows."""
    problems = _reasons_against_miss(contents, dropout)
    problems += [
        f"{name}: PEFT saves whole modules; load the file into the model and export from there"
        for name in contents.also_train
    ]
    refuse_to_write(CANT_EXPRESS, problems, ELSE)
    fields = _fields_of(contents, dropout, None, (), contents.metadata)
    write_peft_files(folder, fields, _blocks_of(contents))


def _fields_of(
    contents: AdapterContents,
    dropout: float | None,
    modules: Collection[str] | None,
    saved: Iterable[str],
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return PEFT's configuration, for a model with these modules if they are known."""
    config = contents.config
    if dropout is not None:
        config = config.changed(dropout=dropout)
    init_weights: object = TILE
    if config.r_out is None:
        init_weights = INIT_WEIGHTS[config.method]
    return {
        "bias": "none",
        "inference_mode": True,
        "init_weights": init_weights,
        "mini_r": config.r_out or 1,
        "miss_dropout": config.dropout,
        "modules_to_save": sorted(saved) or None,
        "peft_type": "MISS",
        "r": contents.layers[0].r,
        "target_modules": exact_targets(contents.names, modules),
        **{note: notes.get(note) for note in NOTES},
    }


def _blocks_of(contents: AdapterContents) -> dict[str, Tensor]:
    return {f"{layer.name}{MISS_BLOCK}": contents.tensors[layer.key] for layer in contents.layers}


def _reasons_against_miss(contents: AdapterContents, dropout: float | None) -> list[str]:
    """Return a line for each reason why PEFT's MiSS can't express an adapter."""
    method = contents.config.method
    problems = []
    if method not in INIT_WEIGHTS:
        problems.append(f"PEFT's MiSS knows {' and '.join(INIT_WEIGHTS)}, not {method}")
    for layer in contents.layers:
        name = layer.name or "(the model)"
        r = layer.r
        if layer.layout != LINEAR:
            problems.append(
                f"{name}: the layout of this weight is {layer.layout.pattern!r}, not 'out in'"
            )
        if layer.rows:
            problems.append(f"{name}: PEFT's MiSS adapts all rows of a weight, not some of them")
        problems += [f"{name}: PEFT's MiSS would leave {tied} without it" for tied in layer.tied]
        if not layer.name:
            problems.append(f"{name}: {THE_MODEL_ITSELF}")
        if layer.scale != 1.0:
            problems.append(f"{name}: PEFT's MiSS has no scale (see combine_adapters)")
        if method == BAT and (layer.in_features % r or layer.out_features % r):
            problems.append(f"{name}: PEFT's BAT needs an r that divides both sizes, not {r}")
    sizes = sorted({layer.r for layer in contents.layers})
    if len(sizes) > 1:
        problems.append(f"PEFT's MiSS has one r, this has {sizes} (see combine_adapters)")
    drops = contents.config.dropout if dropout is None else dropout
    if method == BAT and drops:
        problems.append(f"PEFT's BAT has no dropout, and this has {drops:g} (`dropout=0.0`)")
    return problems
