"""PEFT folders without a model: read and checked, written, made of adapters and into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from disha.config import AdapterConfig
from disha.errors import AdapterFileError, AdapterIOError, ArgumentTypeError, ConversionError
from disha.files.atomic import PathLike, checked_path
from disha.files.header import AdapterHeader, LayerRecord
from disha.files.tensors import DTYPES, TensorRecord, opened
from disha.functional import Layout
from disha.interop import folder as peft_layout
from disha.interop.folder import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from disha.interop.patterns import PatternError
from disha.interop.peft.config import (
    NOTES,
    PeftConfig,
    fields_of,
    read_config,
    refused_pattern,
)
from disha.interop.targets import exact_regex, saved_by
from disha.model import join
from disha.state import finite_as

__all__ = [
    "BaseShapes",
    "PeftFolder",
    "Saved",
    "contents_of",
    "described",
    "matching",
    "not_expressible",
    "read_folder",
    "refuse_to_load",
    "refuse_to_write",
    "write_folder",
    "write_stored",
]

LONGEST_NAME = 1_000
"""Characters in a tensor's name; no model has any as long."""

BaseShapes = Mapping[str, Sequence[int]] | Callable[[str], Sequence[int] | None]
"""Shapes of the base's parameters by name, such as "layers.0.q_proj.weight": (out, in)."""

LINEAR = Layout("out in")

METHODS = (BONE, BAT) = ("bone", "bat")
"""What PEFT's MiSS can be; its BAT takes no ragged sizes and no dropout."""

_SHOWN = 20


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
    def block_name(self) -> str:
        """What blocks are called."""
        return "bone_block" if self.config.legacy else "miss_block"

    @property
    def blocks(self) -> dict[str, Tensor]:
        """Layer -> its block."""
        end = f".{self.block_name}"
        return {
            key.removesuffix(end): tensor for key, tensor in self.tensors.items() if _is(key, end)
        }

    @property
    def beside(self) -> dict[str, Tensor]:
        """Parameter or buffer of the base -> its values."""
        found = {}
        for key, tensor in self.tensors.items():
            name = None if _is(key, f".{self.block_name}") else self._own_name(key)
            if name is not None:
                found[name] = tensor
        return found

    def without(self, keys: Container[str]) -> PeftFolder:
        """Return the folder without some tensors.

        Args:
            keys: their keys in `tensors`; one that is not there is no error.
        """
        kept = {key: tensor for key, tensor in self.tensors.items() if key not in keys}
        return dataclasses.replace(self, tensors=kept)

    def _own_name(self, key: str) -> str | None:
        """Return the name in the base of what is no block; None for what PEFT makes no use of."""
        module, _, last = key.rpartition(".")
        if self.config.bias == "none" or last != "bias":
            return key
        layer = module.removesuffix(".base_layer")
        if layer != module and join(layer, self.block_name) in self.tensors:
            return join(layer, last)
        # Biases in a module that is saved whole are written three times: as that module's, and
        # under the names that they have in the two copies that PEFT's wrapper holds.
        for above in _above(key):
            outer, _, copy = above.rpartition(".")
            is_copy = copy in ("original_module", "modules_to_save")
            if is_copy and saved_by(self.config.modules_to_save, outer):
                return None
        return key


def _is(key: str, end: str) -> bool:
    return key.endswith(end) and len(key) > len(end)


@dataclass(frozen=True)
class Saved:
    """How PEFT saves what is trained beside blocks.

    Attributes:
        bias: `"none"`, `"all"` or `"only"`, those of the adapted layers.
        modules: names of the modules that are saved whole.
        tensors: name in the base -> values; more than what is trained, as whole modules have
            buffers, and modules that share a parameter are saved each with it.
        problems: what PEFT can't express.
    """

    bias: str = "none"
    modules: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_folder(folder: PathLike) -> PeftFolder:
    """Return what a PEFT folder of MiSS or of Bone holds, checked as far as it goes by itself.

    Args:
        folder: the folder.

    Raises:
        AdapterIOError: it can't be read.
        AdapterFileError: it is no valid folder of MiSS or Bone.

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
    path = checked_path(folder)
    if not path.is_dir():
        raise AdapterIOError(f"can't read {path}: it is no folder; name one with {CONFIG_NAME}")
    config, tensors = read_config(path / CONFIG_NAME), {}
    if not (path / WEIGHTS_NAME).exists() and (path / "adapter_model.bin").exists():
        raise AdapterFileError(
            f"{path} has its tensors in adapter_model.bin, a pickle, which can run any code and is "
            "not read; load it in PEFT where you trust it, and save it again as safetensors"
        )
    with opened(path / WEIGHTS_NAME) as file:
        for key in file.keys:
            if len(key) > LONGEST_NAME:
                raise AdapterFileError(
                    f"{file.path}: a tensor's name has {len(key):,} characters; allowed are "
                    f"{LONGEST_NAME:,}"
                )
            if not _is_inside(key):
                raise AdapterFileError(
                    f"{file.path}: tensor {key[:80]!r} is not under {PREFIX!r}, where PEFT has all"
                )
            tensors[key.removeprefix(PREFIX)] = file.read(key)
    return PeftFolder(path, config, tensors)


def contents_of(
    folder: PeftFolder, base_shapes: BaseShapes, *, also_train: bool = True
) -> tuple[AdapterHeader, dict[str, Tensor]]:
    """Return the adapter in a PEFT folder, as `write_contents` and `load_contents` take it.

    Args:
        folder: what `read_folder` has read.
        base_shapes: name of a parameter of the base -> its shape: a dict, or a function that
            returns None for what is not there. A linear layer's weight is (out, in).
        also_train: also take the parameters that the folder holds beside the blocks.

    Raises:
        AdapterFileError: the folder does not fit the base, or itself; the message lists all.

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
    problems, records = [], []
    for name, block in blocks.items():
        weight = join(name, "weight")
        record = _layer(config, name, shape_of(weight))
        problem = f"the base has no matrix {weight!r}" if record is None else _misfit(record, block)
        if problem is not None:
            problems.append(f"{name}: {problem}")
        elif record is not None:
            records.append(record)
    for name, value in beside.items():
        shape = shape_of(name)
        if shape is None or tuple(shape) != tuple(value.shape):
            found = "no such parameter" if shape is None else f"it as {tuple(shape)}"
            problems.append(f"parameter {name}: {tuple(value.shape)}, the base has {found}")
    for broken in (_not_numbers, _contradictions):
        problems = problems or broken(folder, blocks, beside)
    refuse_to_load(folder.path, problems)
    kept = tuple(sorted(beside)) if also_train else ()
    tensors = {record.key: blocks[record.name] for record in records}
    tensors |= {name: beside[name] for name in kept}
    header = AdapterHeader(
        config=AdapterConfig(config.r, None, config.method, config.r_out, dropout=config.dropout),
        layers=tuple(records),
        also_train=kept,
        tensors={key: TensorRecord(tuple(t.shape), t.dtype) for key, t in tensors.items()},
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
    """Write an adapter that is away from its model as a folder that PEFT loads.

    `target_modules` is a regex that matches the adapted layers in full and so selects no other
    module, whatever else the base has. Whether PEFT does in each of them what this library does,
    only `export` can tell, as it sees the model.

    Args:
        folder: made if it is not there; its other files stay.
        header: the adapter's header.
        tensors: its tensors, by the header's keys.
        dropout: what to write in place of the adapter's dropout.
        base_model_name_or_path: as for `export`; by default what the notes have of that name.
        task_type: likewise.

    Raises:
        AdapterIOError: it can't be written; what was there is still there.
        ConversionError: PEFT's MiSS can't express it, or more is trained beside it than biases of
            the adapted layers; the message lists all. Nothing was written.

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
    problems = not_expressible(header, dropout) + [
        f"parameter {name}: PEFT saves whole modules, and what else that module has, only the "
        "model tells; load the file into the model and export from there"
        for name in header.also_train
        if name not in biases
    ]
    refuse_to_write("the adapter", problems)
    saved = Saved(
        bias="only" if header.also_train else "none",
        tensors={name: tensors[name] for name in header.also_train},
    )
    notes = {"base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
    config = described(header, dropout, exact_regex(names), saved, notes)
    write_stored(target, header, tensors, config, saved)


# --- reading -------------------------------------------------------------------------------------


def _is_inside(key: str) -> bool:
    return key.startswith(PREFIX) and len(key) > len(PREFIX)


def _layer(config: PeftConfig, name: str, shape: Sequence[int] | None) -> LayerRecord | None:
    if shape is None or len(shape) != 2:
        return None
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
    """Return why PEFT would not make a layer like this, or a block of another shape; or None."""
    r, inputs, outputs = layer.r, layer.in_features, layer.out_features
    if r <= inputs and layer.method == BAT and (inputs % r or outputs % r):
        return f"r={r} does not divide {inputs} -> {outputs}, as PEFT's BAT needs"
    return layer.block_misfit(tuple(block.shape))


def _not_numbers(
    folder: PeftFolder, blocks: Mapping[str, Tensor], beside: Mapping[str, Tensor]
) -> list[str]:
    """Return the tensors whose values an adapter can't have."""
    problems = []
    for name, value in [*blocks.items(), *beside.items()]:
        if value.dtype not in DTYPES.values():
            problems.append(f"{name}: has dtype {value.dtype}; allowed are {', '.join(DTYPES)}")
        elif not finite_as(value, value.dtype):
            problems.append(f"{name}: holds values that are not finite (NaN or infinity)")
    return problems


def _contradictions(
    folder: PeftFolder, blocks: Mapping[str, Tensor], beside: Mapping[str, Tensor]
) -> list[str]:
    """Return where the tensors of a folder are not what its configuration says."""
    config = folder.config
    targets = config.targets(folder.path)
    problems = [] if blocks else [f"there is no tensor that ends in .{folder.block_name}"]
    with matching(folder.path):
        problems += [
            f"{name}: {CONFIG_NAME} does not select it, so that PEFT would leave its block out"
            for name in blocks
            if (targets.leaves_out(name) if targets.decided_by_model else not targets.selects(name))
        ]
    problems += [
        f"{join(name, 'bias')}: PEFT has an adapted layer's bias as base_layer.bias and would "
        "leave this one out"
        for name in blocks
        if join(name, "bias") in folder.tensors
    ]
    problems += [
        f"parameter {name}: neither modules_to_save nor bias in {CONFIG_NAME} accounts for it; "
        "where it is to be loaded, add its module to modules_to_save"
        for name in beside
        if not _accounted_for(config, name, blocks)
    ]
    modules = {module for name in beside for module in _above(name)}
    for entry in config.modules_to_save:
        if not any(module.endswith(entry) for module in modules):
            problems.append(f"modules_to_save has {entry!r}, of which there is no tensor")
    if config.bias != "none" and not any(_is_bias(name) for name in beside):
        problems.append(
            f"bias in {CONFIG_NAME} says that biases were trained, and there are none: PEFT up to "
            'version 0.18 lost them when saving. Set it to "none" to load without them'
        )
    return problems


def _accounted_for(config: PeftConfig, name: str, blocks: Mapping[str, Tensor]) -> bool:
    if any(saved_by(config.modules_to_save, module) for module in _above(name)):
        return True
    if not _is_bias(name) or config.bias == "none":
        return False
    return config.bias == "all" or name.rpartition(".")[0] in blocks


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def _above(name: str) -> Iterable[str]:
    """Return the names of the modules that a parameter is in."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


@contextmanager
def matching(path: Path) -> Iterator[None]:
    """Let errors of regexes name the folder that they are from."""
    try:
        yield
    except PatternError as error:
        raise refused_pattern(path / CONFIG_NAME, error) from error


def refuse_to_load(path: Path, problems: Sequence[str]) -> None:
    """Raise if there are problems with a folder.

    Raises:
        AdapterFileError: it lists them.
    """
    if problems:
        raise AdapterFileError(
            f"{path} can't be loaded as what it is in PEFT; nothing changed:\n{_listed(problems)}"
        )


# --- writing -------------------------------------------------------------------------------------


def not_expressible(header: AdapterHeader, dropout: float | None) -> list[str]:
    """Return what an adapter has that PEFT's MiSS does not."""
    problems = []
    if header.config.method not in METHODS:
        problems.append(f"PEFT's MiSS knows {' and '.join(METHODS)}, not {header.config.method}")
    for layer in header.layers:
        name, r = layer.name or "(the model)", layer.r
        if layer.layout != LINEAR:
            problems.append(
                f"{name}: PEFT's MiSS adapts nn.Linear only, and its layout is "
                f"{layer.layout.pattern!r}"
            )
        if layer.rows:
            problems.append(f"{name}: PEFT's MiSS adapts whole weights, and this is rows of one")
        if not layer.name:
            problems.append("(the model): PEFT adapts the layers of a model, not the model itself")
        if layer.scale != 1.0:
            problems.append(
                f"{name}: PEFT's MiSS has no scale, and this one is {layer.scale:g}; "
                "combine_adapters(model, {name: 1.0}, into=...) writes it into the blocks"
            )
        if layer.method == BAT and (layer.in_features % r or layer.out_features % r):
            problems.append(
                f"{name}: PEFT's BAT needs an r that divides both sizes, and r={r} does not "
                f"divide {layer.in_features} -> {layer.out_features}"
            )
    sizes = sorted({layer.r for layer in header.layers})
    if len(sizes) > 1:
        problems.append(
            f"PEFT's MiSS has one r for all layers, this adapter has {', '.join(map(str, sizes))}; "
            "Bone blocks can be had for a common multiple, by "
            "combine_adapters(model, {name: 1.0}, into=..., r=...)"
        )
    drops = header.config.dropout if dropout is None else dropout
    if header.config.method == BAT and drops:
        problems.append(
            f"PEFT's BAT has no dropout, this adapter has {drops:g}; leave it out, "
            "which matters in training only: give 0.0 as dropout="
        )
    return problems


def described(
    header: AdapterHeader,
    dropout: float | None,
    targets: list[str] | str,
    saved: Saved,
    notes: Mapping[str, str | None],
) -> PeftConfig:
    """Return the configuration of an adapter that MiSS can express.

    Args:
        header: the adapter's header.
        dropout: what to write in place of its dropout.
        targets: `target_modules` that select its layers.
        saved: what is saved beside the blocks.
        notes: those that are given, in place of those that the header has.

    Raises:
        ArgumentError: the dropout is out of range.
        ArgumentTypeError: the dropout is no number, or a note no str.
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


def write_stored(
    folder: Path,
    header: AdapterHeader,
    tensors: Mapping[str, Tensor],
    config: PeftConfig,
    saved: Saved,
) -> None:
    """Write both files of a folder, neither before the other is complete too.

    Args:
        folder: the folder.
        header: the adapter's header.
        tensors: its tensors, by the header's keys.
        config: the configuration.
        saved: what is saved beside the blocks.

    Raises:
        AdapterIOError: it can't be written; what was there is still there.
    """
    stored = {f"{layer.name}.miss_block": tensors[layer.key] for layer in header.layers}
    adapted = {join(layer.name, "bias"): layer.name for layer in header.layers}
    for name, value in saved.tensors.items():
        stored[f"{adapted[name]}.base_layer.bias" if name in adapted else name] = value
    peft_layout.write_folder(folder, fields_of(config), stored)


def refuse_to_write(what: str, problems: Sequence[str]) -> None:
    """Raise if there are problems with an adapter.

    Raises:
        ConversionError: it lists them.
    """
    if problems:
        raise ConversionError(
            f"{what} can't be written for PEFT; nothing was written:\n{_listed(problems)}\n"
            "As a LoRA (disha.interop.lora) more can be expressed"
        )


def _listed(problems: Sequence[str]) -> str:
    more = len(problems) - _SHOWN
    return "\n".join([*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])
