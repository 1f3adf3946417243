"""LoRA: export a model's adapter as a folder in PEFT's layout, and load such a folder.

Most LoRA runtimes read this layout. Bone and tile become LoRA without loss: B holds the block's
own values, and lora_alpha the runtime scale. BAT is truncated to a rank. `export_tensors` gives the
same without a file. `write_lora` and `read_lora` convert an adapter without its model. `write_gguf`
and `export_gguf` write a file for llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from disha.files import LayerRecord
from disha.files.atomic import PathLike, checked_path
from disha.files.contents import adapter_contents, load_contents
from disha.functional import Layout
from disha.interop.experts import (
    DOWN,
    SEPARATE_BEFORE,
    checked_form,
    misread,
    refuse_beside,
    taken_for_experts,
)
from disha.interop.gguf import export_gguf, write_gguf
from disha.interop.lora_folder import (
    CANT_EXPRESS,
    as_peft,
    expert_updates,
    read_lora,
    targets_of,
    write_lora,
)
from disha.interop.low_rank import (
    LoraReport,
    LowRankUpdate,
    base_weights,
    check_limits,
    is_stack,
    low_rank_updates,
)
from disha.interop.peft_files import PREFIX, write_peft_files
from disha.interop.peft_view import PeftView, refuse_to_write
from disha.layers import declared_slots, original_class
from disha.model import ModelView, join
from disha.state import LoadReport

__all__ = [
    "export",
    "export_gguf",
    "export_tensors",
    "load",
    "read_lora",
    "write_gguf",
    "write_lora",
]


def export(
    model: nn.Module,
    folder: PathLike,
    adapter: str = "default",
    rank: int | None = None,
    max_error: float | None = None,
    *,
    pad: bool = False,
    experts: str = "stacked",
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
        max_error: largest ||dW - B A|| / ||dW|| of a layer.
        pad: pad the ranks of all layers with zeros to one value: the smallest of 8, 16, 32, 64,
            128, 256, 320 and 512 that is large enough. These are what vLLM allows for its
            `--max-lora-rank`. The update stays the same.
        experts: `"stacked"` writes each stack of experts as one LoRA, `"separate"` one for each
            projection of each expert.

    Returns:
        A `LoraReport`, with the rank and the error of every layer.

    Raises:
        ConversionError: LoRA can't express the adapter, its error is above `max_error`, `pad` is
            set and a rank is above 512, or the names of separate experts are unknown for this
            type of model.
        ArgumentError: there is no such adapter, `rank`, `max_error` or `experts` is out of range,
            or BAT lacks `rank`.
        ArgumentTypeError: one of them is not a number.
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
    ranks, action = view.ranks(), f"export adapter {adapter!r} as LoRA"
    with ranks.agreeing(action):
        target = checked_path(folder)
    limits = {"rank": rank, "max_error": max_error, "pad": pad}
    updates, beside, files = _converted(view, adapter, experts, **limits)
    with ranks.agreeing(action):
        if ranks.writes:
            write_peft_files(target, *files)
    return LoraReport.of(target, updates, beside)


def export_tensors(
    model: nn.Module,
    adapter: str = "default",
    rank: int | None = None,
    max_error: float | None = None,
    *,
    pad: bool = False,
    experts: str = "stacked",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter as LoRA, in memory: what `export` writes into its two files.

    This hands the weights over to a runtime during training, such as to the server that generates
    the rollouts of reinforcement learning. PEFT takes them by `set_peft_model_state_dict`, requests
    of vLLM as `lora_tensors` and `peft_config`, and SGLang by `load_lora_adapter_from_tensors`.

    If the model is sharded, call this on all ranks; each gets all tensors.

    Args:
        model: a model with adapters.
        adapter: the adapter's name.
        rank: largest rank of a layer, as for `export`.
        max_error: largest relative error of a layer, as for `export`.
        pad: pad the ranks, as for `export`.
        experts: how to write stacks of experts, as for `export`.

    Returns:
        The tensors by PEFT's keys, on the CPU and not shared with the model: A (rank, in) as
        `base_model.model.<layer>.lora_A.weight` and B (out, rank) as `...lora_B.weight`; and the
        configuration, as in `adapter_config.json`.

    Raises:
        ConversionError: as for `export`.
        ArgumentError: there is no such adapter, or an argument does not fit, as for `export`.
        ArgumentTypeError: `rank` or `max_error` is not a number.
        AdapterStateError: the adapter holds values that are not finite.

    Source: Kang, arXiv 2409.15371; Hu et al., "LoRA", arXiv 2106.09685.

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
    limits = {"rank": rank, "max_error": max_error, "pad": pad}
    _, _, (config, tensors) = _converted(ModelView(model), adapter, experts, **limits)
    return {PREFIX + key: tensor for key, tensor in tensors.items()}, config


def _converted(
    view: ModelView, adapter: str, experts: str, **limits: Any
) -> tuple[tuple[LowRankUpdate, ...], dict[str, Tensor], tuple[dict[str, Any], dict[str, Tensor]]]:
    """Return an adapter's updates, what trained with it, and both in PEFT's form.

    Args:
        view: the model.
        adapter: the adapter's name.
        experts: as for `export`.
        limits: `rank`, `max_error` and `pad`, as for `export`.
    """
    ranks, action = view.ranks(), f"export adapter {adapter!r} as LoRA"
    with ranks.agreeing(action):
        check_limits(limits["rank"], limits["max_error"])
        form = checked_form(experts)
    header, tensors = adapter_contents(view, adapter)
    with ranks.agreeing(action):
        peft, names = PeftView(view), [layer.name for layer in header.layers]
        saved = peft.saved(header.also_train, names, biases=False)
        stacks = [layer for layer in header.layers if is_stack(layer)]
        modules = [name for name in names if name not in {stack.name for stack in stacks}]
        problems = peft.obstacles(modules, unknown_to_lora, exporting=True)
        if form == "separate" and stacks:
            refuse_beside(header.also_train)
        if form == "stacked":
            problems += _misread_stacks(view, stacks)
            problems += taken_for_experts(modules) if _joins_experts(view) else []
        refuse_to_write(CANT_EXPRESS, problems + list(saved.problems))
    weights = base_weights(view, adapter)
    updates = low_rank_updates(header, tensors, stacks=True, base=weights, **limits)
    beside = saved.copies()
    written = expert_updates(updates, form, _from_config(view.model, "model_type"))
    targets = targets_of(written, peft.modules, view.parameters_by_name)
    name = _from_config(view.model, "_name_or_path")
    return updates, beside, as_peft(header, written, targets, beside, saved.modules, name)


def _from_config(model: nn.Module, field: str) -> str | None:
    """Return a text in the configuration of a model of `transformers`, or None if it has none."""
    value = getattr(getattr(model, "config", None), field, None)
    return value if isinstance(value, str) and value else None


def _joins_experts(view: ModelView) -> bool:
    """Whether a model has experts that `transformers` joins to stacks as it loads them."""
    return any(
        slot.name == DOWN and slot.layout == SEPARATE_BEFORE
        for module in view.names
        for slot in declared_slots(module)
    )


def _misread_stacks(view: ModelView, stacks: Sequence[LayerRecord]) -> list[str]:
    """Return the stacks of experts that PEFT would read in another way, each with the reason."""
    found = []
    for stack in stacks:
        owner = view.modules[stack.name.rpartition(".")[0]]
        why = misread(owner, stack.name, stack.layout)
        found += [] if why is None else [f"{stack.name}: {why}"]
    return found


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
    known = isinstance(layer, nn.Linear) or _is_conv1d(layer)
    return None if known else f"PEFT's LoRA does not know a {original_class(layer).__name__}"


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether it is GPT-2's Conv1D, the only class with W as (in, out) that PEFT knows."""
    return any(
        (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
        for cls in type(layer).__mro__
    )


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
    no block and raise an error. Experts may be stacked or separate, as `export` writes them.
    Parameters in `modules_to_save` become parameters trained with the adapter. Buffers there must
    have the model's values. Keys of `alpha_pattern` must be names or endings of names, not regexes.

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
        ModeError: adapters are merged (`MergeError`), disabled or routed.

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
    with view.ranks().agreeing(f"load a LoRA as adapter {adapter!r}"):
        path, peft = checked_path(folder), PeftView(view)
        contents = read_lora(
            path,
            layouts=_layouts(view),
            model_type=_from_config(view.model, "model_type"),
            also_train=also_train,
            buffers=peft.buffers(),
        )
        header, tensors = peft.under_first_names(path, contents)
    return load_contents(
        view, path, header, tensors, adapter, replace=replace, dtype=dtype, freeze=freeze
    )


def _layouts(view: ModelView) -> dict[str, Layout]:
    """Return the layouts of the weights, by their names in adapter files."""
    return {
        join(name, slot.name): slot.layout
        for module, names in view.names.items()
        for slot in declared_slots(module)
        for name in names
    }
