"""Adapters in PEFT folders of MiSS (PEFT's current name for Bone) and of Bone (its former name).

The blocks have the same values and shapes in PEFT. `export` and `load` have the model, so they can
check that PEFT would compute the same results. `write_folder`, `read_folder` and `contents_of` work
without a model:

- A folder does not say how large a layer's input is, so `contents_of` asks for the shapes of the
  base's weights.
- Only `export` can write parameters that were trained with the blocks. PEFT saves complete
  modules, and an adapter file does not say what else a module contains.

`export` and `write_folder` refuse what PEFT can't store, before they write anything: layers other
than `nn.Linear`, a scale, a different r in each layer, BAT with sizes that r does not divide or
with dropout. They leave out your own notes and the fingerprint of the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from disha.config import AdapterConfig
from disha.files.contents import adapter_contents, load_contents
from disha.files.header import AdapterHeader
from disha.files.saving import PathLike, checked_path
from disha.functional import Layout
from disha.interop.peft_format import (
    BAT,
    INIT_WEIGHTS,
    THE_MODEL_ITSELF,
    PeftConfig,
    config_of,
    exact_targets,
    fields_of,
    has_saved,
    notes_of,
    read_peft_files,
    refuse_to_load,
    refuse_to_write,
    write_peft_files,
)
from disha.interop.peft_model import (
    module_names,
    obstacles,
    saved_modules,
    under_first_names,
    without_buffers,
)
from disha.layers.adapters import check_adapter_name, original_class
from disha.model import ModelView, join
from disha.records import LayerRecord, records_of
from disha.running_statistics import statistics
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

BaseShapes = Mapping[str, Sequence[int]] | Callable[[str], Sequence[int] | None]
"""Shapes of the base's parameters by name, such as "layers.0.q_proj.weight": (out, in)."""

LINEAR = Layout("out in")

CANT_EXPRESS = "the adapter can't be written for PEFT's MiSS (disha.interop.lora writes more)"

# --- a model -------------------------------------------------------------------------------------


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
    given = {"base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
    notes = notes_of(view.model) | {note: one for note, one in given.items() if one is not None}
    header, tensors = adapter_contents(view, adapter, base=False)
    with ranks.agreeing(action):
        target, names = checked_path(folder), [layer.name for layer in header.layers]
        saved = saved_modules(view, header.also_train, names)
        problems = _inexpressible(header, dropout)
        problems += obstacles(view, names, _unknown_to_miss, exporting=True)
        refuse_to_write(CANT_EXPRESS, [*problems, *saved.problems])
        targets = exact_targets(names, module_names(view))
        fields = fields_of(header, dropout, targets, saved.modules, notes)
    beside = saved.copies()
    with ranks.agreeing(action):
        if ranks.writes:
            write_peft_files(target, fields, {**_blocks(header, tensors), **beside})


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
        found = read_folder(folder)
        refuse_to_load(found.path, obstacles(view, found.blocks, _unknown_to_miss, exporting=False))
        if also_train:
            kept = without_buffers(view, found.path, found.beside)
            found = dataclasses.replace(found, beside=kept)
        shapes = partial(_shape, view)
        contents = contents_of(found, shapes, also_train=also_train)
        header, tensors = under_first_names(view, found.path, contents)
    return load_contents(
        view, found.path, header, tensors, adapter, replace=replace, dtype=dtype, freeze=freeze
    )


def _shape(view: ModelView, name: str) -> tuple[int, ...] | None:
    """Return the shape of a parameter or statistic; that of a linear layer even if it is packed."""
    module = view.modules.get(name.removesuffix(".weight"))
    if name.endswith(".weight") and isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    known = view.parameters_by_name.get(name)
    found = statistics(view).get(name) if known is None else known.value
    return None if found is None else tuple(found.shape)


def _unknown_to_miss(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return None
    return f"PEFT's MiSS adapts nn.Linear only, not {original_class(module).__name__}"


# --- without a model -----------------------------------------------------------------------------


@dataclass(frozen=True)
class PeftFolder:
    """What a PEFT folder holds: its configuration, the block of each layer, and other tensors."""

    path: Path
    config: PeftConfig
    blocks: Mapping[str, Tensor]
    beside: dict[str, Tensor]


def read_folder(folder: PathLike) -> PeftFolder:
    """Return the content of a PEFT folder of MiSS or Bone, with its tensors unchecked.

    Raises:
        AdapterIOError: it can't be read.
        AdapterFileError: it is not a valid folder of MiSS or Bone.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop import peft
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.export(model, folder)
        ...     found = peft.read_folder(folder)
        >>> found.config.method, tuple(found.blocks["0"].shape)
        ('bone', (4, 16))
    """
    path, fields, tensors = read_peft_files(folder)
    config = config_of(path, fields)
    end = f".{config.block_name}"
    keys = [key for key in tensors if key.endswith(end)]
    blocks = {key.removesuffix(end): tensors.pop(key) for key in keys}
    return PeftFolder(path, config, blocks, tensors)


def contents_of(
    folder: PeftFolder, base_shapes: BaseShapes, *, also_train: bool = True
) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Return the adapter in a PEFT folder, as `write_contents` and `load_contents` take it.

    Args:
        folder: what `read_folder` has read.
        base_shapes: name of a parameter of the base -> its shape: a dict, or a function that
            returns None for a name that the base does not have. A linear layer has (out, in).
        also_train: also take the parameters that the folder holds besides the blocks.

    Raises:
        AdapterFileError: the folder does not fit the base; the message lists every reason.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop import peft
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.export(model, folder)
        ...     header, tensors = peft.contents_of(peft.read_folder(folder), {"0.weight": (16, 8)})
        >>> header.layers[0].in_features, tuple(tensors["0.bone_block"].shape)
        (8, (4, 16))
    """
    shape_of = base_shapes if callable(base_shapes) else base_shapes.get
    config, blocks = folder.config, folder.blocks
    beside = folder.beside if also_train else {}
    problems, layers = [], []
    for name, block in blocks.items():
        shape = tuple(shape_of(join(name, "weight")) or ())
        if len(shape) != 2:
            problems.append(f"{name}: the base has no matrix {join(name, 'weight')!r}")
            continue
        layer = LayerRecord(
            name, config.method, config.r, config.r_out, shape[1], shape[0], 1.0, None, LINEAR
        )
        reason = layer.reason_against_block(tuple(block.shape))
        problems += [] if reason is None else [f"{name}: {reason}"]
        layers.append(layer)
    problems += [
        f"{name}: it is no block, and not in a module that modules_to_save names"
        for name in beside
        if not has_saved(name, config.modules_to_save)
    ]
    problems += [
        f"{name}: {tuple(value.shape)}, the base has {shape_of(name)}"
        for name, value in beside.items()
        if tuple(shape_of(name) or ()) != tuple(value.shape)
    ]
    if not blocks:
        problems.append(f"there is no tensor that ends in .{config.block_name}")
    refuse_to_load(folder.path, problems)
    tensors = {layer.key: blocks[layer.name] for layer in layers} | beside
    header = AdapterHeader(
        config=AdapterConfig(config.r, None, config.method, config.r_out, dropout=config.dropout),
        layers=tuple(layers),
        also_train=tuple(sorted(beside)),
        tensors=records_of(tensors),
        metadata=dict(config.notes),
    )
    return header, tensors


def write_folder(
    folder: PathLike,
    header: AdapterHeader,
    tensors: Mapping[str, Tensor],
    *,
    dropout: float | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write an adapter without its model as a folder that PEFT loads.

    Only `export` can check that PEFT computes the same results, because it has the model.

    Args:
        folder: created if it does not exist; other files in it stay.
        header: the adapter's header.
        tensors: its tensors, by the header's keys.
        dropout: as for `export`.
        base_model_name_or_path: as for `export`; by default the note of that name.
        task_type: as for `export`; by default the note of that name.

    Raises:
        AdapterIOError: it can't be written; what was there is unchanged.
        ConversionError: PEFT's MiSS can't express it; the message lists every reason.

    Examples:
        >>> import tempfile
        >>> from disha.files.contents import adapter_contents
        >>> from disha.model import ModelView
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop import peft
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.write_folder(folder, *adapter_contents(ModelView(model)))
        ...     peft.read_folder(folder).config.r
        4
    """
    problems = _inexpressible(header, dropout) + [
        f"{name}: PEFT saves whole modules; load the file into the model and export from there"
        for name in header.also_train
    ]
    refuse_to_write(CANT_EXPRESS, problems)
    notes = {"base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
    targets = exact_targets(layer.name for layer in header.layers)
    fields = fields_of(header, dropout, targets, (), notes)
    write_peft_files(checked_path(folder), fields, _blocks(header, tensors))


def _blocks(header: AdapterHeader, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{layer.name}.miss_block": tensors[layer.key] for layer in header.layers}


def _inexpressible(header: AdapterHeader, dropout: float | None) -> list[str]:
    """Return the reasons why PEFT's MiSS can't express an adapter."""
    method, problems = header.config.method, []
    if method not in INIT_WEIGHTS:
        problems.append(f"PEFT's MiSS knows {' and '.join(INIT_WEIGHTS)}, not {method}")
    for layer in header.layers:
        name, r = layer.name or "(the model)", layer.r
        if layer.layout != LINEAR:
            problems.append(
                f"{name}: the layout of this weight is {layer.layout.pattern!r}, not 'out in'"
            )
        if layer.rows:
            problems.append(f"{name}: PEFT's MiSS adapts all rows of a weight, not some of them")
        if not layer.name:
            problems.append(THE_MODEL_ITSELF)
        if layer.scale != 1.0:
            problems.append(f"{name}: PEFT's MiSS has no scale (see combine_adapters)")
        if method == BAT and (layer.in_features % r or layer.out_features % r):
            problems.append(f"{name}: PEFT's BAT needs an r that divides both sizes, not {r}")
    sizes = sorted({layer.r for layer in header.layers})
    if len(sizes) > 1:
        problems.append(f"PEFT's MiSS has one r, this has {sizes} (see combine_adapters)")
    drops = header.config.dropout if dropout is None else dropout
    if method == BAT and drops:
        problems.append(f"PEFT's BAT has no dropout, and this has {drops:g} (`dropout=0.0`)")
    return problems
