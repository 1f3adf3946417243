"""Read, check and write PEFT folders of MiSS and of Bone without a model.

PEFT calls a tile "mini", and BAT "bat". The blocks have the same values and shapes. Their keys are
`base_model.model.<layer>.miss_block` (`bone_block` up to PEFT 0.18).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from disha.config import AdapterConfig
from disha.errors import ArgumentTypeError
from disha.files.atomic import PathLike, checked_path
from disha.files.contents import records_of
from disha.files.header import AdapterHeader, LayerRecord
from disha.functional import Layout
from disha.interop.miss_config import (
    BAT,
    INIT_WEIGHTS,
    NOTES,
    PeftConfig,
    config_of,
    fields_of,
)
from disha.interop.peft_files import (
    CONFIG_NAME,
    exact_targets,
    has_saved,
    is_saved,
    name_ends,
    read_peft_files,
    refuse_to_load,
    unusable,
    write_peft_files,
)
from disha.interop.peft_view import Saved, refuse_to_write
from disha.model import join

__all__ = [
    "CANT_EXPRESS",
    "BaseShapes",
    "PeftFolder",
    "contents_of",
    "inexpressible",
    "peft_config",
    "read_folder",
    "write",
    "write_folder",
]

BaseShapes = Mapping[str, Sequence[int]] | Callable[[str], Sequence[int] | None]
"""Shapes of the base's parameters by name, such as "layers.0.q_proj.weight": (out, in)."""

LINEAR = Layout("out in")

CANT_EXPRESS = "the adapter can't be written for PEFT's MiSS (disha.interop.lora writes more)"

# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeftFolder:
    """What a PEFT folder holds.

    Attributes:
        path: the folder.
        config: its configuration.
        tensors: its tensors, under their names in the model that PEFT wraps.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop import peft
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.export(model, folder)
        ...     found = peft.read_folder(folder)
        >>> list(found.tensors), list(found.blocks), found.config.r
        (['0.miss_block'], ['0'], 4)
    """

    path: Path
    config: PeftConfig
    tensors: Mapping[str, Tensor]

    @property
    def blocks(self) -> dict[str, Tensor]:
        """Layer -> its block."""
        end = f".{self.config.block_name}"
        return {
            key.removesuffix(end): tensor
            for key, tensor in self.tensors.items()
            if key.endswith(end) and key != end
        }

    @property
    def beside(self) -> dict[str, Tensor]:
        """Parameter or buffer of the base -> its values."""
        end = f".{self.config.block_name}"
        named = {
            self._name_in_base(key): tensor
            for key, tensor in self.tensors.items()
            if not key.endswith(end) or key == end
        }
        return {name: tensor for name, tensor in named.items() if name is not None}

    def without(self, keys: Container[str]) -> PeftFolder:
        """Return the folder without some tensors.

        Args:
            keys: their keys in `tensors`. Keys that are not there have no effect.
        """
        kept = {key: tensor for key, tensor in self.tensors.items() if key not in keys}
        return dataclasses.replace(self, tensors=kept)

    def _name_in_base(self, key: str) -> str | None:
        """Return the name in the base of a tensor that is no block; None if PEFT ignores it."""
        module, _, last = key.rpartition(".")
        if self.config.bias == "none" or last != "bias":
            return key
        layer = module.removesuffix(".base_layer")
        if layer != module and join(layer, self.config.block_name) in self.tensors:
            return join(layer, last)
        # PEFT writes a bias in a saved module three times: under the module's own name, and under
        # the names of the two copies in PEFT's wrapper.
        parts = key.split(".")
        for place, part in enumerate(parts[:-1]):
            is_copy = part in ("original_module", "modules_to_save")
            if is_copy and is_saved(".".join(parts[:place]), self.config.modules_to_save):
                return None
        return key


def read_folder(folder: PathLike) -> PeftFolder:
    """Return the content of a PEFT folder of MiSS or Bone, with its tensors unchecked.

    Args:
        folder: the folder.

    Raises:
        AdapterIOError: it can't be read.
        AdapterFileError: it is not a valid folder of MiSS or Bone.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop import peft
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> model = disha.inject_adapters(model, "0", r=4, method="bat")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.export(model, folder)
        ...     found = peft.read_folder(folder)
        >>> found.config.method, tuple(found.blocks["0"].shape)
        ('bat', (4, 4, 4))
    """
    path, fields, tensors = read_peft_files(folder)
    return PeftFolder(path, config_of(fields), tensors)


def contents_of(
    folder: PeftFolder, base_shapes: BaseShapes, *, also_train: bool = True
) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Return the adapter in a PEFT folder, as `write_contents` and `load_contents` take it.

    Args:
        folder: what `read_folder` has read.
        base_shapes: name of a parameter of the base -> its shape: a dict, or a function that
            returns None for a name that the base does not have. A linear layer's weight is
            (out, in).
        also_train: also take the parameters that the folder holds besides the blocks.

    Raises:
        AdapterFileError: the folder does not fit the base, or contradicts itself; the message
            lists every reason.

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
    config, blocks, beside = folder.config, folder.blocks, folder.beside
    problems, layers = [], []
    for name, block in blocks.items():
        weight = join(name, "weight")
        shape = shape_of(weight)
        if shape is None or len(shape) != 2:
            problems.append(f"{name}: the base has no matrix {weight!r}")
            continue
        layers.append(_layer(config, name, shape))
        misfit = _misfit(layers[-1], block)
        problems += [] if misfit is None else [f"{name}: {misfit}"]
    for name, value in beside.items():
        shape = shape_of(name)
        if shape is None or tuple(shape) != tuple(value.shape):
            found = "no such parameter" if shape is None else f"one of {tuple(shape)}"
            problems.append(f"parameter {name}: {tuple(value.shape)}, the base has {found}")
    refuse_to_load(
        folder.path, problems or unusable({**blocks, **beside}) or _contradictions(folder)
    )
    kept = tuple(sorted(beside)) if also_train else ()
    tensors = {layer.key: blocks[layer.name] for layer in layers}
    tensors |= {name: beside[name] for name in kept}
    header = AdapterHeader(
        config=AdapterConfig(config.r, None, config.method, config.r_out, dropout=config.dropout),
        layers=tuple(layers),
        also_train=kept,
        tensors=records_of(tensors),
        metadata=dict(config.notes),
    )
    return header, tensors


def _layer(config: PeftConfig, name: str, shape: Sequence[int]) -> LayerRecord:
    return LayerRecord(
        name=name,
        method=config.method,
        r=config.r,
        r_out=config.r_out,
        in_features=int(shape[1]),
        out_features=int(shape[0]),
        scale=1.0,
        base=None,
        layout=LINEAR,
    )


def _misfit(layer: LayerRecord, block: Tensor) -> str | None:
    """Return why PEFT has no such layer with such a block, or None if it has."""
    r, inputs, outputs = layer.r, layer.in_features, layer.out_features
    if r <= inputs and layer.method == BAT and (inputs % r or outputs % r):
        return f"r={r} does not divide {inputs} -> {outputs}, as PEFT's BAT requires"
    return layer.block_misfit(tuple(block.shape))


def _contradictions(folder: PeftFolder) -> list[str]:
    """Return where the tensors are not what the configuration says."""
    config, blocks, beside = folder.config, folder.blocks, folder.beside
    problems = [] if blocks else [f"there is no tensor that ends in .{config.block_name}"]
    if isinstance(config.target_modules, tuple):
        targets = frozenset(config.target_modules)
        problems += [
            f"{name}: target_modules in {CONFIG_NAME} does not select it, so that PEFT would leave "
            "its block out"
            for name in blocks
            if targets.isdisjoint(name_ends(name))
        ]
    problems += [
        f"{join(name, 'bias')}: PEFT names an adapted layer's bias base_layer.bias, and would "
        "leave this one out"
        for name in blocks
        if join(name, "bias") in folder.tensors
    ]
    problems += [
        f"parameter {name}: neither modules_to_save nor bias in {CONFIG_NAME} accounts for it; "
        "add its module to modules_to_save to load it"
        for name in beside
        if not _accounted_for(config, name, blocks)
    ]
    for entry in config.modules_to_save:
        if not any(has_saved(name, [entry]) for name in beside):
            problems.append(f"modules_to_save has {entry!r}, but no tensor belongs to it")
    if config.bias != "none" and not any(_is_bias(name) for name in beside):
        problems.append(
            f"bias in {CONFIG_NAME} says that biases were trained, but the folder has none: PEFT "
            'up to version 0.18 lost them when saving. Set it to "none" to load without them'
        )
    return problems


def _accounted_for(config: PeftConfig, name: str, blocks: Mapping[str, Tensor]) -> bool:
    if has_saved(name, config.modules_to_save):
        return True
    if not _is_bias(name) or config.bias == "none":
        return False
    return config.bias == "all" or name.rpartition(".")[0] in blocks


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


# --- writing -------------------------------------------------------------------------------------


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

    `target_modules` is a regex that matches the full names of the adapted layers, so it selects no
    other module of any base. Only `export` can check that PEFT computes the same results in each of
    them, because it has the model.

    Args:
        folder: created if it does not exist; other files in it stay.
        header: the adapter's header.
        tensors: its tensors, by the header's keys.
        dropout: written in place of the adapter's dropout.
        base_model_name_or_path: as for `export`; by default the note of that name.
        task_type: as for `export`; by default the note of that name.

    Raises:
        AdapterIOError: it can't be written; what was there is unchanged.
        ConversionError: PEFT's MiSS can't express it, or parameters other than biases of the
            adapted layers were trained with it; the message lists every reason. Nothing is
            written.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> import disha
        >>> from disha.files.contents import adapter_contents
        >>> from disha.interop import peft
        >>> from disha.model import ModelView
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     header, tensors = adapter_contents(ModelView(model))
        ...     peft.write_folder(folder, header, tensors, task_type="CAUSAL_LM")
        ...     peft.read_folder(folder).config.target_modules
        '0'
    """
    target = checked_path(folder)
    names = [layer.name for layer in header.layers]
    biases = {join(name, "bias") for name in names}
    problems = inexpressible(header, dropout) + [
        f"parameter {name}: PEFT saves complete modules, and only the model shows what else is in "
        "this one; load the file into the model and export from there"
        for name in header.also_train
        if name not in biases
    ]
    refuse_to_write(CANT_EXPRESS, problems)
    saved = Saved(bias="only" if header.also_train else "none")
    notes = {"base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
    config = peft_config(header, dropout, exact_targets(names), saved, notes)
    beside = {name: tensors[name] for name in header.also_train}
    write(target, header, tensors, config, beside)


def inexpressible(header: AdapterHeader, dropout: float | None) -> list[str]:
    """Return the reasons why PEFT's MiSS can't express an adapter."""
    method, problems = header.config.method, []
    if method not in INIT_WEIGHTS:
        problems.append(f"PEFT's MiSS knows {' and '.join(INIT_WEIGHTS)}, not {method}")
    for layer in header.layers:
        name, r = layer.name or "(the model)", layer.r
        if layer.layout != LINEAR:
            problems.append(
                f"{name}: PEFT's MiSS adapts nn.Linear only, and the layout of this weight is "
                f"{layer.layout.pattern!r}"
            )
        if layer.rows:
            problems.append(f"{name}: PEFT's MiSS adapts all rows of a weight, not some of them")
        if not layer.name:
            problems.append(f"{name}: PEFT adapts layers within a model, not the model itself")
        if layer.scale != 1.0:
            problems.append(
                f"{name}: PEFT's MiSS has no scale, and this layer's is {layer.scale:g}; "
                "combine_adapters(model, {name: 1.0}, into=...) writes it into the blocks"
            )
        if method == BAT and (layer.in_features % r or layer.out_features % r):
            problems.append(
                f"{name}: PEFT's BAT needs an r that divides both sizes, and r={r} does not "
                f"divide {layer.in_features} -> {layer.out_features}"
            )
    sizes = sorted({layer.r for layer in header.layers})
    if len(sizes) > 1:
        problems.append(
            f"PEFT's MiSS has one r for all layers, and this adapter has "
            f"{', '.join(map(str, sizes))}; "
            "combine_adapters(model, {name: 1.0}, into=..., r=...) makes Bone blocks of a common "
            "multiple"
        )
    drops = header.config.dropout if dropout is None else dropout
    if method == BAT and drops:
        problems.append(
            f"PEFT's BAT has no dropout, and this adapter has {drops:g}; set `dropout` to 0.0 to "
            "leave it out, which matters in training only"
        )
    return problems


def peft_config(
    header: AdapterHeader,
    dropout: float | None,
    targets: list[str] | str,
    saved: Saved,
    notes: Mapping[str, str | None],
) -> PeftConfig:
    """Return the configuration of an adapter that MiSS can express.

    Args:
        header: the adapter's header.
        dropout: written in place of its dropout.
        targets: `target_modules` that select its layers.
        saved: what is saved with the blocks.
        notes: written in place of those in the header.

    Raises:
        ArgumentError: the dropout is out of range.
        ArgumentTypeError: the dropout is not a number, or a note not a str.
    """
    own = {note: header.metadata[note] for note in NOTES if note in header.metadata}
    given = {note: value for note, value in notes.items() if value is not None}
    for note, value in given.items():
        if not isinstance(value, str):
            raise ArgumentTypeError(f"{note} must be a str, got {value!r}")
    config = header.config
    if dropout is not None:
        config = config.changed(dropout=dropout)
    return PeftConfig(
        legacy=False,
        method=config.method,
        r=header.layers[0].r,
        r_out=config.r_out,
        dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        bias=saved.bias,
        modules_to_save=saved.modules,
        notes={**own, **given},
    )


def write(
    folder: Path,
    header: AdapterHeader,
    tensors: Mapping[str, Tensor],
    config: PeftConfig,
    beside: Mapping[str, Tensor],
) -> None:
    """Write a folder of MiSS.

    Args:
        folder: the folder.
        header: the adapter's header.
        tensors: its tensors.
        config: the configuration.
        beside: parameters that are saved with the blocks: name in the model -> values.
    """
    stored = {f"{layer.name}.{config.block_name}": tensors[layer.key] for layer in header.layers}
    layers = {join(layer.name, "bias"): layer.name for layer in header.layers}
    for name, value in beside.items():
        stored[f"{layers[name]}.base_layer.bias" if name in layers else name] = value
    write_peft_files(folder, fields_of(config), stored)
