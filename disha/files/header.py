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

from disha.checks import BLOCK_DTYPES, check_positive_int, check_scale, check_type
from disha.config import DEFAULTS, AdapterConfig, as_json, check_rows
from disha.errors import AdapterFileError
from disha.files.disk import other_format
from disha.functional import METHODS, Layout, layout_of
from disha.model.records import LayerRecord
from disha.text import brief, counted, first_few, printable, table

FORMAT = 1
"""The newest file format that this library writes and reads."""

HEADER_KEY = "disha"


@dataclass(frozen=True)
class AdapterContents:
    """An adapter outside its model: its tensors, and the description of them."""

    config: AdapterConfig
    layers: tuple[LayerRecord, ...]
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

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return key -> all JSON fields of each tensor, blocks first."""
        named = {layer.key: layer.to_json() for layer in self.layers}
        named |= {key: {"name": key} for key in self.also_train}
        return {
            key: {
                **fields,
                "key": key,
                "shape": tuple(self.tensors[key].shape),
                "dtype": as_json(self.tensors[key].dtype),
            }
            for key, fields in named.items()
        }


@dataclass(frozen=True)
class AdapterFile(AdapterContents):
    """The header of an adapter file, with its path and size; printable.

    Attributes:
        config: the adapter's configuration.
        layers: the adapted layers, in the order of the model.
        also_train: names of the parameters and running statistics saved with the blocks.
        tensors: key -> tensor without values (on the meta device): its shape and dtype.
        metadata: the notes that the user gave to `save_adapter`.
        path: the file.
        format: its format version.
        nbytes: size of the file.

    Examples:
        >>> import pathlib, tempfile
        >>> import disha
        >>> layer = disha.BoneLinear(8, 16, r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "adapter.safetensors")
        ...     disha.save_adapter(layer, path, metadata={"task": "dialogue"})
        ...     found = disha.inspect_adapter(path)
        >>> found.layers[0].in_features, found.layers[0].out_features, found.parameters
        (8, 16, 64)
        >>> found.config.method, found.metadata["task"]
        ('bone', 'dialogue')
    """

    path: Path
    format: int
    nbytes: int

    def __str__(self) -> str:
        is_scaled = any(layer.scale != 1 for layer in self.layers)
        rows = [
            (
                layer.name or "(the model)",
                layer.method,
                layer.r,
                f"{layer.in_features} -> {layer.out_features}",
                "x".join(map(str, self.tensors[layer.key].shape)),
                as_json(self.tensors[layer.key].dtype),
                *([f"{layer.scale:g}"] if is_scaled else []),
            )
            for layer in self.layers
        ]
        scale = ["scale"] if is_scaled else []  # usually 1 everywhere
        lines = [table(("layer", "method", "r", "in -> out", "block", "dtype", *scale), rows)]
        if self.also_train:
            lines.append(f"also trained: {printable(', '.join(self.also_train))}")
        lines += [printable(f"{key}: {value}") for key, value in self.metadata.items()]
        lines.append(
            f"{printable(str(self.path))}: format {self.format}, "
            f"{counted(len(self.layers), 'layer')}, {counted(self.parameters, 'parameter')}, "
            f"{counted(self.nbytes, 'byte')}"
        )
        return "\n".join(lines)


def reasons_against_blocks(contents: AdapterContents) -> list[str]:
    """Return the name of each layer whose block has a wrong shape, and the reason."""
    found = []
    for record in contents.layers:
        reason = record.reason_against_block(contents.tensors[record.key].shape)
        if reason is not None:
            found.append(f"{record.name or '(the model)'}: {reason}")
    return found


def header_to_json(contents: AdapterContents) -> str:
    """Return the header as JSON, without what is as usual. The same header gives the same text."""
    settings = contents.config.to_json()
    fields = {
        "format": FORMAT,
        "config": {name: value for name, value in settings.items() if value != DEFAULTS[name]},
        "layers": [layer.entry(contents.config.method) for layer in contents.layers],
        "also_train": contents.also_train,
        "metadata": dict(sorted(contents.metadata.items())),
    }
    written = {name: value for name, value in fields.items() if value}
    return json.dumps(written, separators=(",", ":"))


# --- reading -------------------------------------------------------------------------------------


def parse_header(path: Path, text: str | None, tensors: Mapping[str, Tensor]) -> AdapterFile:
    """Return the checked header of a file, given its JSON and its tensors."""
    if text is None:
        raise AdapterFileError(
            other_format(path)
            or f"{path} is a safetensors file without a {HEADER_KEY!r} entry in its metadata: it "
            "was not written by disha.save_adapter; name an adapter file"
        )
    try:
        found = _parsed(path, json.loads(text), tensors)
    except KeyError as error:
        raise _unfit(path, f"lacks the field {error}") from error
    except AdapterFileError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise _unfit(path, f"is not of format {FORMAT}: {error}") from error
    problems = _key_problems(found) or reasons_against_blocks(found)
    if problems:
        raise _unfit(path, f"contradicts its tensors:\n{first_few(problems, 20)}")
    return found


def _unfit(path: Path, problem: str) -> AdapterFileError:
    return AdapterFileError(
        f"{path}: the header {problem}; get the file again, or upgrade disha-torch"
    )


def _parsed(path: Path, fields: Any, tensors: Mapping[str, Tensor]) -> AdapterFile:
    fields = {"needs": [], "also_train": [], "metadata": {}, **fields}
    version = check_positive_int("format", fields["format"])
    needs = fields["needs"]
    if version > FORMAT:  # it may have other fields
        raise AdapterFileError(
            f"{path} has format {brief(version)}, and this version of disha reads up to {FORMAT}; "
            "upgrade disha-torch"
        )
    if needs:  # what is named there changes the meaning of the file
        raise AdapterFileError(
            f"{path} needs {brief(needs)}, which this version of disha does not know; upgrade "
            "disha-torch"
        )
    check_type("metadata", fields["metadata"], dict, "a JSON object")
    for words in (*fields["also_train"], *fields["metadata"].values()):
        check_type("a name or a note", words, str, "text")
    check_type("config", fields["config"], dict, "a JSON object")
    method = fields["config"].get("method")
    if isinstance(method, str) and method not in METHODS:
        raise AdapterFileError(
            f"{path} has blocks of the method {brief(method)}, which is unknown here; register the "
            "method first (disha.register_method), or upgrade disha-torch"
        )
    config = AdapterConfig.from_json(fields["config"])
    return AdapterFile(
        config=config,
        layers=tuple(_layer(config, entry) for entry in fields["layers"]),
        also_train=tuple(fields["also_train"]),
        tensors=tensors,
        metadata=fields["metadata"],
        path=path,
        format=FORMAT,
        nbytes=path.stat().st_size,
    )


def _layer(config: AdapterConfig, entry: Any) -> LayerRecord:
    name = entry["name"]
    base = entry.get("base")
    padding = entry.get("padding_idx")
    rows = entry.get("rows")
    tied = entry.get("tied", ())
    method = entry.get("method", config.method)
    for text in (name, *tied):
        check_type("the name of a layer", text, str, "text")
    check_type("base", base, str | None, "text")
    check_type("padding_idx", padding, int | None, "an int")
    for what in ("r", "in", "out"):
        check_positive_int(what, entry[what])
    groups = check_positive_int("groups", entry.get("groups", 1))
    return LayerRecord(
        name=name,
        method=method,
        r=entry["r"],
        r_out=config.r_out if method == config.method else None,
        in_features=entry["in"],
        out_features=entry["out"],
        scale=check_scale(entry.get("scale", 1)),
        base=base,
        layout=Layout(layout_of(entry["layout"]).pattern, groups, padding),
        rows=() if rows is None else check_rows(name, rows),
        tied=tuple(tied),
    )


def _key_problems(file: AdapterFile) -> list[str]:
    """Return what is wrong unless the header lists each tensor once, and blocks are numbers."""
    blocks = [layer.key for layer in file.layers]
    listed = Counter([*blocks, *file.also_train])
    tensors = file.tensors
    problems = [] if blocks else ["there is no layer"]
    problems += [f"{brief(key)} is listed {n} times" for key, n in listed.items() if n > 1]
    problems += [f"{brief(key)} is missing" for key in listed if key not in tensors]
    problems += [f"{brief(key)} is not listed" for key in tensors if key not in listed]
    return problems + [
        f"{brief(key)} has dtype {tensors[key].dtype}"
        for key in blocks
        if key in tensors and tensors[key].dtype not in BLOCK_DTYPES.values()
    ]
