"""Write LoRA files of image models without the models.

- `diffusers`: the scale is multiplied into B, because some ways to load a file ignore any other
  scale: `load_lora_adapter` reads the configuration in the metadata only with `use_safetensors`.
- `kohya`, `comfyui`: each layer has a tensor `alpha`, and its update is alpha / rank B A.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from disha.errors import ConversionError
from disha.files.atomic import PathLike, checked_path, write_files
from disha.files.contents import Contents
from disha.files.pieces import tensor_writer
from disha.interop.image_names import (
    ALPHA,
    METADATA,
    check_component,
    check_form,
    flux_key,
    in_file,
    joined_rows,
    kohya_key,
    readable,
)
from disha.interop.lora_folder import CONV, alpha_of, factors_of, scaling_of
from disha.interop.low_rank import (
    BaseWeight,
    LoraReport,
    LowRankUpdate,
    Progress,
    listed,
    low_rank_updates,
)
from disha.interop.peft_files import anchored
from disha.text import counted

__all__ = ["Updates", "updates_of", "write_file", "write_updates"]

Updates = Mapping[str, Sequence[LowRankUpdate]]
"""Component -> the factors of its layers."""


def write_file(
    path: PathLike,
    contents: Mapping[str, Contents],
    form: str = "diffusers",
    *,
    rank: int | None = None,
    max_error: float | None = None,
    bases: Mapping[str, BaseWeight] | None = None,
    progress: Progress = iter,
) -> LoraReport:
    """Write adapters without their models as one LoRA file, as `export` does.

    The checks that need the model are left out: this assumes that convolutions have one group, no
    dilation, and padding with zeros, as in the UNets of `diffusers`. In the form `"kohya"`, a
    transformer must be Flux, and have a layer in `single_transformer_blocks`: Flux shares its other
    names with Stable Diffusion 3.

    Args:
        path: the file to write.
        contents: component -> header and tensors of its adapter.
        form: `"diffusers"`, `"kohya"` or `"comfyui"`.
        rank: largest rank of a layer.
        max_error: largest relative error of a layer.
        bases: component -> the function that returns its base weights; only BAT needs it.
        progress: receives the layers, and yields each before it is converted.

    Returns:
        A `LoraReport`, with the rank and the error of every layer.

    Raises:
        ConversionError: a reader of this form does not know a layer, or has no place for it;
            parameters were trained with the blocks; or an error is above `max_error`.
        ArgumentError: a component or the form is unknown, a limit is out of range, or BAT lacks
            `rank` or `bases`.
        ArgumentTypeError: an argument is of the wrong type.
        AdapterStateError: the adapter holds values that are not finite.
        AdapterIOError: the file can't be written; what was there is unchanged.

    Examples:
        >>> import tempfile, pathlib
        >>> from torch import nn
        >>> import disha
        >>> from disha.files.contents import adapter_contents
        >>> from disha.interop import image_lora
        >>> from disha.model import ModelView
        >>> unet = nn.ModuleDict({"conv_in": nn.Conv2d(4, 8, 3)})
        >>> contents = adapter_contents(ModelView(disha.inject_adapters(unet, "conv_in", r=2)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "lora.safetensors")
        ...     image_lora.write_file(path, {"unet": contents}, "comfyui").error
        0.0
    """
    check_form(form)
    target = checked_path(path)
    if form == "kohya" and "transformer" in contents:
        names = [layer.name for layer in contents["transformer"][0].layers]
        if not any(name.startswith("single_") for name in names):
            raise ConversionError(
                "the transformer may be Flux or Stable Diffusion 3, which have layers of the same "
                "names, and kohya's keys are known for Flux only; write the form 'comfyui' or "
                "'diffusers', or export from the model (disha.interop.image_lora.export)"
            )
    updates = updates_of(contents, bases or {}, rank, max_error, progress)
    return write_updates(target, contents, updates, form, contents)


def updates_of(
    contents: Mapping[str, Contents],
    bases: Mapping[str, BaseWeight],
    rank: int | None,
    max_error: float | None,
    progress: Progress = iter,
) -> Updates:
    """Return the factors of all layers, with the arguments of `write_file`.

    Raises:
        ConversionError: a file has no place for a part of an adapter, or see `write_file`.
    """
    for component, (header, _) in contents.items():
        check_component(component)
        if header.also_train:
            raise ConversionError(
                f"an image LoRA holds updates of layers only, and parameters of the {component} "
                f"were trained with the blocks ({listed(header.also_train)}); leave them out "
                "(--no-also-train), or use the merged model (merge_adapters)"
            )
        other = [one for one in header.layers if one.layout.pattern not in ("out in", CONV)]
        if other:
            raise ConversionError(
                "an image LoRA holds linear layers, and convolutions that are not transposed; the "
                f"{component} has {listed([one.name for one in other])} with the layout "
                f"{other[0].layout}. Leave it out of the adapter (`exclude`), or use the merged "
                "model (merge_adapters)"
            )
    return {
        component: low_rank_updates(
            header,
            tensors,
            rank=rank,
            max_error=max_error,
            base=bases.get(component),
            progress=progress,
        )
        for component, (header, tensors) in contents.items()
    }


def write_updates(
    path: Path,
    contents: Mapping[str, Contents],
    updates: Updates,
    form: str,
    known: Collection[str],
    *,
    writes: bool = True,
) -> LoraReport:
    """Write the file, and return its report.

    Args:
        path: the file.
        contents: component -> its adapter.
        updates: component -> the factors of its layers.
        form: the form.
        known: all components of the pipeline that are known, adapted or not.
        writes: False to check only, on a rank that does not write.

    Raises:
        ConversionError: the readers of the form don't know a layer.
    """
    named = {
        component: [one.with_record(name=f"{component}.{one.record.name}") for one in own]
        for component, own in updates.items()
    }
    unknown = [
        full.record.name
        for component, own in updates.items()
        for one, full in zip(own, named[component], strict=True)
        if not readable(form, component, one.record.name)
    ]
    if unknown:
        raise ConversionError(
            f"{form} has no key for {counted(len(unknown), 'layer')} ({listed(unknown)}), so "
            "nothing was written; leave them out of the adapter (`exclude`), or write the form "
            "'diffusers'"
        )
    tensors: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    for component, own in updates.items():
        if form == "diffusers":
            own = [_scaled(one) for one in own]
            settings |= _settings(component, own, contents[component][0].config.dropout)
            tensors |= _under_own_names(component, own)
        elif form == "comfyui" and component == "transformer":
            tensors |= _under_own_names(component, own)
            tensors |= {f"{one.record.name}{ALPHA}": _alpha(one) for one in named[component]}
        else:
            tensors |= _as_in_kohya(component, own, known)
    if writes:
        metadata = {METADATA: json.dumps(settings)} if settings else {}
        write_files({path: tensor_writer(tensors, {"format": "pt", **metadata})})
    return LoraReport.of(path, [one for own in named.values() for one in own])


def _scaled(update: LowRankUpdate) -> LowRankUpdate:
    """Return the same update with scale 1: s B in place of B, in float32 if B's dtype rounds it."""
    product = update.b.double() * update.record.scale
    b = product.to(update.b.dtype)
    if not torch.equal(b.double(), product):
        b = product.to(torch.promote_types(update.b.dtype, torch.float32))
    return dataclasses.replace(update.with_record(scale=1.0), b=b)


def _settings(
    component: str, updates: Sequence[LowRankUpdate], dropout: float
) -> dict[str, object]:
    """Return the configuration of PEFT's LoRA for one component."""
    key_of: Callable[[str], str] = anchored
    if component.startswith("text_encoder"):  # the start of these names depends on the version
        key_of = re.escape
        updates = [
            one.with_record(name=one.record.name.removeprefix("text_model.")) for one in updates
        ]
    fields = {
        **scaling_of(updates, key_of),
        "target_modules": sorted(one.record.name for one in updates),
        "lora_dropout": dropout,
    }
    return {f"{component}.{field}": value for field, value in fields.items()}


def _under_own_names(component: str, updates: Sequence[LowRankUpdate]) -> dict[str, Tensor]:
    return {
        f"{component}.{in_file(component, one.record.name)}{end}": factor
        for one in updates
        for end, factor in factors_of(one).items()
    }


def _as_in_kohya(
    component: str, updates: Sequence[LowRankUpdate], known: Collection[str]
) -> dict[str, Tensor]:
    if component == "transformer":
        keyed = _joined(updates)
    else:
        keyed = {kohya_key(component, one.record.name, known): one for one in updates}
    tensors: dict[str, Tensor] = {}
    for key, one in keyed.items():
        a, b = factors_of(one).values()
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        tensors[f"{key}{ALPHA}"] = _alpha(one)
    return tensors


def _alpha(update: LowRankUpdate) -> Tensor:
    """Return alpha in float32, as usual, unless that rounds it."""
    alpha = torch.tensor(alpha_of(update), dtype=torch.float64, device="cpu")
    return alpha.float() if alpha.float().double() == alpha else alpha


# --- layers that Flux joins ----------------------------------------------------------------------


def _joined(updates: Sequence[LowRankUpdate]) -> dict[str, LowRankUpdate]:
    """Return the layers of Flux by their keys: q, k and v (and proj_mlp) are one weight there."""
    found = {one.record.name: one for one in updates}
    keys = dict(key for name in found if (key := flux_key(name)) is not None)
    return {key: _join(key, [found.get(one) for one in names]) for key, names in keys.items()}


def _join(key: str, parts: Sequence[LowRankUpdate | None]) -> LowRankUpdate:
    """Return one update for layers with the same input, whose outputs follow one another.

    Layers with the same A share it. Otherwise, each has its own rows of A and columns of B.
    """
    given = [one for one in parts if one is not None]
    if len(parts) == 1:
        return given[0]
    size = given[0].a.shape[1]
    rows = joined_rows(given[0].a, len(parts))  # a part that is not adapted has rows too
    shapes = [(one.b.shape[0], one.a.shape[1]) for one in given]
    fits = shapes == [(row, size) for row, one in zip(rows, parts, strict=True) if one is not None]
    if not fits or len({one.record.scale for one in given}) > 1:
        raise ConversionError(
            f"{listed([one.record.name for one in given])} are one weight in Flux ({key}), but "
            + ("their scales differ; set one scale" if fits else "do not have its sizes")
            + ", or write the form 'comfyui' or 'diffusers'"
        )
    shared = all(torch.equal(one.a, given[0].a) for one in given)
    dtype = reduce(torch.promote_types, [one.b.dtype for one in given])  # rounds none of them
    a = (given[0].a if shared else torch.cat([one.a for one in given])).to(dtype)
    b = given[0].b.new_zeros(sum(rows), a.shape[0], dtype=dtype)
    column = 0
    for one, place in zip(parts, torch.split(b, rows), strict=True):
        if one is not None:
            place[:, column : column + one.rank] = one.b
            column += 0 if shared else one.rank
    return dataclasses.replace(given[0], a=a, b=b)
