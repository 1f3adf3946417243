"""Read a LoRA, with a model or without."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from disha.checks import check_scale
from disha.config import check_row_numbers
from disha.errors import AdapterFileError, ConversionError, DishaError
from disha.files import AdapterContents
from disha.files.disk import PathLike
from disha.files.loading import load_contents
from disha.functional import Layout
from disha.functional.layouts import OutputRanges
from disha.functional.new_rows import NEW_ROWS
from disha.interop.experts import SINGLE_EXPERT, family_of, find_stack, matrices_of
from disha.interop.lora.writing import (
    EMBEDDING,
    FACTORS,
    MATRIX,
    TOKENS,
    model_type_of,
    names_of_weight,
)
from disha.interop.low_rank import (
    CONV,
    LayerBlock,
    LayerFactors,
    contents_of_factors,
    list_names,
)
from disha.interop.peft_format import (
    FROZEN,
    PeftFolder,
    compare_untrained,
    keep_for_model,
    read_peft_files,
)
from disha.layers.kinds import declared_slots
from disha.model.records import LayerRecord
from disha.model.state import LoadReport
from disha.model.view import ModelView
from disha.text import join

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

Layouts = dict[str, Layout]
"""The layouts of the weights of a model, by their names in adapter files."""

CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq")
"""If `init_lora_weights` begins with one of these, PEFT changes W, even when it only loads."""


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
    """Load a LoRA into a model, with the same results as in PEFT.

    It becomes an adapter of `method="lora"`, which trains on, and which `export` writes as it was.
    If every A is [I_r I_r ... I_r], as `export` writes it for Bone, it becomes Bone again, with its
    groups, without loss. Experts must be stacked. DoRA and trained biases are refused.
    Modules in `modules_to_save` bring their parameters, which train with the adapter from then on,
    and their buffers. Keys of `rank_pattern` and `alpha_pattern` may be regexes with one repeated
    character, such as `.*`, and a few choices, such as `(q|v)`.

    Args:
        model: the base model, or one that has other adapters.
        folder: the folder.
        adapter: the name that the adapter gets in this model.
        also_train: also set the parameters that the folder holds besides the blocks.
        replace: if the model has an adapter of that name, copy the folder's values into it.
        dtype: dtype of the blocks; B's by default.
        freeze: freeze all parameters that belong to no adapter.

    Returns:
        A `LoadReport` of the keys that were loaded.

    Raises:
        AdapterIOError: the folder can't be read.
        AdapterFileError: it does not hold a LoRA in PEFT's layout, or does not fit the model.
        ConversionError: it is more than a LoRA, such as DoRA.
        ArgumentError: the name is taken and `replace` is not set.
        ModeError: adapters are merged (`MergeError`), or in a context.

    The model is unchanged if this raises.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop import lora
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4, init="kaiming")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = lora.export(model, folder)
        ...     lora.load(nn.Sequential(nn.Linear(8, 16)), folder).matched
        ('0.bone_block',)
    """
    view = ModelView(model)
    action = f"load a LoRA as adapter {adapter!r}"
    with view.ranks.fail_together(action):
        peft_folder = read_peft_files(folder, (*FACTORS, TOKENS), also_train)
        new_rows, rest = _take_out_rows(view, peft_folder)
    untrained = compare_untrained(view, rest)
    with view.ranks.fail_together(action):
        rest = keep_for_model(view, rest, untrained)
        contents = _contents_of(rest, _layouts_of(view), model_type_of(view), new_rows)
    return load_contents(
        view, rest.path, contents, adapter, replace=replace, dtype=dtype, freeze=freeze
    )


def _take_out_rows(view: ModelView, folder: PeftFolder) -> tuple[list[LayerBlock], PeftFolder]:
    """Return the new rows of tables that a folder holds, as layers with blocks, and the rest."""
    values_by_name, rest = folder.split(TOKENS)
    settings = folder.fields.get(TOKEN_INDICES)
    new_rows = []
    for name, values in values_by_name.items():
        numbers = _token_numbers_of(name, settings)
        try:
            ranges = check_row_numbers(f"{TOKEN_INDICES} of {name}", numbers)
        except DishaError as error:
            raise AdapterFileError(f"{folder.path}: {error}") from error
        if values.shape[:-1] != (len(numbers),):
            raise AdapterFileError(
                f"{folder.path}: {name}{TOKENS} does not have a row for each token"
            )
        order = torch.tensor(numbers).argsort()  # a block has its rows in order
        block = values[order].mT  # (in, rows)
        new_rows.append((_record_of_rows(view, name, ranges, block), block))
    return new_rows, rest


def _record_of_rows(view: ModelView, name: str, ranges: OutputRanges, block: Tensor) -> LayerRecord:
    """Return the record of new rows, which all modules read that are tied to the table."""
    names = names_of_weight(view, name)
    inputs, out = block.shape
    return LayerRecord(
        name,
        method=NEW_ROWS,
        r=1,
        r_out=None,
        in_features=inputs,
        out_features=out,
        scale=1.0,
        base=None,
        layout=Layout("out in"),
        rows=ranges,
        tied=tuple(other for other in names if other != join(name, "weight")),
    )


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


def _layouts_of(view: ModelView) -> Layouts:
    return {
        join(name, slot.name): slot.layout
        for name, module in view.modules.items()
        for slot in declared_slots(module)
    }


def read_lora(
    folder: PathLike,
    *,
    model_type: str | None = None,
    also_train: bool = True,
) -> AdapterContents:
    """Return the adapter that a LoRA folder holds, as `load` reads it without a model."""
    peft_folder = read_peft_files(folder, (*FACTORS, TOKENS), also_train)
    if peft_folder.fields.get(TOKEN_INDICES):
        raise ConversionError(
            f"{peft_folder.path} has trained rows of a table ({TOKEN_INDICES}), and only the model "
            "tells what the table is tied to; use lora.load with the model"
        )
    return _contents_of(peft_folder, {}, model_type)


def _contents_of(
    folder: PeftFolder,
    layouts: Layouts,
    model_type: str | None,
    new_rows: Sequence[LayerBlock] = (),
) -> AdapterContents:
    """Return the adapter in a folder, with new rows that were taken out of it before."""
    _check_settings(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in folder.tensors.items():
        end = _end_of(key)
        if end is not None:
            pairs.setdefault(key.removesuffix(end), {})[end] = tensor
        elif folder.saves(key):
            others[key] = tensor
        elif not key.endswith(FROZEN):
            raise AdapterFileError(
                f"{folder.path}: tensor {key!r} is neither lora_A nor lora_B, nor in "
                "modules_to_save"
            )
    if pairs or not new_rows:
        _check_pairs(folder, pairs)
    factors = _factors_of(folder, pairs, layouts, model_type)
    dropout = folder.fields.get("lora_dropout", 0.0)
    contents = contents_of_factors(folder.path, factors, dropout, new_rows, others)
    return replace(contents, metadata=folder.notes())


def _end_of(key: str) -> str | None:
    """Return the end of the key of a factor, or None for another tensor."""
    for end in FACTORS:
        if key.endswith(end):
            return end
    return None


def _check_pairs(folder: PeftFolder, pairs: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise unless there are factors, and each layer has both."""
    complete = set(MATRIX), set(EMBEDDING)
    incomplete = [name for name, factors in pairs.items() if factors.keys() not in complete]
    if incomplete or not pairs:
        layers = list_names(incomplete) if incomplete else "any layer"
        raise AdapterFileError(
            f"{folder.path} has no pair of factors, lora_A and lora_B, for {layers}; save the LoRA "
            "again"
        )


def _factors_of(
    folder: PeftFolder,
    pairs: Mapping[str, Mapping[str, Tensor]],
    layouts: Layouts,
    model_type: str | None,
) -> Iterator[LayerFactors]:
    """Yield the factors of every layer of a folder, experts as stacks."""
    parameters = folder.fields.get("target_parameters") or ()
    for key, pair in pairs.items():
        is_embedding = EMBEDDING[0] in pair
        a_end, b_end = EMBEDDING if is_embedding else MATRIX
        a = pair[a_end]
        b = pair[b_end]
        if SINGLE_EXPERT.fullmatch(key) and key not in layouts:
            raise ConversionError(
                f"{folder.path} has a LoRA for each expert ({key}); load the one with stacked "
                "experts"
            )
        stack = find_stack(key, parameters)
        if stack is None:
            name = key
            rank = len(a) if a.dim() else 1
            layout = _layout_of(folder, name, a, is_embedding, layouts)
        else:
            name = stack
            rank = folder.of_layer(name, "r", "rank_pattern")
            a, b = matrices_of(name, a, b, rank)
            layout = _layout_of_stack(name, layouts, model_type)
        # A may be empty. Then any rank will do here, because such a layer is refused later.
        scale = scale_of(folder, name, max(rank, 1))
        yield LayerFactors(name, a, b, layout, scale)


def _layout_of_stack(name: str, layouts: Layouts, model_type: str | None) -> Layout:
    if name in layouts:
        return layouts[name]
    return family_of(model_type, "the layout of stacked experts").layout


def _layout_of(
    folder: PeftFolder, name: str, a: Tensor, is_embedding: bool, layouts: Layouts
) -> Layout:
    """Return the layout of a weight. A does not show it in every case, so the model may have to."""
    if is_embedding:
        # The padding row of an embedding gets no update, so it is the only zero column of A.
        empty = (a == 0).all(dim=0).nonzero().flatten().tolist()
        padding_idx = empty[0] if len(empty) == 1 else None
        return Layout("index out", padding_idx=padding_idx)
    if a.dim() > 2:
        return Layout(CONV)
    if not folder.fields.get("fan_in_fan_out"):
        return Layout("out in")
    if name not in layouts:
        raise ConversionError(
            f"{folder.path} has fan_in_fan_out, and only the model tells whether {name} is such a "
            "layer; use lora.load with the model"
        )
    return layouts[name]


def scale_of(folder: PeftFolder, name: str, rank: int) -> float:
    """Return the scale s of a layer: lora_alpha divided by the rank, or by its square root."""
    alpha = folder.of_layer(name, "lora_alpha", "alpha_pattern")
    try:
        check_scale(alpha)
    except DishaError as error:
        raise AdapterFileError(f"{folder.path}: lora_alpha: {error}") from error
    if folder.fields.get("use_rslora"):
        return alpha / math.sqrt(rank)
    return alpha / rank


def _check_settings(folder: PeftFolder) -> None:
    fields = folder.fields
    if fields.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"{folder.path} has the peft_type {fields.get('peft_type')!r}, not 'LORA'; use "
            "peft.load"
        )
    unsupported = [name for name in CHANGE_THE_SUM if fields.get(name)]
    init = str(fields.get("init_lora_weights"))
    if init.lower().startswith(CHANGE_THE_BASE):
        unsupported.append(f"init_lora_weights={init}")
    if fields.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise ConversionError(
            f"{folder.path} uses {', '.join(unsupported)}, which is more than a LoRA; use it with "
            "PEFT"
        )
