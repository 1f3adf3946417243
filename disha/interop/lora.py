"""LoRA: a model's adapter as a folder in PEFT's layout, which most LoRA runtimes read, and back.

Bone and tile are LoRA without loss, block for block: their B holds the block's own numbers, and the
runtime scale is in lora_alpha. BAT is cut to a rank. `write_lora` and `read_lora` do this for an
adapter away from its model, as `disha.files.contents` has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from disha.files.atomic import PathLike, checked_path
from disha.files.contents import adapter_contents, load_contents
from disha.functional import Layout
from disha.interop.base_model import base_weights
from disha.interop.folder import write_folder
from disha.interop.gguf import export_gguf, write_gguf
from disha.interop.lora_folder import ModelFacts, converted, read_lora, write_lora
from disha.interop.low_rank import LoraReport, check_limits
from disha.interop.obstacles import check_peft_acts, class_of, refuse
from disha.interop.saved_modules import modules_to_save, saved_buffers, whole_tensors
from disha.layers import AdaptedWeight, declared_slots
from disha.model import ModelView
from disha.state import LoadReport

__all__ = ["export", "export_gguf", "load", "read_lora", "write_gguf", "write_lora"]


# --- out of a model ------------------------------------------------------------------------------


def export(
    model: nn.Module,
    folder: PathLike,
    adapter: str = "default",
    rank: int | None = None,
    max_error: float | None = None,
) -> LoraReport:
    """Write an adapter as LoRA: `adapter_config.json` and `adapter_model.safetensors`.

    dW = B A. Bone and tile come out exact, in the dtype of their blocks: A = [I_r I_r ... I_r],
    B = D^T, lora_alpha = s r. BAT is cut to its largest singular values. PEFT's `LoraModel` then
    computes what the adapter does here; where it would not, this raises. Parameters trained beside
    the adapter go into `modules_to_save`, with all of the modules that they belong to.

    Call it on all ranks if the model is sharded: the first one writes.

    Args:
        model: a model with adapters.
        folder: the folder to write; made if it is not there.
        adapter: the adapter's name.
        rank: largest rank of a layer: needed for BAT; smaller than r, it cuts Bone too.
        max_error: largest ||dW - B A|| / ||dW|| that a layer may have.

    Returns:
        A `LoraReport`, with the rank and the error of every layer.

    Raises:
        ConversionError: LoRA can't express the adapter, or not with an error below `max_error`.
        ArgumentError: there is no such adapter, `rank` or `max_error` is out of range, or BAT
            lacks `rank`.
        ArgumentTypeError: one of them is no number.
        AdapterStateError: the adapter holds values that are not finite.
        AdapterIOError: the folder can't be written.

    Nothing is written whenever this raises.

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
        check_limits(rank, max_error)
        target = checked_path(folder)
        check_peft_acts(view, adapter)
        _check_layers(view.require(adapter))
    header, tensors = adapter_contents(view, adapter)
    with ranks.agreeing(action):
        modules = modules_to_save(view, header)
    facts = _facts(view, adapter, modules)
    lora = converted(header, tensors, rank=rank, max_error=max_error, facts=facts)
    with ranks.agreeing(action):
        if ranks.writes:
            write_folder(target, lora.config, lora.tensors)
    return lora.report(target)


def _facts(view: ModelView, adapter: str, modules: Mapping[str, nn.Module]) -> ModelFacts:
    """Return what the model tells; collective if it is sharded."""
    path = getattr(getattr(view.model, "config", None), "_name_or_path", None)
    return ModelFacts(
        base=base_weights(view, adapter),
        name=path if isinstance(path, str) and path else None,
        modules=tuple(view.modules),
        kept=whole_tensors(modules),
    )


def _check_layers(weights: Sequence[tuple[str, AdaptedWeight]]) -> None:
    """Raise unless PEFT's LoRA knows every layer, and computes with it as it is used."""
    found = [f"{name}: {why}" for name, weight in weights for why in _lora_obstacles(weight.layer)]
    refuse(found, "PEFT's LoRA would not compute what this adapter does")


def _lora_obstacles(layer: nn.Module) -> Iterator[str]:
    kind = class_of(layer).__name__
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if layer.groups != 1:
            yield f"its convolution has groups={layer.groups}, and PEFT's LoRA can't merge these"
        if any(step != 1 for step in layer.dilation):
            yield "its convolution is dilated, and LoRA's in PEFT is not"
        if layer.padding_mode != "zeros":
            yield f"its convolution has padding_mode={layer.padding_mode!r}, and LoRA's pads zeros"
    elif isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            yield "its embedding has max_norm, which PEFT applies to LoRA's factor too"
    elif not isinstance(layer, nn.Linear) and not _is_conv1d(layer):
        yield f"PEFT's LoRA does not know a {kind}"


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether it is GPT-2's, the one class with W as (in, out) that PEFT knows."""
    return any(
        (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
        for cls in type(layer).__mro__
    )


# --- into a model --------------------------------------------------------------------------------


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
    """Load a LoRA that is a Bone adapter, as `export` writes them, into a model.

    Where every A is [I_r I_r ... I_r], the LoRA is Bone with D = B^T, without loss. Other LoRAs
    have no block, and raise. Parameters in `modules_to_save` become parameters trained beside the
    adapter; buffers there have to be the model's.

    Args:
        model: the base model, or one that has other adapters.
        folder: the folder.
        adapter: the name that the adapter gets in this model.
        also_train: also set the parameters that the folder holds beside the blocks.
        replace: copy into the adapter of that name, where there is one.
        dtype: dtype of the blocks; B's by default.
        freeze: freeze all parameters that belong to no adapter.

    Returns:
        A `LoadReport` of the keys that were loaded.

    Raises:
        AdapterIOError: the folder can't be read.
        AdapterFileError: it holds no LoRA in PEFT's layout, or one that does not fit the model.
        ConversionError: it is not a Bone adapter.
        ArgumentError: the name is taken and `replace` is not set.
        ModeError: adapters are merged (`MergeError`), disabled or routed.

    The model is unchanged whenever this raises.

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
        header, tensors = read_lora(
            folder, layouts=_layouts(view), also_train=also_train, buffers=saved_buffers(view)
        )
    return load_contents(
        view,
        checked_path(folder),
        header,
        tensors,
        adapter,
        replace=replace,
        dtype=dtype,
        freeze=freeze,
    )


def _layouts(view: ModelView) -> dict[str, Layout]:
    """Return the layouts of the modules' own weights, by the names of the modules."""
    return {
        name: slot.layout
        for module, aliases in view.names.items()
        for slot in declared_slots(module)
        if not slot.name
        for name in aliases
    }
