"""The header of an adapter file, format 1: JSON in the safetensors metadata.

docs/reference/format.md describes it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from disha.checks import TRAINABLE_DTYPES, check_positive_int, check_scale, check_type
from disha.config import DEFAULTS, AdapterConfig, as_json, check_ranges
from disha.errors import AdapterFileError, ArgumentError
from disha.functional import Layout, layout_of
from disha.functional.method import find_method
from disha.functional.new_rows import NEW_ROWS, method_of_block
from disha.layers.spec import BlockSpec
from disha.text import brief, counted, first_few, join, printable, table

FORMAT = 1
"""The newest file format that this library writes and reads."""

HEADER_KEY = "disha"

ASSUMED: dict[str, Any] = {
    "scale": 1,
    "groups": 1,
    "padding_idx": None,
    "kernel": [],
    "rows": [],
    "tied": [],
    "base": None,
}
"""What a reader assumes of a layer's entry where a field is absent."""


@dataclass(frozen=True)
class AdapterContents:
    """An adapter outside its model: its tensors, and the description of them."""

    config: AdapterConfig
    layers: tuple[BlockSpec, ...]
    also_train: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(compare=False)  # by their keys in a file
    metadata: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """The names of its layers."""
        return [layer.name for layer in self.layers]

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())


@dataclass(frozen=True)
class AdapterFile(AdapterContents):
    """An adapter file: what its header says, its tensors, its path and size; printable.

    From `inspect_adapter`, the tensors are on the meta device: they have a shape and a dtype, and
    no values.

    Attributes:
        config: the adapter's configuration.
        layers: the adapted layers, in the order of the model.
        also_train: names of the parameters and buffers saved with the blocks.
        tensors: key in the file -> tensor.
        metadata: the notes that the user gave to `save_adapter`.
        path: the file.
        format: its format version; None for a folder of PEFT.
        nbytes: size of the file.

    Examples:
        >>> import pathlib, tempfile
        >>> import disha
        >>> layer = disha.BoneLinear(8, 16, r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "adapter.safetensors")
        ...     disha.save_adapter(layer, path, metadata={"task": "dialogue"})
        ...     file = disha.inspect_adapter(path)
        >>> file.layers[0].in_features, file.layers[0].out_features, file.parameters
        (8, 16, 64)
        >>> file.config.method, file.metadata["task"]
        ('bone', 'dialogue')
    """

    path: Path
    format: int | None
    nbytes: int

    def __str__(self) -> str:
        lines = [self._table()]
        if self.also_train:
            lines.append(f"also trained: {printable(', '.join(self.also_train))}")
        lines += [printable(f"{key}: {value}") for key, value in self.metadata.items()]
        sizes = (
            counted(len(self.layers), "layer"),
            counted(self.parameters, "parameter"),
            counted(self.nbytes, "byte"),
        )
        kind = "a folder of PEFT" if self.format is None else f"format {self.format}"
        lines.append(f"{printable(str(self.path))}: {kind}, {', '.join(sizes)}")
        return "\n".join(lines)

    def _table(self) -> str:
        """Return the layers as a table."""
        rows = []
        for layer in self.layers:
            block = self.tensors[layer.key]
            name = layer.name or "(the model)"
            sizes = f"{layer.in_features} -> {layer.out_features}"
            shape = "x".join(map(str, block.shape))
            dtype = as_json(block.dtype)
            scale = f"{layer.scale:g}"
            rows.append((name, layer.method, layer.r, sizes, shape, dtype, scale))
        return table(("layer", "method", "r", "in -> out", "block", "dtype", "scale"), rows)


def reasons_against_blocks(contents: AdapterContents) -> list[str]:
    """Return a line for each layer whose block has a wrong shape."""
    reasons = []
    for spec in contents.layers:
        reason = spec.reason_against_block(contents.tensors[spec.key].shape)
        if reason is not None:
            reasons.append(f"{spec.name or '(the model)'}: {reason}")
    return reasons


def header_to_json(contents: AdapterContents) -> str:
    """Return the header as JSON, without the settings that have their default.

    The same adapter always gives the same text.
    """
    config = contents.config
    settings = config.to_json().items()
    changed_settings = {name: value for name, value in settings if value != DEFAULTS[name]}
    entries = [entry_of(spec, config.method) for spec in contents.layers]
    notes = dict(sorted(contents.metadata.items()))
    fields = {
        "format": FORMAT,
        "config": changed_settings,
        "layers": entries,
        "also_train": contents.also_train,
        "metadata": notes,
    }
    written = {name: value for name, value in fields.items() if value}
    return json.dumps(written, separators=(",", ":"))


def entry_of(spec: BlockSpec, method: str) -> dict[str, Any]:
    """Return the entry of a layer in a header whose configuration has this method.

    A field is left out if it has the value that a reader assumes when it is absent.
    """
    fields = spec.to_json()
    fields["in"] = fields.pop("in_features")
    fields["out"] = fields.pop("out_features")
    del fields["r_out"]  # the configuration has it
    assumed = ASSUMED | {"method": method}
    return {
        field: value
        for field, value in fields.items()
        if field not in assumed or value != assumed[field]
    }


# --- reading -------------------------------------------------------------------------------------


def parse_header(path: Path, text: str | None, tensors: Mapping[str, Tensor]) -> AdapterFile:
    """Return the header of a file, checked against the file's tensors."""
    if text is None:
        raise AdapterFileError(
            f"{path} is a safetensors file without a {HEADER_KEY!r} entry in its metadata: it was "
            "not written by disha.save_adapter; name an adapter file"
        )
    try:
        file = _parse_file(path, json.loads(text), tensors)
    except KeyError as error:
        raise _header_error(path, f"lacks the field {error}") from error
    except AdapterFileError:  # which is a ValueError too, and says already what to do
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _header_error(path, f"is not of format {FORMAT}: {error}") from error
    reasons = _reasons_against_keys(file)
    if not reasons:
        reasons = reasons_against_blocks(file)
    if reasons:
        raise _header_error(path, f"contradicts its tensors:\n{first_few(reasons, 20)}")
    return file


def _header_error(path: Path, problem: str) -> AdapterFileError:
    return AdapterFileError(
        f"{path}: the header {problem}; get the file again, or upgrade disha-torch"
    )


def _parse_file(path: Path, fields: Any, tensors: Mapping[str, Tensor]) -> AdapterFile:
    optional: dict[str, Any] = {"needs": [], "also_train": [], "metadata": {}}
    fields = {**optional, **fields}
    _check_version(path, fields)
    settings = fields["config"]
    method = settings.get("method", DEFAULTS["method"])
    usual = ASSUMED | {"method": method}  # of a layer that does not tell its own
    if method == NEW_ROWS:  # in an older file that has nothing else
        settings = settings | {"method": DEFAULTS["method"]}
    elif find_method(method) is None:
        raise AdapterFileError(
            f"{path} has blocks of the method {brief(method)}, which is unknown here; register the "
            "method first (disha.register_method), or upgrade disha-torch"
        )
    config = AdapterConfig.from_json(settings)
    entries = [usual | entry for entry in fields["layers"]]
    # In files of former versions, keys have the whole name of a method with groups.
    former_keys = {}
    for entry in entries:
        of_block = method_of_block(entry["method"])
        new_key = join(entry["name"], of_block.block_name)
        former_keys[join(entry["name"], f"{of_block.name}_block")] = new_key
    tensors = {former_keys.get(key, key): tensor for key, tensor in tensors.items()}
    return AdapterFile(
        config=config,
        layers=tuple(_parse_layer(config, entry, tensors) for entry in entries),
        also_train=_check_names("also_train", fields["also_train"]),
        tensors=tensors,
        metadata=_check_notes(fields["metadata"]),
        path=path,
        format=FORMAT,
        nbytes=path.stat().st_size,
    )


def _check_version(path: Path, fields: Mapping[str, Any]) -> None:
    """Raise if only a newer version of the library can read the file."""
    version = check_positive_int("format", fields["format"])
    needs = fields["needs"]  # what changes the meaning of the other fields
    if version > FORMAT:
        raise AdapterFileError(
            f"{path} has format {brief(version)}, and this version of disha reads up to {FORMAT}; "
            "upgrade disha-torch"
        )
    if needs:
        raise AdapterFileError(
            f"{path} needs {brief(needs)}, which this version of disha does not know; upgrade "
            "disha-torch"
        )


def _check_names(field: str, names: Any) -> tuple[str, ...]:
    """Return a list of names."""
    check_type(field, names, list, "a list of names")
    for name in names:
        check_type(field, name, str, "a list of names")
    return tuple(names)


def _check_notes(notes: Any) -> dict[str, str]:
    """Return notes, which are texts by their names."""
    check_type("metadata", notes, dict, "texts by their names")
    for note in notes.values():
        check_type("metadata", note, str, "texts by their names")
    return dict(notes)


def _parse_layer(
    config: AdapterConfig, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> BlockSpec:
    """Return the spec of an entry that has all fields."""
    for size in ("r", "in", "out", "groups"):
        check_positive_int(size, entry[size])
    name = entry["name"]
    padding = entry["padding_idx"]
    check_type("name", name, str, "a text")
    check_type("base", entry["base"], str | None, "a fingerprint")
    check_type("padding_idx", padding, int | None, "a whole number")
    method = entry["method"]
    outputs = entry["rows"]
    scale = entry["scale"]
    if method == NEW_ROWS:
        scale = 1  # they have none, but earlier versions wrote that of their adapter
        outputs = outputs or [(0, entry["out"])]  # earlier versions could write all rows so
    if outputs:
        outputs = check_ranges(name, outputs)
        count = sum(stop - first for first, stop in outputs)
        if count != entry["out"]:
            raise ArgumentError(
                f"{name}: it lists {counted(count, 'row')}, but its output has {entry['out']}"
            )
    kernel = [check_positive_int("kernel", size) for size in entry["kernel"]]
    key = join(name, method_of_block(method).block_name)
    block_shape = tensors[key].shape if key in tensors else ()
    return BlockSpec.of_block(
        name,
        block_shape,
        method=method,
        layout=Layout(layout_of(entry["layout"]).pattern, entry["groups"], padding),
        in_features=entry["in"],
        out_features=entry["out"],
        outputs=tuple(outputs),
        kernel=tuple(kernel),
        r=entry["r"],
        # New rows, which may be beside the adapter, have none.
        r_out=config.r_out if method == config.method else None,
        scale=check_scale(scale),
        base=entry["base"],
        tied=_check_names("tied", entry["tied"]),
    )


def _reasons_against_keys(file: AdapterFile) -> list[str]:
    """Return a line for each tensor that is missing, unlisted or listed twice.

    There is also one for each block that is not of a trainable dtype.
    """
    blocks = [layer.key for layer in file.layers]
    counts = Counter([*blocks, *file.also_train])
    tensors = file.tensors
    reasons = [] if blocks else ["there is no layer"]
    reasons += [f"{brief(key)} is listed {n} times" for key, n in counts.items() if n > 1]
    reasons += [f"{brief(key)} is missing" for key in counts if key not in tensors]
    reasons += [f"{brief(key)} is not listed" for key in tensors if key not in counts]
    reasons += [
        f"{brief(key)} has dtype {tensors[key].dtype}"
        for key in blocks
        if key in tensors and tensors[key].dtype not in TRAINABLE_DTYPES
    ]
    return reasons
