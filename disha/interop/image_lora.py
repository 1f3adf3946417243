"""LoRA files of image models, for `diffusers`, kohya's programs, and ComfyUI.

One file holds the adapters of a UNet or a transformer, and of text encoders. Bone and tile are
exact, convolutions included: A has the kernel, and B is 1x1 (a LoCon). `image_names` has the keys,
and `image_writing` and `image_reading` convert adapters without models.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import nn

from disha.errors import ArgumentError, ArgumentTypeError, ConversionError
from disha.files.atomic import PathLike, checked_path
from disha.files.contents import adapter_contents, load_contents
from disha.inject import remove_adapters
from disha.interop.image_names import CLASSES, COMPONENTS, check_component, check_form
from disha.interop.image_reading import form_of, read_components, read_file
from disha.interop.image_writing import updates_of, write_file, write_updates
from disha.interop.lora import unknown_to_lora
from disha.interop.low_rank import LoraReport, base_weights
from disha.interop.peft_view import PeftView, refuse_to_write
from disha.layers import original_class
from disha.model import ModelView
from disha.state import LoadReport

__all__ = ["export", "form_of", "load", "read_file", "write_file"]

Models = nn.Module | Mapping[str, object]
"""A model, or component -> model, such as the `components` of a pipeline."""


def export(
    models: Models,
    path: PathLike,
    form: str = "diffusers",
    adapter: str = "default",
    rank: int | None = None,
    max_error: float | None = None,
) -> LoraReport:
    """Write the adapters of image models as one LoRA file.

    dW = B A. Bone and tile are exact, in the dtype of their blocks. The scale s is kept as alpha =
    s rank; for `diffusers`, it is multiplied into B. A convolution has rank r times the positions
    of its kernel. BAT is truncated to its largest singular values.

    Args:
        models: a UNet, a transformer or a CLIP text encoder; or component -> model, such as
            `pipe.components`. Components without this adapter are left out.
        path: the file to write.
        form: `"diffusers"`, `"kohya"` or `"comfyui"`.
        adapter: the adapter's name, the same in all models.
        rank: largest rank of a layer. BAT needs it; if it is smaller than r, Bone is truncated too.
        max_error: largest ||dW - B A|| / ||dW|| of a layer.

    Returns:
        A `LoraReport`, with the rank and the error of every layer.

    Raises:
        ConversionError: a reader of this form does not know the model or a layer, or would compute
            something else (a grouped or dilated convolution, an embedding); parameters were trained
            with the blocks; or the error of a layer is above `max_error`.
        ArgumentError: no model has the adapter, a component or the form is unknown, a limit is out
            of range, or BAT lacks `rank`.
        ArgumentTypeError: an argument is of the wrong type.
        AdapterStateError: the adapter holds values that are not finite.
        AdapterIOError: the file can't be written.

    Nothing is written if this raises.

    Source: Kang, arXiv 2409.15371; Hu et al., "LoRA", arXiv 2106.09685; for convolutions, Yeh et
    al., "LyCORIS", arXiv 2309.14859.

    Examples:
        >>> import tempfile, pathlib
        >>> from torch import nn
        >>> import disha
        >>> from disha.interop import image_lora
        >>> unet = nn.ModuleDict({"conv_in": nn.Conv2d(4, 8, 3)})
        >>> unet = disha.inject_adapters(unet, "conv_in", r=2, init="kaiming")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     image_lora.export({"unet": unet}, pathlib.Path(folder, "lora.safetensors")).layers
        (LoraLayer(name='unet.conv_in', method='bone', r=2, rank=18, error=0.0),)
    """
    given = _components(models)
    views = {component: ModelView(model) for component, model in given.items()}
    having = {name: view for name, view in views.items() if adapter in view.adapters}
    if not having:
        next(iter(views.values())).require(adapter)  # raises
    ranks, action = next(iter(having.values())).ranks(), f"export adapter {adapter!r} as {form}"
    with ranks.agreeing(action):
        check_form(form)
        for component in having:
            check_component(component)
        target = checked_path(path)
    contents = {name: adapter_contents(view, adapter) for name, view in having.items()}
    with ranks.agreeing(action):
        refuse_to_write(
            "a LoRA would not compute what this adapter does",
            [
                f"{name}.{problem}"
                for name, view in having.items()
                for problem in PeftView(view).obstacles(
                    [layer.name for layer in contents[name][0].layers],
                    unknown_to_lora,
                    exporting=True,
                )
            ],
        )
        for name, view in having.items():
            _check_class(form, name, view.modules.get("", given[name]))
    bases = {name: base_weights(view, adapter) for name, view in having.items()}
    updates = updates_of(contents, bases, rank, max_error)
    with ranks.agreeing(action):
        return write_updates(target, contents, updates, form, views, writes=ranks.writes)


def load(
    models: Models,
    path: PathLike,
    adapter: str = "default",
    *,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> LoadReport:
    """Load a LoRA file whose LoRAs are Bone adapters, such as `export` writes, into models.

    If every A is [I_r I_r ... I_r], the LoRA is Bone with D = B^T, without loss. Other LoRAs have
    no block and raise an error.

    Args:
        models: a UNet, a transformer or a CLIP text encoder; or component -> model, such as
            `pipe.components`. It must have all components of the file.
        path: the file.
        adapter: the name that the adapter gets in each model.
        dtype: dtype of the blocks; that of the file by default.
        freeze: freeze all parameters that belong to no adapter.

    Returns:
        A `LoadReport` of the keys that were loaded, each after the name of its component.

    Raises:
        AdapterIOError: the file can't be read.
        AdapterFileError: it is damaged, has unknown keys, or does not fit a model.
        ConversionError: it holds another method than LoRA, or a LoRA that is not a Bone adapter.
        ArgumentError: a component of the file is not among the models, or the name is taken.
        ArgumentTypeError: an argument is of the wrong type.
        ModeError: adapters are merged (`MergeError`), disabled or routed.

    All models are unchanged if this raises.

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
        ...     _ = disha.remove_adapters(unet)
        ...     image_lora.load({"unet": unet}, path).matched
        ('unet.conv_in.bone_block',)
    """
    given = _components(models)
    target = checked_path(path)
    views = {component: ModelView(model) for component, model in given.items()}
    contents = read_components(target, {name: view.modules.keys() for name, view in views.items()})
    missing = [component for component in contents if component not in views]
    if missing:
        raise ArgumentError(
            f"{target} holds {', '.join(contents)}, and models has no {', '.join(missing)}; give "
            "{component: model} for all of them, such as pipe.components"
        )
    matched: list[str] = []
    with ExitStack() as undo:
        for component, (header, tensors) in contents.items():
            view = views[component]
            report = load_contents(
                view, target, header, tensors, adapter, dtype=dtype, freeze=freeze
            )
            undo.callback(remove_adapters, given[component], adapter)
            matched += [f"{component}.{key}" for key in report.matched]
        undo.pop_all()
    return LoadReport(tuple(matched))


def _components(models: object) -> dict[str, nn.Module]:
    """Return the models by the names of their components."""
    if isinstance(models, nn.Module):
        models = ModelView(models).modules.get("", models)  # without wrappers
        component = _component_of(models)
        if component is not None:
            return {component: models}
        raise ArgumentError(
            f"a {original_class(models).__name__} does not show which component it is; give "
            f"{{component: model}}, with {', '.join(map(repr, COMPONENTS))} as components"
        )
    if not isinstance(models, Mapping):
        raise ArgumentTypeError(
            "models must be an nn.Module, or a mapping from components to them such as "
            f"pipe.components, got {type(models).__name__}"
        )
    found = {name: model for name, model in models.items() if isinstance(model, nn.Module)}
    if not found:
        raise ArgumentError("models holds no nn.Module; give {component: model}")
    return found


def _component_of(model: nn.Module) -> str | None:
    """Return the component that a model must be by its class, or None if the class does not say."""
    classes = {cls.__name__ for cls in original_class(model).__mro__}
    if classes & {"CLIPTextModel", "CLIPTextModelWithProjection"}:
        return "text_encoder"
    for component, word in (("unet", "UNet"), ("transformer", "Transformer")):
        if any(word in name for name in classes):
            return component
    return None


def _check_class(form: str, component: str, model: nn.Module) -> None:
    cls, told = original_class(model), _component_of(model)
    if told is not None and not component.startswith(told):
        raise ConversionError(
            f"a {cls.__name__} is not a {component}, so no program would find its keys; name the "
            f"component {told}"
        )
    if form in CLASSES and {one.__name__ for one in cls.__mro__}.isdisjoint(CLASSES[form]):
        raise ConversionError(
            f"the keys that {form} reads are not known for a {cls.__name__} ({component}); known "
            f"are {', '.join(CLASSES[form])}. Write the form 'diffusers'"
        )
    ours = cls.__module__.startswith("diffusers.")
    if form == "diffusers" and ours and not hasattr(cls, "load_lora_adapter"):
        raise ConversionError(
            f"diffusers can't load a LoRA into a {cls.__name__} ({component}); write a folder for "
            "PEFT (disha.interop.lora.export) and load it there, or write the form 'comfyui'"
        )
