"""Read LoRA files of image models without the models."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disha.errors import AdapterFileError, ConversionError
from disha.files import LayerRecord
from disha.files.atomic import PathLike, checked_path
from disha.files.checksum import HEADER_KEY
from disha.files.contents import Contents
from disha.files.json_files import parsed_json
from disha.files.tensors import TensorFile, opened
from disha.functional import Layout
from disha.interop.image_names import (
    ALPHA,
    COMPONENTS,
    FLUX_ROWS,
    METADATA,
    Form,
    in_model,
    joined_rows,
    layers_of,
)
from disha.interop.lora_folder import CONV, MATRIX, Alphas, checked_alpha, contents_of_layers
from disha.interop.low_rank import layer_of_factors, listed
from disha.interop.peft_files import PREFIX, Fields, refuse_to_load, unusable
from disha.text import brief, counted, first_few

__all__ = ["form_of", "read_components", "read_file"]

READERS = "the programs that it is made for"
"""What reads LoRA files of image models, for errors."""

_A, _B = MATRIX
_ENDS = {".lora_down.weight": _A, ".lora_up.weight": _B, _A: _A, _B: _B, ALPHA: ALPHA}
"""The ends of keys -> what they are."""

_OTHER_METHODS = re.compile(
    r"\.(lokr_|hada_|oft_|dora_|lora_mid\.|lora_magnitude_vector|diff(_b)?$|[wb]_norm$|set_weight$)"
)
_OLD_DIFFUSERS = re.compile(r"(_lora|\.lora|\.lora_linear_layer)\.(down|up)\.weight$")


def form_of(path: PathLike) -> Form | None:
    """Return the form of a LoRA file of image models, or None if a file is no such LoRA.

    Files of other methods than LoRA count too: reading them raises an error that names the method.

    Args:
        path: a safetensors file.

    Raises:
        AdapterIOError: it can't be read.
        AdapterFileError: it is not a complete safetensors file.
    """
    with opened(checked_path(path)) as file:
        keys = list(file.tensors)
        if HEADER_KEY in file.metadata:
            return None
    if not any(
        key.endswith(tuple(_ENDS)) or _OTHER_METHODS.search(key) or _OLD_DIFFUSERS.search(key)
        for key in keys
    ):
        return None
    if any(key.startswith("lora_") for key in keys):
        return "kohya"
    return "comfyui" if any(key.endswith(ALPHA) for key in keys) else "diffusers"


def read_file(path: PathLike) -> dict[str, Contents]:
    """Read a LoRA file of image models whose LoRAs are Bone adapters, without the models.

    It may have any of the forms that `export` writes; the keys show which. A layer without `alpha`
    has the scale 1, as all of its readers take it.

    Args:
        path: the file.

    Returns:
        Component -> the header and the tensors of its adapter.

    Raises:
        AdapterIOError: the file can't be read.
        AdapterFileError: it is damaged, a key or a shape is unknown, or a value is not finite.
        ConversionError: it holds another method than LoRA, or a LoRA that is not a Bone adapter.

    Examples:
        >>> import tempfile, pathlib
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop import image_lora
        >>> unet = nn.ModuleDict({"conv_in": nn.Conv2d(4, 8, 3)})
        >>> unet = disha.inject_adapters(unet, "conv_in", r=2, init="kaiming")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "lora.safetensors")
        ...     _ = image_lora.export({"unet": unet}, path)
        ...     header, tensors = image_lora.read_file(path)["unet"]
        >>> [(layer.name, layer.r) for layer in header.layers]
        [('conv_in', 2)]
    """
    return read_components(checked_path(path), {})


def read_components(path: Path, modules: Mapping[str, Collection[str]]) -> dict[str, Contents]:
    """Return component -> its adapter.

    Args:
        path: the file.
        modules: component -> the names of the modules of its model, as far as they are known.
    """
    with opened(path) as file:
        found, text = _factors(file), file.metadata.get(METADATA)
    settings = {} if text is None else parsed_json(f"{path}: {METADATA}", text, strict=True)
    layers: dict[str, list[tuple[LayerRecord, Tensor]]] = {}
    fields: dict[str, Fields] = {
        component: _fields(path, settings, component) for component in COMPONENTS
    }
    alphas = {component: Alphas(own) for component, own in fields.items() if own.values}
    others: list[str] = []
    for pair in found:
        component = pair.component
        for name, a, b in _split(pair):
            layer = layer_of_factors(
                in_model(component, name, modules.get(component)),
                a,
                b,
                Layout(CONV if a.dim() > 2 else "out in"),
                _scale(path, pair, alphas.get(component)),
            )
            if layer is None:
                others.append(f"{component}.{name}")
            else:
                layers.setdefault(component, []).append(layer)
    if others:
        raise ConversionError(
            f"{path} is not a Bone adapter: its factor A must be [I I ... I], and it is not in "
            f"{counted(len(others), 'layer')} ({listed(others)}); use this LoRA in the program "
            "that it is made for, or merge it there"
        )
    return {
        component: contents_of_layers(fields[component], layers[component], {})
        for component in COMPONENTS
        if component in layers
    }


@dataclass(frozen=True)
class _Pair:
    """What a file has under one key.

    Attributes:
        key: the key, without its end.
        component: the component.
        names: the names of the layers that are joined there.
        a: A (rank, in, ...).
        b: B (out, rank, ...).
        alpha: alpha, or None if the file has none.
    """

    key: str
    component: str
    names: tuple[str, ...]
    a: Tensor
    b: Tensor
    alpha: Tensor | None


def _factors(file: TensorFile) -> list[_Pair]:
    """Return the factors in a file.

    Raises:
        AdapterFileError: keys are unknown or incomplete, shapes don't belong together, or values
            are not finite.
        ConversionError: the file holds another method than LoRA.
    """
    if HEADER_KEY in file.metadata:
        raise AdapterFileError(
            f"{file.path} is an adapter file of disha, not a LoRA; load it with disha.load_adapter"
        )
    parts: dict[str, dict[str, str]] = {}
    unknown, problems = [], []
    for key in file.tensors:
        end = next((end for end in _ENDS if key.endswith(end)), None)
        if end is None or layers_of(key.removesuffix(end)) is None:
            unknown.append(key)
            continue
        own = parts.setdefault(key.removesuffix(end), {})
        first = own.setdefault(_ENDS[end], key)
        if first != key:
            problems.append(f"{first} and {key} are the same factor of one layer")
    _refuse_unknown(file.path, unknown)
    problems += [
        f"{key}: has only {', '.join(own.values())}, and a LoRA has two factors"
        for key, own in parts.items()
        if not {_A, _B} <= own.keys()
    ]
    refuse_to_load(file.path, problems, READERS)
    pairs = []
    for key, own in parts.items():
        tensors = {stored: file.read(stored) for stored in own.values()}
        a, b = tensors[own[_A]], tensors[own[_B]]
        alpha = tensors.get(own.get(ALPHA, ""))
        component, names = layers_of(key) or ("", ())
        problems += unusable({own[_A]: a, own[_B]: b})
        if a.dim() != b.dim() or a.dim() < 2 or not a.numel() or a.shape[0] != b.shape[1]:
            problems.append(
                f"{key}: the factors have the shapes {tuple(a.shape)} and {tuple(b.shape)}; they "
                "must be (rank, in, ...) and (out, rank, ...)"
            )
        elif len(names) > 1 and (a.dim(), b.shape[0]) != (2, sum(joined_rows(a, len(names)))):
            problems.append(
                f"{key}: B has {b.shape[0]} rows; in Flux, it has "
                f"{sum(FLUX_ROWS[: len(names)])} times the {a.shape[1]} columns of A"
            )
        if alpha is not None and (alpha.numel() != 1 or alpha.is_complex()):
            problems.append(
                f"{key}: alpha must be one number, and real; its shape is {tuple(alpha.shape)} and "
                f"its dtype {alpha.dtype}"
            )
        pairs.append(_Pair(key, component, names, a, b, alpha))
    refuse_to_load(file.path, problems, READERS)
    return pairs


def _refuse_unknown(path: Path, unknown: Sequence[str]) -> None:
    if not unknown:
        return
    shown = first_few([brief(key) for key in unknown], 5, ", ")
    if any(_OTHER_METHODS.search(key) for key in unknown):
        raise ConversionError(
            f"{path} holds another method than LoRA ({shown}), such as LoHa, LoKr or DoRA, which "
            "has no equal Bone adapter; use the file in the program that it is made for"
        )
    if any(_OLD_DIFFUSERS.search(key) for key in unknown):
        raise AdapterFileError(
            f"{path} has keys of old versions of diffusers ({shown}); load it in diffusers, and "
            "save it again"
        )
    if all(key.startswith(PREFIX) for key in unknown):
        raise AdapterFileError(
            f"{path} is a file of a folder that PEFT has saved ({shown}); name the folder"
        )
    raise AdapterFileError(
        f"{path} has unknown keys ({shown}); known are {', '.join(COMPONENTS)} with names of "
        "diffusers, and lora_unet_, lora_te_, lora_te1_ and lora_te2_ with those of diffusers, or "
        "of Flux. If it is for another architecture, use it there"
    )


def _fields(path: Path, settings: Mapping[str, Any], component: str) -> Fields:
    start = f"{component}."
    own = {key.removeprefix(start): settings[key] for key in settings if key.startswith(start)}
    return Fields(path, own)


def _scale(path: Path, pair: _Pair, alphas: Alphas | None) -> float:
    """Return the scale of a layer: by its alpha, or by the configuration in the metadata, or 1."""
    rank = pair.a.shape[0]
    if pair.alpha is None:
        return 1.0 if alphas is None else alphas.scale(pair.names[0], rank)
    return checked_alpha(f"{path}: {pair.key}{ALPHA}", float(pair.alpha)) / rank


def _split(pair: _Pair) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, A and B of the layers under one key. Of several, only those with an update.

    The layers share all rows of A, or each has its own rows. The first of these begins with a 1.
    """
    a = pair.a
    if len(pair.names) == 1:
        yield pair.names[0], a, pair.b
        return
    starts = [0, *a[:, 0].nonzero().flatten().tolist(), a.shape[0]]
    rows = joined_rows(a, len(pair.names))
    for name, part in zip(pair.names, torch.split(pair.b, rows), strict=True):
        columns = part.any(dim=0).nonzero().flatten().tolist()
        if columns or not pair.b.any():
            first, last = (columns[0], columns[-1]) if columns else (0, 0)
            start = max(row for row in starts if row <= first)
            stop = min(row for row in starts if row > first)
            own = slice(start, stop) if last < stop else slice(None)
            yield name, a[own], part[:, own]
