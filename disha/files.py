"""Adapter files, format 1: one self-describing safetensors file per adapter.

Tensors: `<layer>.bone_block` or `<layer>.bat_block`, and `also_train` parameters under their own
names. `__metadata__["disha"]` is JSON with the fields of `_Header`. Nothing in a file is trusted:
keys, shapes, dtypes, values and header are all checked before the model changes.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from disha.config import AdapterConfig, check_adapter_name, check_dtype, check_scale
from disha.errors import (
    AdapterFileError,
    AdapterIOError,
    AdapterStateError,
    ArgumentError,
    ArgumentTypeError,
    DishaError,
)
from disha.fingerprint import fingerprint, same_base
from disha.inject import apply_plan
from disha.layers import BLOCKS, AdaptedLayer, Block
from disha.layers.adapted import refuse_inside
from disha.plan import LayerRequest, plan_layers
from disha.sharding import Ranks, whole
from disha.state import LoadReport, adapter_tensors, check_fit, copy_values, finite_as
from disha.survey import Survey
from disha.tables import table
from disha.tree import (
    adapted_layers,
    adapter_names,
    join,
    module_names,
    parameter_aliases,
    parameter_owners,
    require_adapter,
    require_model,
)

__all__ = [
    "FORMAT",
    "AdapterFile",
    "AdapterFileWarning",
    "LayerRecord",
    "TensorRecord",
    "inspect_adapter",
    "load_adapter",
    "save_adapter",
]

FORMAT = 1
"""The newest file format that this library writes and reads."""

HEADER_KEY = "disha"
"""The one metadata key: several would come out in changing order, and the bytes with them."""

_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

PathLike = str | os.PathLike[str]
T = TypeVar("T")


class AdapterFileWarning(UserWarning):
    """An adapter was loaded, but onto another base than it was saved from."""


@dataclass(frozen=True)
class TensorRecord:
    """A tensor in a file: its shape, its dtype and its size in bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class LayerRecord:
    """A layer in a file: what block it has, on what it fits, and its base's fingerprint."""

    name: str
    method: str
    r: int
    r_out: int | None
    in_features: int
    out_features: int
    scale: float
    base: str | None

    @property
    def sizes(self) -> tuple[str, int, int | None, int, int]:
        """Kind, r, r_out, in and out."""
        return (self.method, self.r, self.r_out, self.in_features, self.out_features)

    @property
    def key(self) -> str:
        """The block's key in the file."""
        return join(self.name, BLOCKS[self.method].parameter_name)


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file says of itself; printable.

    Attributes:
        path: the file.
        format: its format version.
        config: the adapter's configuration.
        layers: the adapted layers.
        also_train: names of the parameters saved beside the blocks.
        tensors: key -> shape and dtype, of all tensors.
        metadata: what the user gave to `save_adapter`.
        nbytes: size of the file.
    """

    path: Path
    format: int
    config: AdapterConfig
    layers: tuple[LayerRecord, ...]
    also_train: tuple[str, ...]
    tensors: Mapping[str, TensorRecord]
    metadata: Mapping[str, str]
    nbytes: int

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors.values())

    def __str__(self) -> str:
        rows = [
            (
                layer.name or "(the model)",
                layer.method,
                layer.r,
                f"{layer.in_features} -> {layer.out_features}",
                "x".join(map(str, self.tensors[layer.key].shape)),
                str(self.tensors[layer.key].dtype).removeprefix("torch."),
            )
            for layer in self.layers
        ]
        lines = [table(("layer", "method", "r", "in -> out", "block", "dtype"), rows)]
        if self.also_train:
            lines.append(f"also trained: {', '.join(self.also_train)}")
        lines += [f"{key}: {value}" for key, value in self.metadata.items()]
        lines.append(
            f"{self.path}: format {self.format}, {len(self.layers)} layers, "
            f"{self.parameters:,} parameters, {self.nbytes:,} bytes"
        )
        return "\n".join(lines)


def save_adapter(
    model: nn.Module,
    path: PathLike,
    adapter: str = "default",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter, and nothing else of the model, to one safetensors file.

    The file is written whole or not at all, and a file that was there stays until the new one is
    complete. Saving the same adapter twice gives the same bytes, from a wrapped or sharded model
    too. A merged adapter can be saved too: its blocks are intact.

    In a process group: from a model that `fully_shard` has sharded, call it on all ranks, which
    gather the whole adapter. The first rank writes the file; the others wait for it, and raise too
    if it fails. From any other model, under `DistributedDataParallel` too, every rank has all of
    the adapter and no rank waits for another: call it on rank 0, or on all, each of which then
    writes the same bytes and so leaves a whole file, whoever comes last.

    Args:
        model: a model with adapters.
        path: the file to write.
        adapter: the adapter's name; it is not written into the file.
        metadata: notes of the user's, str -> str.

    Raises:
        AdapterIOError: the file can't be written; what was there is still there.
        AdapterStateError: the adapter holds values that are not finite, or none (on the meta
            device), or its layers have blocks of different kinds.
        ArgumentError: there is no such adapter.
        ArgumentTypeError: the metadata is not str -> str.

    Example:
        >>> import tempfile, pathlib
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "adapter.safetensors")
        ...     disha.save_adapter(model, path)
        ...     disha.inspect_adapter(path).layers[0].key
        '0.bone_block'
    """
    ranks, action = Ranks(require_model(model)), f"save adapter {adapter!r}"
    with ranks.agreeing(action):
        parameters = adapter_tensors(model, adapter)
        _check_has_values(adapter, parameters)
    tensors = {
        key: whole(parameter.detach()).to("cpu", copy=True).contiguous()
        for key, parameter in parameters.items()
    }
    records = [
        _record(name, layer.disha[adapter], layer, _base_fingerprint(layer))
        for name, layer in require_adapter(model, adapter)
    ]
    with ranks.agreeing(action):
        target, notes = _checked_path(path), _checked_metadata(metadata)
        header = _encoded_header(model, adapter, tensors, records, notes)
    with ranks.agreeing(action):
        if ranks.writes:
            _write_whole(target, lambda path: _write_tensors(path, tensors, header))


def inspect_adapter(path: PathLike) -> AdapterFile:
    """Return what an adapter file says of itself, without reading any tensor.

    Args:
        path: the file.

    Raises:
        AdapterIOError: the file can't be read.
        AdapterFileError: it is no valid adapter file.

    Example:
        See `save_adapter`.
    """
    path = _checked_path(path)
    with _opened(path) as file:
        return _describe(path, file)


def load_adapter(
    model: nn.Module,
    path: PathLike,
    adapter: str = "default",
    *,
    also_train: bool = True,
    replace: bool = False,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> LoadReport:
    """Load an adapter file into a model, injecting the layers that it describes.

    The file says which layers are adapted and how, so the model can be a plain one. If it has
    adapters already, the loaded one is added and becomes the active one.

    A model that DDP or FSDP wraps can't take new layers: load first, then wrap; or, with
    `replace=True`, load into an adapter that was there before wrapping. Call it on all ranks, each
    of which reads the file. Sharded parameters get their part of it on each rank; what is wrong on
    one rank then raises on all, and none of them has changed.

    Args:
        model: the base model, or one that has other adapters.
        path: the file.
        adapter: the name that the adapter gets in this model.
        also_train: also set the parameters that the file holds beside the blocks.
        replace: where the model has an adapter of that name, copy the file's values into it, in
            place (hot swap); layers and shapes must agree, and no flag changes.
        dtype: dtype of the blocks; the file's by default.
        freeze: freeze all parameters that belong to no adapter, as `inject_adapters` does.

    Returns:
        A `LoadReport` of the keys that were loaded.

    Raises:
        AdapterIOError: the file can't be read.
        AdapterFileError: it is no valid adapter file, or does not fit the model; the message
            lists everything that does not.
        ArgumentError: the name is taken and `replace` is not set.
        ModeError: adapters are merged (`MergeError`), disabled or routed.

        The model is unchanged whenever this raises.

    Warns:
        AdapterFileWarning: the base weights are not those that the adapter was saved from.

    Example:
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
    with Ranks(require_model(model)).agreeing(f"load a file as adapter {adapter!r}"):
        check_adapter_name(adapter)
        check_dtype(dtype)
        refuse_inside((layer for _, layer in adapted_layers(model)), "load an adapter")
        described, tensors = _read(_checked_path(path), also_train)
        keys = _model_keys(model, described)
        taken = adapter in adapter_names(model)
        _check_taken(adapter, taken, replace, dtype)
        if taken:
            values = {keys[key]: tensor for key, tensor in tensors.items()}
            targets, report = _fitting(model, described, keys, adapter, values)
        else:
            report = _inject(model, described, keys, adapter, tensors, also_train, dtype, freeze)
    if taken:
        _replace(model, described, keys, adapter, targets, values)
    _warn_of_other_base(model, described, keys, adapter)
    return report


def _read(path: Path, also_train: bool) -> tuple[AdapterFile, dict[str, Tensor]]:
    """Return what a file says of itself, and its tensors."""
    with _opened(path) as file:
        described = _describe(path, file)
        wanted = [key for key in described.tensors if also_train or key not in described.also_train]
        with _explained(path):
            return described, {key: file.get_tensor(key) for key in wanted}


def _check_taken(adapter: str, taken: bool, replace: bool, dtype: torch.dtype | None) -> None:
    if taken and not replace:
        raise ArgumentError(
            f"the model has an adapter {adapter!r} already; load under another name (adapter=), or "
            "pass replace=True to copy the file's values into it"
        )
    if taken and dtype is not None:
        raise ArgumentError(
            f"dtype={dtype} was given with replace=True, which keeps the blocks that are there; "
            "leave dtype out, or remove the adapter first"
        )


# --- writing -------------------------------------------------------------------------------------


def _encoded_header(
    model: nn.Module,
    adapter: str,
    tensors: Mapping[str, Tensor],
    records: list[LayerRecord],
    metadata: Mapping[str, str],
) -> str:
    """Return the JSON of the file's header."""
    broken = [key for key, tensor in tensors.items() if not finite_as(tensor, tensor.dtype)]
    if broken:
        raise AdapterStateError(
            f"adapter {adapter!r} holds values that are not finite (NaN or infinity) in "
            f"{', '.join(broken[:5])}{', ...' if len(broken) > 5 else ''}, and could not be loaded "
            "again; nothing was written. Go back to an earlier state of the training"
        )
    header = json.dumps(_header(model, adapter, tensors, records, metadata), separators=(",", ":"))
    try:
        safetensors.torch.save({}, metadata={HEADER_KEY: header})
    except safetensors.SafetensorError as error:
        raise ArgumentError(
            f"the adapter does not fit into a safetensors file ({error}); give less metadata"
        ) from error
    return header


def _write_tensors(path: str, tensors: Mapping[str, Tensor], header: str) -> None:
    try:
        safetensors.torch.save_file(dict(tensors), path, metadata={HEADER_KEY: header})
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def _header(
    model: nn.Module,
    adapter: str,
    tensors: Mapping[str, Tensor],
    records: list[LayerRecord],
    metadata: Mapping[str, str],
) -> dict[str, Any]:
    _, layer = require_adapter(model, adapter)[0]
    kinds = {(record.method, record.r_out) for record in records}
    if len(kinds) > 1:
        raise AdapterStateError(
            f"adapter {adapter!r} has blocks of different kinds, {sorted(kinds, key=str)} as "
            "(method, r_out), and a file holds one kind; give each an adapter name of its own"
        )
    keys = {record.key for record in records}
    return {
        "format": FORMAT,
        "config": replace(layer.disha[adapter].config, scale=records[0].scale).to_json(),
        "layers": _grouped(records),
        "also_train": sorted(key for key in tensors if key not in keys),
        "metadata": dict(metadata),
    }


def _record(name: str, block: Block, layer: AdaptedLayer, base: str | None) -> LayerRecord:
    geometry = layer.geometry(layer)
    return LayerRecord(
        name=name,
        method=block.method,
        r=block.r,
        r_out=block.r_out,
        in_features=geometry.in_features,
        out_features=geometry.out_features,
        scale=block.strength,
        base=base,
    )


def _base_fingerprint(layer: AdaptedLayer) -> str | None:
    """Return the fingerprint of a layer's original weight; a quantised one has none.

    Quantising changes the values, and so do a second way of quantising and some kernels, while an
    adapter that was trained on one fits the others.
    """
    return fingerprint(layer.base_weight) if layer.quantisation(layer) is None else None


def _grouped(records: list[LayerRecord]) -> list[dict[str, Any]]:
    """Return the layers grouped by their sizes: most of a model's layers share a few."""
    groups: dict[tuple[Any, ...], dict[str, str | None]] = {}
    for one in records:
        shared = (one.method, one.r, one.r_out, one.in_features, one.out_features, one.scale)
        groups.setdefault(shared, {})[one.name] = one.base
    names = ("kind", "r", "r_out", "in", "out", "scale")
    return [
        {**dict(zip(names, shared, strict=True)), "base": base} for shared, base in groups.items()
    ]


def _check_has_values(adapter: str, parameters: Mapping[str, nn.Parameter]) -> None:
    meta = [key for key, parameter in parameters.items() if parameter.is_meta]
    if meta:
        raise AdapterStateError(
            f"adapter {adapter!r} is on the meta device ({meta[0]}), where it has no values to save"
        )


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in metadata.items()
    ):
        raise ArgumentTypeError(f"metadata must be a dict of str -> str, got {metadata!r}")
    return dict(sorted(metadata.items()))


def _checked_path(path: object) -> Path:
    """Return a path that the file system can be asked about."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ArgumentTypeError(
            f"path must be a str or a pathlib.Path, got {path!r} of type {type(path).__name__}"
        )
    try:
        with suppress(FileNotFoundError):  # one to be written, or missed with its own message
            os.stat(path)
    except (OSError, ValueError) as error:
        raise AdapterIOError(f"{str(path)[:80]!r} can't be a file here: {error}") from error
    return Path(path)


def _write_whole(path: Path, write: Callable[[str], None]) -> None:
    """Let `write` fill a file so that its path never leads to a part of it."""
    target = Path(os.path.realpath(path))  # through a symbolic link: the link stays
    if target.is_dir():
        raise AdapterIOError(f"can't save to {path}: it is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise AdapterIOError(f"can't save to {path}: it is no regular file; name another")
    if not target.parent.is_dir():
        raise AdapterIOError(
            f"can't save to {path}: the folder {target.parent} does not exist; create it first"
        )
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(".tmp", f".{target.name}.", target.parent)
        os.close(descriptor)
        write(temporary)
        os.chmod(temporary, _permissions(target))
        _sync(Path(temporary))
        os.replace(temporary, target)
        temporary = None
        _sync(target.parent)
    except OSError as error:
        raise AdapterIOError(
            f"can't save to {path}: {error.strerror or error}; what was there is unchanged"
        ) from error
    finally:
        if temporary is not None:
            os.unlink(temporary)


def _permissions(target: Path) -> int:
    """The mode of the file that is replaced, or else what a new file would get."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync(path: Path) -> None:
    """Let a file, or a folder with its names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading -------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.is_dir():
        raise AdapterIOError(f"can't read {path}: it is a folder; name the .safetensors file")
    with _explained(path), safetensors.safe_open(path, framework="pt") as file:
        yield file


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what safetensors raises into our own errors, which name the file."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise AdapterFileError(
            f"{path} is not a whole safetensors file ({error}); it is damaged, was cut off, or is "
            "another kind of file. Get it again"
        ) from error
    except OSError as error:
        if isinstance(error, DishaError):
            raise
        raise AdapterIOError(
            f"can't read {path}: {error.strerror or error}; check the path"
        ) from error


def _describe(path: Path, file: Any) -> AdapterFile:
    header = _Header(path, _parsed_header(path, file.metadata() or {}))
    tensors = {}
    for key in file.keys():  # noqa: SIM118 - not a dict
        described = file.get_slice(key)
        if described.get_dtype() not in _DTYPES:
            raise AdapterFileError(
                f"{path}: tensor {key!r} has dtype {described.get_dtype()}; "
                f"allowed are {', '.join(_DTYPES)}"
            )
        tensors[key] = TensorRecord(tuple(described.get_shape()), _DTYPES[described.get_dtype()])
    layers, also_train = header.layers(), header.also_train()
    _check_keys(path, [layer.key for layer in layers] + list(also_train), tensors)
    return AdapterFile(
        path=path,
        format=FORMAT,
        config=header.config(),
        layers=layers,
        also_train=also_train,
        tensors=tensors,
        metadata=header.metadata(),
        nbytes=path.stat().st_size,
    )


def _parsed_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(HEADER_KEY)
    if text is None:
        raise AdapterFileError(
            f"{path} is a safetensors file without a {HEADER_KEY!r} entry in its metadata: it "
            "was not written by disha.save_adapter"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise AdapterFileError(
            f"{path}: the header must be a JSON object, is {type(header).__name__}"
        )
    version = header.get("format")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise AdapterFileError(f"{path}: the header's format must be a number, is {version!r}")
    if version > FORMAT:
        raise AdapterFileError(
            f"{path} has format {version}, and this version of disha reads up to {FORMAT}; "
            "upgrade disha-torch"
        )
    return header


class _Header:
    """The fields of a header, each checked as it is read."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def config(self) -> AdapterConfig:
        try:
            return AdapterConfig.from_json(self._field(self.fields, "config", dict))
        except DishaError as error:
            raise AdapterFileError(f"{self.path}: {error}") from error

    def layers(self) -> tuple[LayerRecord, ...]:
        records = [
            record
            for group in self._field(self.fields, "layers", list)
            for record in self._group(group)
        ]
        if not records:
            raise AdapterFileError(f"{self.path}: the header lists no layer")
        names = [record.name for record in records]
        if len(set(names)) != len(names):
            raise AdapterFileError(f"{self.path}: the header lists a layer twice")
        return tuple(records)

    def _group(self, group: object) -> Iterator[LayerRecord]:
        if not isinstance(group, dict):
            raise AdapterFileError(f"{self.path}: an entry of the header's layers is no object")
        kind = self._field(group, "kind", str)
        if kind not in BLOCKS:
            raise AdapterFileError(
                f"{self.path}: unknown kind {kind!r}; known are {', '.join(BLOCKS)}"
            )
        r_out = None if group.get("r_out") is None else self._size(group, "r_out")
        scale = self._scale(group)
        for name, base in self._field(group, "base", dict).items():
            if base is not None and not isinstance(base, str):
                raise AdapterFileError(f"{self.path}: the fingerprint of {name!r} is no text")
            yield LayerRecord(
                name=name,
                method=kind,
                r=self._size(group, "r"),
                r_out=r_out,
                in_features=self._size(group, "in"),
                out_features=self._size(group, "out"),
                scale=scale,
                base=base,
            )

    def also_train(self) -> tuple[str, ...]:
        names = self._field(self.fields, "also_train", list)
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise AdapterFileError(
                f"{self.path}: the header's also_train must list names, each once"
            )
        return tuple(names)

    def metadata(self) -> dict[str, str]:
        metadata = self._field(self.fields, "metadata", dict)
        if not all(isinstance(value, str) for value in metadata.values()):
            raise AdapterFileError(f"{self.path}: the header's metadata must be text")
        return metadata

    def _field(self, fields: dict[str, Any], name: str, kind: type[T]) -> T:
        value = fields.get(name)
        if not isinstance(value, kind):
            raise AdapterFileError(
                f"{self.path}: the header's field {name!r} must be a JSON {kind.__name__}, "
                f"is {type(value).__name__}"
            )
        return value

    def _scale(self, fields: dict[str, Any]) -> float:
        try:
            check_scale(fields.get("scale"))
        except DishaError as error:
            raise AdapterFileError(f"{self.path}: {error}") from error
        return float(fields["scale"])

    def _size(self, fields: dict[str, Any], name: str) -> int:
        value = self._field(fields, name, int)
        if isinstance(value, bool) or not 1 <= value < 2**31:
            raise AdapterFileError(
                f"{self.path}: the header's field {name!r} must be a size, is {value!r}"
            )
        return value


def _check_keys(path: Path, described: list[str], tensors: Mapping[str, object]) -> None:
    missing = [key for key in described if key not in tensors]
    extra = sorted(set(tensors) - set(described))
    if missing or extra:
        parts = [f"missing {key!r}" for key in missing[:10]] + [
            f"not described {key!r}" for key in extra[:10]
        ]
        raise AdapterFileError(
            f"{path}: tensors and header disagree ({len(missing)} missing, {len(extra)} not "
            f"described): {', '.join(parts)}"
        )


# --- into the model ------------------------------------------------------------------------------


def _inject(
    model: nn.Module,
    described: AdapterFile,
    keys: Mapping[str, str],
    adapter: str,
    tensors: Mapping[str, Tensor],
    also_train: bool,
    dtype: torch.dtype | None,
    freeze: bool,
) -> LoadReport:
    requests = [
        LayerRequest(
            name=layer.name,
            r=layer.r,
            in_features=layer.in_features,
            out_features=layer.out_features,
            block_shape=described.tensors[layer.key].shape,
            dtype=dtype or described.tensors[layer.key].dtype,
        )
        for layer in described.layers
    ]
    beside = {key: described.tensors[key].shape for key in described.also_train if also_train}
    with _named(described.path):
        _check_uniform(described)
        plan = plan_layers(model, adapter, described.config, requests, beside, freeze)
    dtypes = {
        layer.key: request.dtype for layer, request in zip(described.layers, requests, strict=True)
    }
    _check_finite(model, described, keys, tensors, dtypes)
    apply_plan(model, plan)
    targets = adapter_tensors(model, adapter)
    values = {keys[key]: tensor for key, tensor in tensors.items()}
    copy_values(targets, values)
    _set_strengths(model, described, keys, adapter)
    return check_fit(targets, values)


def _fitting(
    model: nn.Module,
    described: AdapterFile,
    keys: Mapping[str, str],
    adapter: str,
    values: Mapping[str, Tensor],
) -> tuple[dict[str, nn.Parameter], LoadReport]:
    """Return the parameters that a file's values are to replace; raise if they don't fit."""
    beside = {keys[key] for key in described.also_train}
    targets = {
        key: parameter
        for key, parameter in adapter_tensors(model, adapter).items()
        if key in values or key not in beside
    }
    report = check_fit(targets, values)
    problems = [] if report.complete else [str(report)]
    problems += _other_sizes(model, described, keys, adapter)
    if problems:
        listing = "\n".join(problems[:20])
        raise AdapterFileError(
            f"{described.path} does not fit the adapter {adapter!r} that it was to replace; "
            f"nothing was loaded:\n{listing}"
        )
    return targets, report


def _replace(
    model: nn.Module,
    described: AdapterFile,
    keys: Mapping[str, str],
    adapter: str,
    targets: Mapping[str, nn.Parameter],
    values: Mapping[str, Tensor],
) -> None:
    copy_values(targets, values)
    for _, layer in require_adapter(model, adapter):
        layer.disha[adapter].reconfigure(described.config)
    _set_strengths(model, described, keys, adapter)


def _model_keys(model: nn.Module, described: AdapterFile) -> dict[str, str]:
    """Return each key of the file -> the key of the same parameter in the model.

    They differ where a module or a parameter has several names and the file knows another one.
    """
    names = Survey(model).names
    first = {name: aliases[0] for aliases in names.values() for name in aliases}
    parameters = parameter_aliases(names)
    keys = {key: parameters.get(key, key) for key in described.also_train}
    for layer in described.layers:
        keys[layer.key] = replace(layer, name=first.get(layer.name, layer.name)).key
    return keys


def _set_strengths(
    model: nn.Module, described: AdapterFile, keys: Mapping[str, str], adapter: str
) -> None:
    scales = {keys[layer.key]: layer.scale for layer in described.layers}
    for name, layer in require_adapter(model, adapter):
        block = layer.disha[adapter]
        block.set_strength(scales[join(name, block.parameter_name)])


def _other_sizes(
    model: nn.Module, described: AdapterFile, keys: Mapping[str, str], adapter: str
) -> list[str]:
    """Return what the file says of layers and the model's adapter contradicts."""
    asked = {keys[layer.key]: layer for layer in described.layers}
    problems = []
    for name, layer in require_adapter(model, adapter):
        found = _record(name, layer.disha[adapter], layer, base=None)
        wanted = asked.get(found.key)
        if wanted is not None and found.sizes != wanted.sizes:
            problems.append(f"{name}: the file has {wanted.sizes}, the model {found.sizes}")
    return problems + _not_uniform(described)


def _check_uniform(described: AdapterFile) -> None:
    problems = _not_uniform(described)
    if problems:
        raise AdapterFileError("; ".join(problems[:10]))


def _not_uniform(described: AdapterFile) -> list[str]:
    """Return the layers whose method or tile is not the configuration's."""
    config = described.config
    return [
        f"layer {layer.name!r} has kind {layer.method!r} and r_out {layer.r_out}, but the "
        f"configuration says {config.method!r} and {config.r_out}"
        for layer in described.layers
        if (layer.method, layer.r_out) != (config.method, config.r_out)
    ]


def _check_finite(
    model: nn.Module,
    described: AdapterFile,
    keys: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype | None],
) -> None:
    """Raise if a value is not finite, or would not be in the dtype that it is loaded into."""
    owners = parameter_owners(module_names(model))
    broken = []
    for key, tensor in tensors.items():
        dtype = dtypes.get(key)
        if dtype is None:
            module, name = owners[keys[key]]
            dtype = getattr(module, name).dtype
        if not finite_as(tensor, dtype):
            broken.append(f"{key} (as {dtype})")
    if broken:
        raise AdapterFileError(
            f"{described.path} holds values that are not finite (NaN or infinity) in "
            f"{', '.join(broken[:10])}; nothing was loaded. Get another version of the file, or "
            "load it in a wider dtype"
        )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors about the file's contents name the file."""
    try:
        yield
    except (ArgumentError, AdapterFileError) as error:
        raise AdapterFileError(f"{path}: {error}") from error


def _warn_of_other_base(
    model: nn.Module, described: AdapterFile, keys: Mapping[str, str], adapter: str
) -> None:
    recorded = {keys[layer.key]: layer.base for layer in described.layers}
    other, known = [], 0
    for name, layer in require_adapter(model, adapter):
        now = _base_fingerprint(layer)
        base = recorded[join(name, layer.disha[adapter].parameter_name)]
        if now is None or base is None:
            continue
        known += 1
        if not same_base(now, base):
            other.append(name)
    if other:
        shown = ", ".join(other[:3]) + (", ..." if len(other) > 3 else "")
        warnings.warn(
            f"{described.path} was saved from other base weights than the model's in {len(other)} "
            f"of {known} layers ({shown}): load the base that it was trained on, or check that the "
            "adapter is not merged into this one already",
            AdapterFileWarning,
            stacklevel=3,
        )
