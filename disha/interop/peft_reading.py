"""Read an adapter from a folder of PEFT: a LoRA, MiSS (PEFT's present name for Bone), or Bone.

A folder does not tell all: not how a weight is laid out, how large it is, or what it is tied to.
The model tells it, or a checkpoint of the base; without both, some folders can't be read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace as replace_fields
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import EinopsError
from torch import Tensor

from disha.checks import check_scale
from disha.config import AdapterConfig, check_row_numbers
from disha.errors import AdapterFileError, AdapterIOError, ConversionError, DishaError
from disha.files import AdapterContents
from disha.files.contents import LayerBlock, contents_of_blocks
from disha.files.disk import PathLike
from disha.files.header import reasons_against_blocks
from disha.functional import Layout
from disha.functional.new_rows import NEW_ROWS
from disha.interop.experts import family_of, find_stack, matrices_of
from disha.interop.low_rank import CONV, LayerFactors, contents_of_factors, list_names
from disha.interop.peft_format import (
    BAT,
    BONE_BLOCK,
    FROZEN,
    LINEAR,
    MISS_BLOCK,
    TILE,
    TOKENS,
    Pair,
    PeftFolder,
    keep_for_model,
    model_type_of,
    names_of_weight,
    read_peft_files,
)
from disha.layers.kinds import declared_weights, shape_of
from disha.layers.spec import BlockSpec
from disha.model.state import Tensors
from disha.model.view import ModelView
from disha.text import brief, first_few, join

TOKEN_INDICES = "trainable_token_indices"
"""PEFT's setting that says which rows of a table were trained."""

CHANGE_THE_SUM = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "arrow_config",
    "alora_invocation_tokens",
    "monteclora_config",
    "kasa_config",
    "use_bdlora",
    "use_qalora",
)
"""PEFT's settings that make a layer compute something other than W x + s B A x."""

CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq")
"""If `init_lora_weights` begins with one of these, PEFT changes W, even when it only loads."""

READ_INIT_WEIGHTS = {True: "bone", False: "bone", BAT: BAT, TILE: "bone"}
"""What MiSS has in `init_weights` -> the method. False: it started with random values."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of weights, by the names of their layers."""


class Base(NamedTuple):
    """What is known of the base of an adapter."""

    model_type: str | None
    layouts: Mapping[str, Layout]  # of weights, by the names of their layers
    shapes_of: Callable[[Sequence[str]], Shapes]  # of the weights of layers that the base has
    names_of: Callable[[str], Sequence[str]]  # all names of the weight of a layer


def base_of_model(view: ModelView) -> Base:
    """Return what a model tells as the base of an adapter."""
    layouts = {}
    shapes = {}
    for name, module in view.modules.items():
        for weight in declared_weights(module):
            layer = join(name, weight.name)
            layouts[layer] = weight.layout
            shapes[layer] = shape_of(module, weight)
    return Base(model_type_of(view), layouts, lambda layers: shapes, partial(names_of_weight, view))


def _refuse_to_guess(layers: Sequence[str]) -> Shapes:
    raise ConversionError(
        f"only the base tells the sizes of {list_names(layers)}; give it (`base`, --base)"
    )


UNKNOWN = Base(None, {}, _refuse_to_guess, lambda layer: ())
"""What is known without a base."""


def read_for_model(view: ModelView, folder: PathLike, *, also_train: bool) -> AdapterContents:
    """Return the adapter that a folder holds, with what a load into this model sets."""
    action = "read a folder of PEFT"
    with explain_settings(folder):
        with view.ranks.fail_together(action):
            peft_folder = read_peft_files(folder, also_train)
        kept = keep_for_model(view, peft_folder)
        with view.ranks.fail_together(action):
            return _contents_of(kept, base_of_model(view))


def read_folder(folder: PathLike, base: Base = UNKNOWN) -> AdapterContents:
    """Return the adapter that a folder holds, without a model."""
    with explain_settings(folder):
        return _contents_of(read_peft_files(folder), base)


READING_ERRORS = (
    *(DishaError, EinopsError, re.error),
    *(TypeError, ValueError, AttributeError, ArithmeticError, LookupError),
    RuntimeError,  # of torch, for shapes of tensors that do not belong together
)
"""What settings and tensors raise that PEFT does not write."""


@contextmanager
def explain_settings(folder: PathLike) -> Iterator[None]:
    """Raise `AdapterFileError` if the body meets settings that PEFT does not write."""
    try:
        yield
    except (AdapterFileError, AdapterIOError):
        raise
    except ConversionError as error:
        if str(folder) in str(error):
            raise
        raise ConversionError(f"{folder}: {error}") from error
    except READING_ERRORS as error:
        raise AdapterFileError(
            f"{folder} has settings that can't be read: {error}; get it again"
        ) from error


def _contents_of(folder: PeftFolder, base: Base) -> AdapterContents:
    fields = folder.fields
    method = fields.get("peft_type")
    if method not in READERS:
        raise ConversionError(
            f"{folder.path} is of peft_type {brief(method)}, not {', '.join(READERS)}; merge it in "
            "PEFT"
        )
    unsupported = [name for name in CHANGE_THE_SUM if fields.get(name)]
    init = str(fields.get("init_lora_weights"))
    if init.lower().startswith(CHANGE_THE_BASE):
        unsupported.append(f"init_lora_weights={init}")
    if fields.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise ConversionError(
            f"{folder.path} uses {', '.join(unsupported)}, which has no place here; use it in "
            "PEFT, or merge it there"
        )
    contents = READERS[method](folder, base)
    if not contents.layers:
        raise AdapterFileError(f"{folder.path} has no tensors of a layer; save it again")
    return replace_fields(contents, metadata=folder.notes())


def _saved_tensors(rest: PeftFolder) -> Tensors:
    """Return the tensors of saved modules, which must be all that is left of a folder."""
    saved = {}
    for key, tensor in rest.tensors.items():
        if rest.saves(key):
            saved[key] = tensor
        elif not key.endswith(FROZEN):
            raise AdapterFileError(
                f"{rest.path}: tensor {key!r} belongs to no layer, and to no module in "
                "modules_to_save"
            )
    return saved


# --- MiSS and Bone -------------------------------------------------------------------------------


def _read_miss(folder: PeftFolder, base: Base) -> AdapterContents:
    """Return the adapter in a folder of MiSS or Bone."""
    is_legacy = folder.fields["peft_type"] == "BONE"
    end = BONE_BLOCK if is_legacy else MISS_BLOCK
    blocks, rest = folder.split(end)
    config = _miss_config(folder, is_legacy)
    shapes = base.shapes_of(list(blocks))
    absent = [
        name
        for name in blocks
        if len(shapes.get(name, ())) != 2 or base.layouts.get(name, LINEAR) != LINEAR
    ]
    if absent:
        raise AdapterFileError(
            f"{folder.path} adapts {list_names(absent)}, and the base has no such linear layer; "
            "give the base that it was trained on"
        )
    layer_blocks = []
    for name, block in blocks.items():
        out, inputs = shapes[name]
        layer = BlockSpec(
            name,
            method=config.method,
            r=config.r,
            r_out=config.r_out,
            shape=(out, inputs),
            layout=LINEAR,
        )
        layer_blocks.append((layer, block))
    contents = contents_of_blocks(config, layer_blocks, _saved_tensors(rest))
    reasons = reasons_against_blocks(contents)
    if reasons:
        raise AdapterFileError(
            f"{folder.path} does not fit the base, or its own settings:\n{first_few(reasons, 20)}"
        )
    return contents


def _miss_config(folder: PeftFolder, is_legacy: bool) -> AdapterConfig:
    """Return the settings of a folder as an adapter's configuration."""
    fields = folder.fields
    init = fields.get("init_weights", True)
    method = READ_INIT_WEIGHTS.get(init, init)  # `AdapterConfig` refuses an unknown one
    dropout = 0.0
    # In PEFT, Bone and BAT have no dropout, whatever the field says.
    if not is_legacy and method != BAT:
        dropout = fields.get("miss_dropout", 0.0)
    r_out = None
    if init == TILE:
        r_out = fields.get("mini_r", 1)
    return AdapterConfig(
        fields.get("r", 64), target=None, method=method, r_out=r_out, dropout=dropout
    )


# --- LoRA ----------------------------------------------------------------------------------------


def _read_lora(folder: PeftFolder, base: Base) -> AdapterContents:
    """Return the adapter in a folder of a LoRA."""
    values, rest = folder.split(TOKENS)
    new_rows = [_new_rows_of(folder, name, values[name], base) for name in values]
    pairs, rest = rest.split_pairs()
    factors_of_layers = _factors_of(folder, pairs, base)
    dropout = folder.fields.get("lora_dropout", 0.0)
    return contents_of_factors(
        folder.path, factors_of_layers, dropout, new_rows, _saved_tensors(rest)
    )


def _new_rows_of(folder: PeftFolder, name: str, values: Tensor, base: Base) -> LayerBlock:
    """Return the new rows of a table, which all modules read that are tied to it."""
    numbers = _token_numbers_of(name, folder.fields.get(TOKEN_INDICES))
    ranges = check_row_numbers(f"{TOKEN_INDICES} of {name}", numbers)
    order = torch.tensor(numbers).argsort()  # a block has its rows in order
    block = values[order].mT  # (in, rows)
    inputs = block.shape[0]
    record = BlockSpec(
        name,
        method=NEW_ROWS,
        r=1,
        shape=(ranges[-1][1], inputs),
        layout=LINEAR,
        outputs=ranges,
        tied=tuple(other for other in base.names_of(name) if other != join(name, "weight")),
    )
    return record, block


def _token_numbers_of(name: str, settings: Any) -> Any:
    """Return the numbers of a table's rows from PEFT's setting.

    The setting is one list for all tables, or a dict from ends of their names to lists.
    """
    if not isinstance(settings, dict):
        return settings
    for end, numbers in settings.items():
        if f".{name}".endswith(f".{end}"):
            return numbers
    return None


def _factors_of(
    folder: PeftFolder, pairs: Mapping[str, Pair], base: Base
) -> Iterator[LayerFactors]:
    """Yield the factors of every layer of a folder, experts as stacks."""
    parameters = folder.fields.get("target_parameters") or ()
    stacks = {key: find_stack(key, parameters) for key in pairs}
    has_transposed = bool(folder.fields.get("fan_in_fan_out"))
    shapes: Shapes = {}
    if has_transposed:
        shapes = base.shapes_of([key for key, stack in stacks.items() if stack is None])
    for key, (a, b, is_embedding) in pairs.items():
        name = stacks[key] or key
        layout = base.layouts.get(name)
        if stacks[key] is None:
            rank = len(a)
            # Only where some are transposed, the model is asked which ones are.
            if layout is None or not has_transposed:
                layout = _layout_of(a, is_embedding, shapes.get(name))
        else:
            rank = folder.of_layer(name, "r", "rank_pattern")
            a, b = matrices_of(a, b, rank)
            layout = layout or family_of(base.model_type, "the layout of stacked experts").layout
        yield LayerFactors(name, a, b, layout, scale_of(folder, name, rank))


def _layout_of(a: Tensor, is_embedding: bool, shape: Sequence[int] | None) -> Layout:
    """Return the layout of a weight, whose shape is given if it may be a transposed matrix."""
    if is_embedding:
        # The padding row of an embedding gets no update, so it is the only zero column of A.
        empty = (a == 0).all(dim=0).nonzero().flatten().tolist()
        padding_idx = empty[0] if len(empty) == 1 else None
        return Layout("index out", padding_idx=padding_idx)
    if a.dim() > 2:
        return Layout(CONV)
    # A square one is taken for transposed, as all are in the models that have such weights.
    if shape is not None and shape[0] == a.shape[-1]:
        return Layout("in out")
    return LINEAR


def scale_of(folder: PeftFolder, name: str, rank: int) -> float:
    """Return the scale s of a layer: lora_alpha divided by the rank, or by its square root."""
    alpha = folder.of_layer(name, "lora_alpha", "alpha_pattern")
    check_scale(alpha, "lora_alpha")
    if folder.fields.get("use_rslora"):
        return alpha / math.sqrt(rank)
    return alpha / rank


READERS = {"LORA": _read_lora, "MISS": _read_miss, "BONE": _read_miss}
"""PEFT's name of a method -> what reads its folders."""
