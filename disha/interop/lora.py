"""LoRA: export a model's adapter as a folder in PEFT's layout, and load such a folder.

Most LoRA runtimes read this layout. Bone and tile become LoRA without loss: B holds the block's
own values, and lora_alpha the runtime scale. BAT is truncated to a rank. `export_tensors` gives the
same without a file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import multimode
from typing import Any, get_args

from torch import Tensor, nn

from disha.errors import ArgumentError
from disha.files import AdapterContents
from disha.files.disk import PathLike, check_path
from disha.files.saving import adapter_contents
from disha.interop.adapters import load_adapter as load
from disha.interop.experts import (
    SERVED_TARGETS,
    SINGLE_EXPERT,
    ExpertForm,
    convert_experts,
    list_misread_by_peft,
)
from disha.interop.low_rank import (
    CONV,
    BaseWeight,
    LoraReport,
    LowRankUpdate,
    base_weights_of_model,
    check_rank,
    is_stack,
    low_rank_updates,
)
from disha.interop.peft_format import (
    PREFIX,
    TOKENS,
    Converted,
    Surroundings,
    exact_pattern,
    exact_targets,
    refuse_to_write,
    surroundings_alone,
    surroundings_in_model,
    tensors_of,
    unknown_to_lora,
    whole_copy,
)
from disha.model.view import ModelView

__all__ = ["LoraReport", "export", "export_tensors", "load"]

CANT_EXPRESS = "PEFT's LoRA would not compute what this adapter does"


def export(
    model: nn.Module,
    folder: PathLike,
    adapter: str = "default",
    *,
    rank: int | None = None,
    pad: bool = False,
    experts: ExpertForm = "stacked",
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
        folder: the folder to write; created if it does not exist. If it has an
            `adapter.safetensors`, `load_adapter` reads that, and not the LoRA.
        adapter: the adapter's name.
        rank: largest rank of a layer. BAT needs it; if it is smaller than r, Bone is truncated too.
        pad: pad the ranks of all layers with zeros to one value: the smallest of 8, 16, 32, 64,
            128, 256, 320 and 512 that is large enough, or the largest of them if it is above 512.
            These are what vLLM allows for its `--max-lora-rank`. The update stays the same.
        experts: `"stacked"` writes each stack of experts as one LoRA, `"separate"` one for each
            projection of each expert.

    Returns:
        A `LoraReport`, with the rank and the error of every layer.

    Raises:
        ConversionError: LoRA can't express the adapter, or the names of separate experts are
            unknown for this type of model.
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
    with view.ranks.fail_together(_describe_action(adapter)):
        target = check_path(folder)  # before a rank writes
    converted = _convert_adapter(view, adapter, rank, pad, experts)
    with view.ranks.fail_together(_describe_action(adapter)):
        return converted.write(target, view.ranks.writes)


def export_tensors(
    model: nn.Module,
    adapter: str = "default",
    *,
    rank: int | None = None,
    pad: bool = False,
    experts: ExpertForm = "stacked",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter as LoRA, in memory: what `export` writes into its two files.

    This hands the weights over to a runtime during training, such as to the server that generates
    the rollouts of reinforcement learning. PEFT takes them by `set_peft_model_state_dict`, and
    SGLang by `load_lora_adapter_from_tensors`. vLLM reads the folder that `export` writes.
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
    converted = _convert_adapter(ModelView(model), adapter, rank, pad, experts)
    return converted.tensors, converted.config


def _describe_action(adapter: str) -> str:
    return f"export adapter {adapter!r} as LoRA"


def _convert_adapter(
    view: ModelView, adapter: str, rank: int | None, pad: bool, experts: ExpertForm
) -> Converted:
    """Return an adapter of a model as LoRA. Collective if the model is sharded."""
    contents = adapter_contents(view, adapter, with_fingerprints=False)
    with view.ranks.fail_together(_describe_action(adapter)):
        place = surroundings_in_model(view, contents, unknown_to_lora)
        _check(contents, place, rank, experts)  # before a process waits for another
    base = base_weights_of_model(view, adapter)
    return _convert(contents, place, base, rank, pad, experts)


def _check(
    contents: AdapterContents, place: Surroundings, rank: int | None, experts: ExpertForm
) -> None:
    """Raise if an argument is wrong, or if PEFT's LoRA can't express the adapter."""
    check_rank(rank)
    if experts not in get_args(ExpertForm):
        raise ArgumentError(f"experts must be 'stacked' or 'separate', got {experts!r}")
    misread = list_misread_by_peft(contents.layers, experts, place.model_type)
    refuse_to_write(CANT_EXPRESS, place.problems + misread)


def _convert(
    contents: AdapterContents,
    place: Surroundings,
    base: BaseWeight | None,
    rank: int | None,
    pad: bool,
    experts: ExpertForm,
) -> Converted:
    """Return an adapter as LoRA. Collective if the model is sharded."""
    others = place.copies()
    token_numbers = {}
    layers = []
    for layer in contents.layers:
        if layer.is_new_rows and layer.name in place.tables:
            others[layer.name + TOKENS] = whole_copy(contents.tensors[layer.key].mT)
            token_numbers[layer.name] = [
                number for ends in layer.outputs for number in range(*ends)
            ]
        else:
            layers.append(layer)
    updates = low_rank_updates(layers, contents.tensors, rank=rank, pad=pad, base=base)
    written = convert_experts(updates, experts, contents.also_train, place.model_type)
    config = _config_of(contents, written, place)
    config["trainable_token_indices"] = token_numbers or None
    tensors = tensors_of(written) | others
    return Converted(
        config,
        {PREFIX + key: tensor for key, tensor in tensors.items()},
        tuple(update.described() for update in updates),
        tuple(others),
    )


# --- without a model -----------------------------------------------------------------------------


def write_lora(
    folder: Path,
    contents: AdapterContents,
    *,
    rank: int | None = None,
    pad: bool = False,
    experts: ExpertForm = "stacked",
    model_type: str | None = None,
    base: BaseWeight | None = None,
) -> LoraReport:
    """Write an adapter as `export` does, without the model.

    The notes of the adapter that PEFT knows go into the configuration. Convolutions are refused,
    because the file does not tell whether PEFT's LoRA can adapt them.
    """
    unknown = [
        f"{layer.name} is a convolution of unknown groups and padding: export from the model"
        for layer in contents.layers
        if layer.layout.pattern == CONV
    ]
    place = surroundings_alone(contents, unknown, model_type)
    _check(contents, place, rank, experts)
    return _convert(contents, place, base, rank, pad, experts).write(folder)


# --- in PEFT's form ------------------------------------------------------------------------------


def _config_of(
    contents: AdapterContents, updates: Sequence[LowRankUpdate], place: Surroundings
) -> dict[str, Any]:
    """Return PEFT's configuration of a LoRA."""
    # The most frequent values are the default.
    sizes = {update.record.name: (update.rank, _alpha_of(update)) for update in updates}
    r, alpha = max(multimode(sizes.values()), default=(1, 1))  # only new rows, which have no rank

    # Of the layers that have other values.
    rank_pattern = {exact_pattern(name): rank for name, (rank, _) in sizes.items() if rank != r}
    alpha_pattern = {
        exact_pattern(name): alpha_here
        for name, (_, alpha_here) in sizes.items()
        if alpha_here != alpha
    }

    parameters = sorted(update.record.name for update in updates if is_stack(update.record))
    targets = _targets_of(contents, sizes.keys() - parameters, place.modules)
    transposes = any(update.record.layout.pattern == "in out" for update in updates)
    config = place.fields(targets) | {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": contents.config.dropout,
        "fan_in_fan_out": transposes,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    if not updates:  # PEFT refuses to adapt no module, except by this name
        config["target_modules"] = "dummy-target-modules"
    if parameters:
        config["target_parameters"] = parameters
        config["lora_dropout"] = 0.0  # PEFT has no dropout for parameters
    return config


def _targets_of(
    contents: AdapterContents, names: Collection[str], modules: Collection[str] | None
) -> list[str] | str:
    """Return `target_modules` for LoRAs of these names, of which some may be of single experts."""
    single = {name for name in names if SINGLE_EXPERT.fullmatch(name)}
    single.difference_update(contents.names)  # these are modules of the model, not parts of a stack
    others = set(names) - single
    if single:
        # SGLang refuses a regex, and knows single experts by the usual names of their projections.
        return sorted(others.union(SERVED_TARGETS))
    return exact_targets(others, modules)


def _alpha_of(update: LowRankUpdate) -> float:
    """Return lora_alpha = s * rank, or the rank for a scale of 0, whose B is written as zeros."""
    scale = update.record.scale
    if scale == 0:  # some runtimes read a lora_alpha of 0 as 1
        scale = 1.0
    alpha = scale * update.rank
    whole = round(alpha)
    if math.isclose(alpha, whole, rel_tol=1e-12):  # 1 / 49 * 49 is not 1
        return whole
    return alpha
