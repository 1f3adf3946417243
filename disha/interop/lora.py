"""LoRA: export a model's adapter as a folder in PEFT's layout, and load such a folder.

Most LoRA runtimes read this layout. Bone and tile become LoRA without loss: B holds the block's
own values, and lora_alpha the runtime scale. BAT is truncated to a rank. `export_tensors` gives the
same without a file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import multimode
from typing import Any

import torch
from torch import Tensor, nn

from disha.config import check_scale, checked_rows
from disha.errors import AdapterFileError, ConversionError, DishaError
from disha.files import AdapterContents
from disha.files.contents import adapter_contents, load_contents
from disha.files.disk import PathLike, checked_path
from disha.functional import METHODS, Layout
from disha.interop import experts as stacks
from disha.interop.low_rank import (
    CONV,
    BaseWeight,
    Factors,
    LayerBlock,
    LoraReport,
    LowRankUpdate,
    base_weights,
    check_rank,
    contents_of_factors,
    is_stack,
    listed,
    low_rank_updates,
)
from disha.interop.peft_format import (
    FROZEN,
    PREFIX,
    THE_MODEL_ITSELF,
    PeftFolder,
    anchored,
    exact_targets,
    keep_for_model,
    layers_inside,
    module_names,
    notes_of,
    read_peft_files,
    reasons_against,
    refuse_to_write,
    saved_modules,
    write_peft_files,
)
from disha.layers.blocks import original_class
from disha.layers.kinds import declared_slots, full_name
from disha.model.records import LayerRecord
from disha.model.state import LoadReport
from disha.model.view import ModelView
from disha.text import join

__all__ = ["LoraReport", "export", "export_tensors", "load"]

CANT_EXPRESS = "PEFT's LoRA would not compute what this adapter does"

MATRIX = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
TOKENS = ".token_adapter.trainable_tokens_delta"  # new values of rows, in spite of its name
FACTORS = (*MATRIX, *EMBEDDING)
"""The ends of the keys of factors."""

CHANGE_THE_SUM = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
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
"""Starts of the values of `init_lora_weights` that let PEFT change W, also when it loads a LoRA."""


# --- from a model --------------------------------------------------------------------------------


def export(
    model: nn.Module,
    folder: PathLike,
    adapter: str = "default",
    *,
    rank: int | None = None,
    pad: bool = False,
    experts: stacks.Form = "stacked",
) -> LoraReport:
    """Write an adapter as LoRA: `adapter_config.json` and `adapter_model.safetensors`.

    dW = B A. Bone and tile are exact, in the dtype of their blocks: A = [I_r I_r ... I_r],
    B = D^T, lora_alpha = s r. BAT is truncated to its largest singular values. PEFT's `LoraModel`
    then computes what the adapter computes here; if it would not, this raises. Parameters that were
    trained with the adapter go into `modules_to_save`, with everything else in their modules.

    Stacks of experts (`experts.gate_up_proj` and `experts.down_proj` of `transformers`) are exact
    too, and never truncated. PEFT reads them stacked, and has no dropout for them, so then
    `lora_dropout` is 0. vLLM reads them stacked for GPT-OSS, and separate for Mixtral, Qwen2-MoE,
    Qwen3-MoE, OLMoE and DeepSeek-V3. SGLang reads them separate.

    If the model is sharded, call this on all ranks; the first one writes.

    Args:
        model: a model with adapters.
        folder: the folder to write; created if it does not exist.
        adapter: the adapter's name.
        rank: largest rank of a layer. BAT needs it; if it is smaller than r, Bone is truncated too.
        pad: pad the ranks of all layers with zeros to one value: the smallest of 8, 16, 32, 64,
            128, 256, 320 and 512 that is large enough. These are what vLLM allows for its
            `--max-lora-rank`. The update stays the same.
        experts: `"stacked"` writes each stack of experts as one LoRA, `"separate"` one for each
            projection of each expert.

    Returns:
        A `LoraReport`, with the rank and the error of every layer.

    Raises:
        ConversionError: LoRA can't express the adapter, `pad` is set and a rank is above 512, or
            the names of separate experts are unknown for this type of model.
        ArgumentError: there is no such adapter, `rank` or `experts` is out of range, or BAT lacks
            `rank`.
        AdapterStateError: the adapter holds values that are not finite.
        AdapterIOError: the folder can't be written.

    Nothing is written if this raises.

    Source: Kang, arXiv 2409.15371; Hu et al., "LoRA", arXiv 2106.09685.

    Examples:
        >>> import tempfile, pathlib
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop import lora
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4, init="kaiming")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = lora.export(model, folder)
        ...     sorted(path.name for path in pathlib.Path(folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
        >>> report.layers
        (LoraLayer(name='0', method='bone', r=4, rank=4, error=0.0),)
    """
    view = ModelView(model)
    ranks = view.ranks
    action = f"export adapter {adapter!r} as LoRA"
    with ranks.agreeing(action):
        target = checked_path(folder)
    updates, beside, config, tensors = _converted(view, adapter, experts, rank, pad)
    with ranks.agreeing(action):
        if ranks.writes:
            write_peft_files(target, config, tensors)
    return LoraReport.of(target, updates, beside)


def export_tensors(
    model: nn.Module,
    adapter: str = "default",
    *,
    rank: int | None = None,
    pad: bool = False,
    experts: stacks.Form = "stacked",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter as LoRA, in memory: what `export` writes into its two files.

    This hands the weights over to a runtime during training, such as to the server that generates
    the rollouts of reinforcement learning. PEFT takes them by `set_peft_model_state_dict`, requests
    of vLLM as `lora_tensors` and `peft_config`, and SGLang by `load_lora_adapter_from_tensors`.
    The arguments and the errors are those of `export`. If the model is sharded, call this on all
    ranks; each gets all tensors.

    Returns:
        The tensors by PEFT's keys, on the CPU and not shared with the model: A (rank, in) as
        `base_model.model.<layer>.lora_A.weight` and B (out, rank) as `...lora_B.weight`; and the
        configuration, as in `adapter_config.json`.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop import lora
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4, init="kaiming")
        >>> tensors, config = lora.export_tensors(model)
        >>> for key, tensor in tensors.items():
        ...     print(key, tuple(tensor.shape))
        base_model.model.0.lora_A.weight (4, 8)
        base_model.model.0.lora_B.weight (16, 4)
        >>> config["r"], config["lora_alpha"]
        (4, 4)
    """
    _, _, config, tensors = _converted(ModelView(model), adapter, experts, rank, pad)
    return {PREFIX + key: tensor for key, tensor in tensors.items()}, config


def _converted(
    view: ModelView, adapter: str, experts: stacks.Form, rank: int | None, pad: bool
) -> tuple[list[LowRankUpdate], Collection[str], dict[str, Any], dict[str, Tensor]]:
    """Return an adapter's updates, what trained with it, and both in PEFT's form."""
    contents = adapter_contents(view, adapter, base=False)
    model_type = _model_type(view)
    with view.ranks.agreeing(f"export adapter {adapter!r} as LoRA"):
        check_rank(rank)  # before a rank waits for another
        modules = [layer.name for layer in contents.layers if not is_stack(layer)]
        saved = saved_modules(view, contents.also_train, contents.names)
        problems = reasons_against(view, modules, unknown_to_lora, exporting=True)
        problems += saved.problems
        problems += stacks.misread_by_peft(contents.layers, experts, model_type)
        refuse_to_write(CANT_EXPRESS, problems)
    base = base_weights(view, adapter)
    layers, rows, fields = _without_rows(contents, view)
    updates = low_rank_updates(layers, contents.tensors, rank=rank, pad=pad, base=base)
    beside = saved.copies() | rows
    written = stacks.in_form(updates, experts, contents.also_train, model_type)
    config = _config_of(contents, written, saved.modules, view) | fields
    return updates, beside, config, tensors_of(written) | beside


def _without_rows(
    contents: AdapterContents, view: ModelView | None = None
) -> tuple[list[LayerRecord], dict[str, Tensor], dict[str, Any]]:
    """Return the layers without the rows that PEFT's LoRA has for tokens; and these in its form."""
    rows = [
        record
        for record in contents.layers
        if METHODS[record.method].replaces
        and record.rows
        and record.scale == 1
        and (view is None or _reads_alike(view, record))
    ]
    others = [record for record in contents.layers if record not in rows]
    numbers = {record.name: [n for ends in record.rows for n in range(*ends)] for record in rows}
    values = {record.name + TOKENS: contents.tensors[record.key].mT.contiguous() for record in rows}
    return others, values, {"trainable_token_indices": numbers or None}


def _reads_alike(view: ModelView, layer: LayerRecord) -> bool:
    """Whether PEFT reads the new rows alike: in all that are tied, and without adding a bias."""
    names = _names_of_weight(view, layer.name)
    biases = {name.removesuffix("weight") + "bias" for name in names}
    return len(names) == 1 + len(layer.tied) and biases.isdisjoint(view.parameters_by_name)


def _names_of_weight(view: ModelView, layer: str) -> tuple[str, ...]:
    parameter = view.parameters_by_name.get(join(layer, "weight"))
    return () if parameter is None else parameter.names


def _model_type(view: ModelView) -> str | None:
    return getattr(getattr(view.model, "config", None), "model_type", None)


def unknown_to_lora(layer: nn.Module) -> str | None:
    """Return why PEFT's LoRA has no layer that does the same, or None if it has."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if layer.groups != 1:
            return f"its convolution has groups={layer.groups}, and PEFT's LoRA can't merge these"
        if any(step != 1 for step in layer.dilation):
            return "its convolution is dilated, and the one in PEFT's LoRA is not"
        if layer.padding_mode != "zeros":
            return f"it has padding_mode={layer.padding_mode!r}, and PEFT's LoRA pads with zeros"
        return None
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            return "its embedding has max_norm, which PEFT applies to LoRA's factor too"
        return None
    # GPT-2's Conv1D is the only class with W as (in, out) that PEFT knows.
    names = map(full_name, type(layer).__mro__)
    if isinstance(layer, nn.Linear) or "transformers.pytorch_utils.Conv1D" in names:
        return None
    return f"PEFT's LoRA does not know a {original_class(layer).__name__}"


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
    """Load a LoRA that is a Bone adapter, such as `export` writes, into a model.

    If every A is [I_r I_r ... I_r], the LoRA is Bone with D = B^T, without loss. Other LoRAs have
    no block and raise an error. Experts must be stacked.
    Parameters in `modules_to_save` become parameters trained with the adapter. Buffers there must
    have the model's values. Keys of `rank_pattern` and `alpha_pattern` may be regexes with at most
    three repeated characters or choices, such as `.*` and `(q|v)`.

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
        ConversionError: the LoRA is not a Bone adapter.
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
    with view.ranks.agreeing(f"load a LoRA as adapter {adapter!r}"):
        peft_folder = read_peft_files(folder, (*FACTORS, TOKENS), also_train)
        rows = _taken_rows(view, peft_folder)
        keep_for_model(view, peft_folder)
        contents = _contents_of(peft_folder, _layouts(view), _model_type(view), rows)
    return load_contents(
        view, peft_folder.path, contents, adapter, replace=replace, dtype=dtype, freeze=freeze
    )


def _taken_rows(view: ModelView, folder: PeftFolder) -> list[LayerBlock]:
    """Take the rows of tokens out of a folder, and return the layers with their blocks."""
    numbers = folder.fields.pop("trainable_token_indices", None)
    taken = []
    for key in [key for key in folder.tensors if key.endswith(TOKENS)]:
        name = key.removesuffix(TOKENS)
        values = folder.tensors.pop(key)
        ends = numbers if isinstance(numbers, dict) else {name: numbers}
        of_table = (listed for end, listed in ends.items() if f".{name}".endswith(f".{end}"))
        indices: Any = next(of_table, None)
        rows = checked_rows(name, indices)
        if values.shape[:-1] != (len(indices),):
            raise AdapterFileError(f"{folder.path}: {key} does not have a row for each token")
        names = _names_of_weight(view, name)
        tied = tuple(other for other in names if other != join(name, "weight"))
        block = values[torch.tensor(indices).argsort()].mT  # (in, rows), in order
        inputs, out = block.shape
        record = LayerRecord(
            name, "rows", 1, None, inputs, out, 1.0, None, Layout("out in"), rows, tied
        )
        taken.append((record, block))
    return taken


def _layouts(view: ModelView) -> Layouts:
    return {
        join(name, slot.name): slot.layout
        for name, module in view.modules.items()
        for slot in declared_slots(module)
    }


# --- writing -------------------------------------------------------------------------------------


def write_lora(
    folder: Path,
    contents: AdapterContents,
    *,
    rank: int | None = None,
    pad: bool = False,
    experts: stacks.Form = "stacked",
    model_type: str | None = None,
    base: BaseWeight | None = None,
) -> LoraReport:
    """Write an adapter of an unknown model as `export` does, except convolutions."""
    problems = [
        f"{layer.name} is a convolution of unknown groups and padding: export from the model"
        for layer in contents.layers
        if layer.layout.pattern == CONV
    ]
    if not all(contents.names):
        problems.append(f"(the model): {THE_MODEL_ITSELF}")
    problems += [
        f"{name}: it belongs to the model itself, not to a module in it"
        for name in contents.also_train
        if "." not in name
    ]
    saved = {name.rpartition(".")[0] for name in contents.also_train}
    problems += layers_inside(contents.names, saved)
    problems += stacks.misread_by_peft(contents.layers, experts, model_type)
    refuse_to_write(CANT_EXPRESS, problems)
    layers, rows, fields = _without_rows(contents)
    updates = low_rank_updates(layers, contents.tensors, rank=rank, pad=pad, base=base)
    written = stacks.in_form(updates, experts, contents.also_train, model_type)
    beside = {name: contents.tensors[name] for name in contents.also_train}
    config = _config_of(contents, written, saved) | fields
    write_peft_files(folder, config, tensors_of(written) | beside | rows)
    return LoraReport.of(folder, updates, beside)


def _config_of(
    contents: AdapterContents,
    updates: Sequence[LowRankUpdate],
    saved: Iterable[str],
    view: ModelView | None = None,
) -> dict[str, Any]:
    """Return PEFT's configuration of a LoRA; of an unknown model if there is no view of it."""
    names = [update.record.name for update in updates]
    parameters = sorted(update.record.name for update in updates if is_stack(update.record))
    # The experts that are written one by one, which are no layers of the model.
    single = set(filter(stacks.SINGLE_EXPERT.fullmatch, names)).difference(contents.names)
    others = set(names).difference(single, parameters)
    # SGLang refuses a regex, and knows single experts by the usual names of their projections.
    targets: list[str] | str = sorted(others.union(stacks.SERVED_TARGETS))
    if not single:
        targets = exact_targets(others, None if view is None else module_names(view))
    # The values of most layers are the default; the patterns list the other layers.
    sizes = {update.record.name: (update.rank, _alpha_of(update)) for update in updates}
    usual_r, usual_alpha = max(multimode(sizes.values()))
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        **notes_of(None if view is None else view.model),
        "r": usual_r,
        "lora_alpha": usual_alpha,
        "rank_pattern": {
            anchored(name): rank for name, (rank, _) in sizes.items() if rank != usual_r
        },
        "alpha_pattern": {
            anchored(name): alpha for name, (_, alpha) in sizes.items() if alpha != usual_alpha
        },
        "target_modules": targets,
        "modules_to_save": sorted(saved) or None,
        **({"target_parameters": parameters} if parameters else {}),
        # PEFT has no dropout for parameters.
        "lora_dropout": 0.0 if parameters else contents.config.dropout,
        "fan_in_fan_out": any(update.record.layout.pattern == "in out" for update in updates),
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _alpha_of(update: LowRankUpdate) -> float:
    """Return lora_alpha = s * rank; a scale of 0 makes B zero, as some runtimes read 0 as 1."""
    alpha = (update.record.scale or 1.0) * update.rank
    return int(alpha) if alpha == int(alpha) else alpha


def tensors_of(updates: Sequence[LowRankUpdate]) -> dict[str, Tensor]:
    """Return the factors of all layers by their keys in a folder, without PEFT's prefix."""
    stack_names = {update.record.name for update in updates if is_stack(update.record)}
    found = {}
    for update in updates:
        name = update.record.name
        a = update.a
        b = update.b
        if name in stack_names:
            name = stacks.factors_name(name, stack_names)
            a, b = stacks.stack_factors(update)
        if not update.record.scale:
            b = torch.zeros_like(b)
        a_end, b_end = EMBEDDING if update.record.layout.pattern == "index out" else MATRIX
        b = b.reshape(*b.shape, *(1 for _ in a.shape[2:]))
        found[name + a_end] = a.contiguous()
        # A copy: for r = 1, B is the block itself.
        found[name + b_end] = b.clone(memory_format=torch.contiguous_format)
    return found


# --- reading -------------------------------------------------------------------------------------


def read_lora(
    folder: PathLike,
    *,
    model_type: str | None = None,
    also_train: bool = True,
) -> AdapterContents:
    """Return the adapter that a LoRA folder holds, as `load` reads it without a model."""
    return _contents_of(read_peft_files(folder, (*FACTORS, TOKENS), also_train), {}, model_type)


def _contents_of(
    folder: PeftFolder,
    layouts: Layouts,
    model_type: str | None,
    rows: Sequence[LayerBlock] = (),
) -> AdapterContents:
    """Return the adapter in a folder, as `read_lora` does."""
    _check_settings(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    beside = {}
    for key, tensor in folder.tensors.items():
        end = next((end for end in FACTORS if key.endswith(end)), None)
        if end is not None:
            pairs.setdefault(key.removesuffix(end), {})[end] = tensor
        elif folder.saves(key):
            beside[key] = tensor
        elif not key.endswith(FROZEN):
            raise AdapterFileError(
                f"{folder.path}: tensor {key!r} is neither lora_A nor lora_B, nor in "
                "modules_to_save"
            )
    incomplete = [
        name for name, ends in pairs.items() if tuple(sorted(ends)) not in (MATRIX, EMBEDDING)
    ]
    if incomplete or not pairs:
        raise AdapterFileError(
            f"{folder.path} has no pair of factors, lora_A and lora_B, for "
            f"{listed(incomplete) or 'any layer'}; save the LoRA again"
        )
    factors = _factors(folder, pairs, layouts, model_type)
    dropout = folder.fields.get("lora_dropout", 0.0)
    return contents_of_factors(folder.path, factors, dropout, rows, beside)


def _factors(
    folder: PeftFolder,
    pairs: Mapping[str, dict[str, Tensor]],
    layouts: Layouts,
    model_type: str | None,
) -> Iterator[Factors]:
    """Yield the factors of every layer of a folder, experts as stacks."""
    parameters = folder.fields.get("target_parameters") or ()
    for name, ends in pairs.items():
        a, b = (ends[end] for end in sorted(ends))
        stack = stacks.stacked(name, parameters)
        if stacks.SINGLE_EXPERT.fullmatch(name) and name not in layouts:
            raise ConversionError(
                f"{folder.path} has a LoRA for each expert ({name}); load the one with stacked "
                "experts"
            )
        if stack is None:
            rank = len(a) if a.dim() else 1
            layout = _layout(folder, name, a, EMBEDDING[0] in ends, layouts)
        else:
            rank = folder.of_layer(stack, "r", "rank_pattern")
            name = stack
            a, b = stacks.matrices_of(stack, a, b, rank)
            layout = (
                layouts.get(name)
                or stacks.family_of(model_type, "the layout of stacked experts").layout
            )
        yield name, a, b, layout, _scale_of(folder, name, max(rank, 1))


def _layout(
    folder: PeftFolder, name: str, a: Tensor, is_embedding: bool, layouts: Layouts
) -> Layout:
    """Return the layout of a weight, of which A shows only a part."""
    if is_embedding:
        # The padding row of an embedding gets no update, so it is the only zero column of A.
        empty = (a == 0).all(dim=0).nonzero().flatten().tolist()
        return Layout("index out", padding_idx=empty[0] if len(empty) == 1 else None)
    if a.dim() > 2:
        return Layout(CONV)
    if not folder.fields.get("fan_in_fan_out"):
        return Layout("out in")
    if name not in layouts:
        raise ConversionError(
            f"{folder.path} has fan_in_fan_out, and whether {name} is such a layer is unknown "
            "here; use lora.load with the model"
        )
    return layouts[name]


def _scale_of(folder: PeftFolder, name: str, rank: int) -> float:
    """Return the scale s of a layer, by its lora_alpha."""
    alpha = folder.of_layer(name, "lora_alpha", "alpha_pattern")
    try:
        check_scale(alpha)
    except DishaError as error:
        raise AdapterFileError(f"{folder.path}: lora_alpha: {error}") from error
    return alpha / (math.sqrt(rank) if folder.fields.get("use_rslora") else rank)


def _check_settings(folder: PeftFolder) -> None:
    fields = folder.fields
    if fields.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"{folder.path} has the peft_type {fields.get('peft_type')!r}, not 'LORA'; use "
            "peft.load"
        )
    more = [name for name in CHANGE_THE_SUM if fields.get(name)]
    init = str(fields.get("init_lora_weights"))
    if init.lower().startswith(CHANGE_THE_BASE):
        more.append(f"init_lora_weights={init}")
    if fields.get("bias", "none") != "none":
        more.append("bias")
    if more:
        raise ConversionError(
            f"{folder.path} uses {', '.join(more)}, which Bone can't express; use it with PEFT"
        )
