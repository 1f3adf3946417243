"""Find the weights of an adapter in a base checkpoint, and say whether the two fit together."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from disha.checks import TRAINABLE_DTYPES
from disha.errors import AdapterFileError, AdapterIOError, ConversionError
from disha.files import AdapterContents, AdapterFile, file_at, find_adapter
from disha.files.contents import read_contents
from disha.files.disk import PathLike
from disha.interop.checkpoints.reading import Checkpoint, open_checkpoint
from disha.interop.experts import DOWN, GATE_UP
from disha.interop.low_rank import BaseWeight
from disha.interop.peft_format import find_folder, read_config
from disha.interop.peft_reading import UNKNOWN, Base, read_folder
from disha.layers.fingerprints import fingerprint, same_base
from disha.layers.kinds import PROJECTIONS
from disha.layers.spec import BlockSpec
from disha.text import cut_common_end, first_few, group_by_reason, join

STORED_NAMES = {
    "experts.gate_up_proj": "input_linear.weight",
    "experts.down_proj": "output_linear.weight",
    "router.weight": "router.layer.weight",
}
"""Ends of names that `transformers` changes as it loads a GraniteMoe: in the model, in the file."""


def misfits(base: PathLike, adapter_path: PathLike) -> list[str]:
    """Return a line for each layer of an adapter file that does not belong to a base checkpoint.

    A layer belongs to it if the checkpoint has a weight of its name and shape, and 64 values of
    this weight are those that the adapter was saved from.

    Args:
        base: one safetensors file, or a folder as Hugging Face libraries write it.
        adapter_path: the adapter file.

    Raises:
        AdapterIOError: a file can't be read.
        AdapterFileError: a file is damaged, or the checkpoint lacks some of the weights.

    Examples:
        >>> import pathlib, tempfile
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop.checkpoints import misfits
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base, path = pathlib.Path(folder, "base.safetensors"), pathlib.Path(folder, "a")
        ...     save_file(model.state_dict(), base)
        ...     disha.save_adapter(disha.inject_adapters(model, "0", r=4), path)
        ...     misfits(base, path)
        []
    """
    checkpoint = open_checkpoint(base)
    adapter_file = read_adapter(adapter_path, checkpoint)
    keys = find_keys(checkpoint, adapter_file)
    return find_misfits(checkpoint, adapter_file, keys)


def read_adapter(path: PathLike, base: Checkpoint | None) -> AdapterFile:
    """Return the adapter that a file or a folder of PEFT holds.

    A folder may need the base, by default the checkpoint that it names, if that is on this disk.
    """
    path = find_adapter(path)
    folder = find_folder(path)
    if folder is None:
        return read_contents(file_at(path))
    contents = read_folder(folder, what_is_known_of(base or find_noted_base(folder)))
    return AdapterFile(
        **vars(contents),
        path=folder,
        format=None,
        nbytes=sum(tensor.nbytes for tensor in contents.tensors.values()),
    )


def find_noted_base(folder: Path) -> Checkpoint | None:
    """Return the checkpoint that a folder of PEFT names, if it is on this disk."""
    name = read_config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not os.path.isdir(name):
        return None
    try:
        return open_checkpoint(name)
    except AdapterIOError as error:
        raise AdapterIOError(f"{folder} notes its base, and {error}") from error


def what_is_known_of(checkpoint: Checkpoint | None) -> Base:
    """Return what a checkpoint tells as the base of an adapter."""
    if checkpoint is None:
        return UNKNOWN
    return Base(
        checkpoint.config().get("model_type"), {}, partial(_shapes_of, checkpoint), lambda layer: ()
    )


def _shapes_of(checkpoint: Checkpoint, layers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    keys = _match(checkpoint, {name: _possible_keys(join(name, "weight")) for name in layers})
    return {name: checkpoint.tensor(key).shape for name, key in keys.items()}


def base_weights_of_checkpoint(checkpoint: Checkpoint, contents: AdapterContents) -> BaseWeight:
    """Return a function from a layer's name to its base weight in a checkpoint.

    Its first call raises if the checkpoint is not the base of the adapter. If nothing needs a
    weight, nothing is compared, and the checkpoint may be quantised.
    """

    @cache
    def find_checked_keys() -> dict[str, str]:
        keys = find_keys(checkpoint, contents)
        refuse(checkpoint, find_misfits(checkpoint, contents, keys))
        return keys

    def weight_of(layer: str) -> Tensor:
        key = find_checked_keys()[layer]
        if not key.endswith((".weight", GATE_UP, DOWN)):  # such as attention's in_proj_weight
            raise ConversionError(
                f"{key} is not the weight of a module or a stack of experts, and LoRA adapts only "
                f"these; leave {layer} out of the adapter (`exclude`)"
            )
        return checkpoint.tensor(key)

    return weight_of


# --- names ---------------------------------------------------------------------------------------


def find_keys(checkpoint: Checkpoint, contents: AdapterContents) -> dict[str, str]:
    """Return the checkpoint's name of each weight that an adapter changes.

    The weights are given by the names of layers, and of parameters of `also_train`.
    """
    possible = {layer.name: _possible_keys_of_layer(layer) for layer in contents.layers}
    for name in contents.also_train:
        possible[name] = _possible_keys(name)
    return _match(checkpoint, possible)


def find_copies(checkpoint: Checkpoint, keys: Mapping[str, str], name: str) -> list[str]:
    """Return the further tensors that have the values of a weight, as those of a tied one do."""
    values = fingerprint(checkpoint.tensor(keys[name]))
    return [key for key in checkpoint.keys_by_values[values] if key not in keys.values()]


def _possible_keys_of_layer(layer: BlockSpec) -> tuple[str, ...]:
    """Return the names under which the weight of a layer may be stored, the likeliest first."""
    keys = [join(layer.name, "weight"), *_possible_keys(layer.name)]
    for tied in layer.tied:
        keys += _possible_keys(tied)
    owner, _, last = layer.name.rpartition(".")
    if last in PROJECTIONS:
        # nn.MultiheadAttention has q, k and v as rows of one packed weight, or as three weights.
        parameter = "in_proj_weight" if layer.outputs else f"{last}_weight"
        keys.append(join(owner, parameter))
    return tuple(keys)


def _possible_keys(name: str) -> tuple[str, ...]:
    """Return a name, and the other one that files of GraniteMoe have for it."""
    for in_model, in_file in STORED_NAMES.items():
        if name.endswith(f".{in_model}"):
            return name, name.removesuffix(in_model) + in_file
    return (name,)


class Renaming(NamedTuple):
    """How the names of a part of the model begin there, and how they begin in a checkpoint."""

    in_model: str  # such as "model.vision_tower."; empty for names that only get longer
    in_file: str  # such as "vision_tower."

    def apply(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Return the keys that begin as in the model, renamed as in the checkpoint."""
        ends = [key.removeprefix(self.in_model) for key in keys if key.startswith(self.in_model)]
        return tuple(self.in_file + end for end in ends)


UNCHANGED = Renaming("", "")


def _match(checkpoint: Checkpoint, possible: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return, for each name, the first of its possible keys that the checkpoint has.

    A part of the model, such as its text layers, may begin otherwise in the checkpoint. In LLaVA,
    for example, names begin in the model and in the file as:

        model.language_model.layers.0.    language_model.model.layers.0.
        model.vision_tower.               vision_tower.
        lm_head.                          language_model.lm_head.

    The parts are found one by one. The first name without a key shows how its part may be renamed
    (`_find_renamings`), and the renaming that finds the most names wins: for a name of layer 0 of
    the text, `model.language_model.` -> `language_model.model.`, which finds all text layers. No
    two parts share a tensor, and no part is stored in two places.
    """
    stored = checkpoint.files.keys() | checkpoint.stacks.keys()
    keys = _find_first_keys(possible, stored)
    while len(keys) < len(possible):
        free = stored.difference(keys.values())
        absent = [name for name in possible if name not in keys]
        parts = []
        for renaming in _find_renamings(possible[absent[0]], free, is_first=not keys):
            part = _find_first_keys(possible, free, renaming)
            if part.keys().isdisjoint(keys):  # else it would move what has its key already
                parts.append(part)
        largest = max(map(len, parts), default=0)
        best = [part for part in parts if len(part) == largest]
        if len(best) != 1:
            problem = "fits by several prefixes"
            if not best:
                names = [possible[name][0] for name in absent]
                problem = f"lacks {first_few(names, 5, ', ')}"
            raise AdapterFileError(
                f"{checkpoint.path} {problem}; it has {first_few(sorted(stored), 5, ', ')}. If "
                "a weight is tied, or has another name in the model, merge there (merge_adapters)"
            )
        keys |= best[0]
    return keys


def _find_first_keys(
    possible: Mapping[str, tuple[str, ...]],
    stored: Collection[str],
    renaming: Renaming = UNCHANGED,
) -> dict[str, str]:
    """Return, for each name, the first of its possible keys, renamed, that is stored."""
    first = {}
    for name, keys in possible.items():
        present = [key for key in renaming.apply(keys) if key in stored]
        if present:
            first[name] = present[0]
    return first


def _find_renamings(
    keys: Iterable[str], stored: Collection[str], *, is_first: bool
) -> set[Renaming]:
    """Return the renamings that lead from one of these keys to a stored one with the same end."""
    renamings = set()
    for key in keys:
        for stored_key in stored:
            start, stored_start = cut_common_end(key, stored_key)
            has_common_end = len(start) < len(key.split("."))
            if has_common_end and _is_plausible(start, stored_start, is_first):
                renamings.add(Renaming(_as_prefix(start), _as_prefix(stored_start)))
    return renamings


def _is_plausible(start: Sequence[str], stored_start: Sequence[str], is_first: bool) -> bool:
    """Whether names that begin so in the model can begin so in the checkpoint.

    One start must have all modules of the other, in any order; `model` may come and go. No module
    may have a number, which is that of a layer or a tower, so layers are never taken for each
    other. Only the first part to be found, which may be the whole model, can be a numbered module
    of a wrapper:

        in the model            in the checkpoint        plausible
        model.language_model    language_model.model     yes
        model.language_model    vision_tower.encoder     no: other modules
        layers.0                layers.1                 no: other modules
        0.auto_model            (nothing)                as the first part: a SentenceTransformer
    """
    modules = {"model", *start}
    stored_modules = {"model", *stored_start}
    fewer, more = sorted((modules, stored_modules), key=len)
    if not fewer <= more:
        return False
    without_number = fewer if is_first else more  # what only `more` has may be a wrapper's
    return not any(part.isdigit() for part in without_number)


def _as_prefix(parts: Sequence[str]) -> str:
    return "".join(f"{part}." for part in parts)


# --- whether they fit together -------------------------------------------------------------------


def find_misfits(
    checkpoint: Checkpoint,
    contents: AdapterContents,
    keys: Mapping[str, str],
    compares_values: bool = True,
) -> list[str]:
    """Return a line for each weight that is quantised, or has another shape or other values."""
    misfits = []
    replaced = {keys[name] for name in contents.also_train}
    for layer in contents.layers:
        key = keys[layer.name]
        weight = checkpoint.tensor(key)
        if weight.dtype not in TRAINABLE_DTYPES:
            reason: str | None = (
                f"is quantised or packed there ({weight.dtype}); give the original checkpoint"
            )
        else:
            reason = layer.reason_against_shape(tuple(weight.shape))
        if reason is None and compares_values and key not in replaced:
            reason = _reason_against_values(layer, weight)
        if reason is not None:
            misfits.append(f"{key}: {reason}")
    for name in contents.also_train:
        shape_in_adapter = tuple(contents.tensors[name].shape)
        shape = tuple(checkpoint.tensor(keys[name]).shape)
        if shape != shape_in_adapter:
            misfits.append(f"{name}: {shape_in_adapter}, the checkpoint has {shape}")
    return misfits


def _reason_against_values(layer: BlockSpec, weight: Tensor) -> str | None:
    if not layer.base:
        return None
    base = fingerprint(layer.layout.part(weight, layer.outputs))
    if base is None or same_base(layer.base, base):
        return None
    return "has other values than the weight that the adapter was saved from"


def summarize_misfits(misfits: Sequence[str]) -> list[str]:
    """Return one line for each reason: the first weight that has it, and how many more have it."""
    pairs = []
    for misfit in misfits:
        name, _, reason = misfit.partition(": ")
        pairs.append((name, reason))
    return group_by_reason(pairs)


def refuse(checkpoint: Checkpoint, misfits: Sequence[str]) -> None:
    """Raise if there are reasons why a checkpoint is not the base of an adapter."""
    if misfits:
        reasons = first_few(summarize_misfits(misfits), 20)
        raise AdapterFileError(
            f"{checkpoint.path} is not the base of this adapter:\n{reasons}\n"
            "Give the base that it was trained on, or merge with `force`"
        )
