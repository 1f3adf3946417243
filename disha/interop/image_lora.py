"""LoRA files of image models, with the keys of `diffusers`: `<component>.<name>.lora_A.weight`.

One file holds all components of a pipeline. The scale is multiplied into B. Bone and tile are
exact, convolutions included: A has the kernel, and B is 1x1 (a LoCon). Files of kohya's programs
are read too, if they name layers as the model does; `diffusers` writes such files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from disha.checks import check_type
from disha.errors import AdapterFileError, ArgumentError, ConversionError
from disha.files import AdapterContents
from disha.files.disk import PathLike, check_path, open_tensors, read_tensors, save_tensors
from disha.files.loading import load_contents
from disha.files.saving import adapter_contents
from disha.functional import Layout
from disha.interop.low_rank import (
    CONV,
    BaseWeight,
    LayerFactors,
    LoraReport,
    LowRankUpdate,
    base_weights_of_model,
    check_rank,
    contents_of_factors,
    list_names,
    low_rank_updates,
)
from disha.interop.peft_format import (
    MATRIX,
    PeftFolder,
    reasons_against,
    refuse_to_write,
    tensors_of,
    unknown_to_lora,
)
from disha.interop.peft_reading import explain_settings, scale_of
from disha.model.state import LoadReport
from disha.model.view import ModelView
from disha.sharding.ranks import Ranks

__all__ = ["export", "load"]

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""The components of a pipeline that can have a LoRA, by their names in `diffusers`."""

SETTINGS_KEY = "lora_adapter_metadata"

OF_KOHYA = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}
"""How names begin in files of kohya's programs -> the component."""

KOHYA_ENDS = {"lora_down.weight": MATRIX[0], "lora_up.weight": MATRIX[1]}

Models = Mapping[str, object]
"""Component -> model, such as the `components` of a pipeline."""


def export(
    models: Models,
    path: PathLike,
    adapter: str = "default",
    *,
    rank: int | None = None,
) -> LoraReport:
    """Write the adapters of image models as one LoRA file.

    dW = B A. Bone and tile are exact, in the dtype of their blocks. The scale s is multiplied into
    B. A convolution has rank r times the positions of its kernel. BAT is truncated to its largest
    singular values.

    Args:
        models: component -> model, such as `{"unet": unet}` or `pipe.components`. Components
            without this adapter are left out.
        path: the file to write.
        adapter: the adapter's name, the same in all models.
        rank: largest rank of a layer. BAT needs it; if it is smaller than r, Bone is truncated too.

    Returns:
        A `LoraReport`, with the rank and the error of every layer.

    Raises:
        ConversionError: `diffusers` does not know a layer, or would compute
            something else (a grouped or dilated convolution, an embedding); or parameters were
            trained with the blocks.
        ArgumentError: no model has the adapter, a component is unknown, or BAT lacks `rank`.
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
    views, ranks = _views_of(models)
    action = f"export adapter {adapter!r} as an image LoRA"
    with ranks.fail_together(action):
        target = check_path(path)
        check_rank(rank)  # before a process waits for another
        views = {component: view for component, view in views.items() if adapter in view.adapters}
        if not views:
            raise ArgumentError(f"no component of {', '.join(models)} has an adapter {adapter!r}")
        for component, view in views.items():
            layers = [model_block.name for model_block in view.blocks(adapter)]
            problems = reasons_against(view, layers, unknown_to_lora)
            refuse_to_write(f"a LoRA would not compute what the {component} does", problems)
    updates = []
    for component, view in views.items():
        contents = adapter_contents(view, adapter, with_fingerprints=False)
        base = base_weights_of_model(view, adapter)
        updates += _updates_of(component, contents, rank, base)
    with ranks.fail_together(action):
        return _write(target, updates, ranks.writes)


def load(
    models: Models,
    path: PathLike,
    adapter: str = "default",
    *,
    replace: bool = False,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> LoadReport:
    """Load a LoRA file into models, as `disha.interop.lora.load` loads a folder of PEFT.

    Args:
        models: component -> model, such as `{"unet": unet}` or `pipe.components`. It must have all
            components of the file.
        path: the file.
        adapter: the name that the adapter gets in each model.
        replace: where a model has an adapter of that name, copy the values into it (hot swap).
        dtype: dtype of the blocks; that of the file by default.
        freeze: freeze all parameters that belong to no adapter.

    Returns:
        A `LoadReport` of the keys that were loaded, each after the name of its component.

    Raises:
        AdapterIOError: the file can't be read.
        AdapterFileError: it is damaged, has unknown keys, or does not fit a model.
        ConversionError: it holds another method than LoRA.
        ArgumentError: a component of the file is not among the models, or the name is taken
            and `replace` is not set.
        ArgumentTypeError: an argument is of the wrong type.
        ModeError: adapters are merged (`MergeError`), or in a context.

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
    views, ranks = _views_of(models)
    with ranks.fail_together(f"load an image LoRA as adapter {adapter!r}"):
        path = check_path(path)
        contents = read_file(path, {name: view.modules for name, view in views.items()})
        missing = [component for component in contents if component not in views]
        if missing:
            raise ArgumentError(
                f"{path} holds {', '.join(contents)}, and models has no {', '.join(missing)}; add "
                "it"
            )
    matched = []
    with ExitStack() as undo:  # if a model does not fit, the ones before it are put back
        for component, of_component in contents.items():
            report = load_contents(
                views[component],
                path,
                of_component,
                adapter,
                replace=replace,
                dtype=dtype,
                freeze=freeze,
                around=undo,
            )
            matched += [f"{component}.{key}" for key in report.matched]
        undo.pop_all()
    return LoadReport(tuple(matched))


def _views_of(models: Models) -> tuple[dict[str, ModelView], Ranks]:
    """Return a view of each model, and the ranks that hold shards of any of them.

    Some models may be whole on each rank. The ranks fail together in these too.
    """
    check_type("models", models, Mapping, "a mapping such as {'unet': unet}")
    views = {
        name: ModelView(model) for name, model in models.items() if isinstance(model, nn.Module)
    }
    parameters = []
    for view in views.values():
        view.reshard()  # a gathered parameter does not show its ranks
        parameters += view.list_parameters()
    ranks = Ranks(parameters)
    for view in views.values():
        view.ranks = ranks
    return views, ranks


# --- writing -------------------------------------------------------------------------------------


def write_file(
    path: Path,
    component: str,
    contents: AdapterContents,
    *,
    rank: int | None = None,
    base: BaseWeight | None = None,
) -> LoraReport:
    """Write the adapter of one component as `export` does, without its model."""
    return _write(path, _updates_of(component, contents, rank, base))


def _write(path: Path, updates: Sequence[LowRankUpdate], writes: bool = True) -> LoraReport:
    """Write updates to a file, if this process writes, and return the report on them."""
    if writes:
        save_tensors(path, tensors_of(updates))
    return LoraReport(path, tuple(update.described() for update in updates))


def _updates_of(
    component: str, contents: AdapterContents, rank: int | None, base: BaseWeight | None
) -> list[LowRankUpdate]:
    """Return the updates of a component, under their names in a file."""
    if component not in COMPONENTS:
        raise ArgumentError(
            f"an image LoRA has no component {component!r}; allowed are "
            f"{', '.join(COMPONENTS)} (--component of disha convert)"
        )
    refused = [
        record.name
        for record in contents.layers
        if record.layout.pattern not in ("out in", CONV) or not record.name
    ]
    refused += contents.also_train
    if refused:
        raise ConversionError(
            f"an image LoRA can't hold {list_names(refused)} of the {component}, only linear "
            "layers and convolutions; leave them out (`exclude`, --no_also_train), or merge"
        )
    updates = []
    for update in low_rank_updates(contents.layers, contents.tensors, rank=rank, base=base):
        name = _name_in_file(component, update.record.name)
        updates.append(_scale_b(update, f"{component}.{name}"))
    return updates


def _name_in_file(component: str, name: str) -> str:
    """Return the name of a layer in a file: in a CLIP text encoder, it begins with `text_model`."""
    if component.startswith("text_encoder") and name.startswith("encoder.layers."):
        return f"text_model.{name}"
    return name


def _scale_b(update: LowRankUpdate, name: str) -> LowRankUpdate:
    """Return an update under this name, with s B in place of B and the scale 1.

    B becomes float32 if its dtype would round the product.
    """
    dtype = update.b.dtype
    product = update.b.double() * update.record.scale
    b = product.to(dtype)
    if not torch.equal(b.double(), product):
        b = product.to(torch.promote_types(dtype, torch.float32))
    return replace(update, record=replace(update.record, name=name, scale=1.0), b=b)


# --- reading -------------------------------------------------------------------------------------


def has_factors(path: Path) -> bool:
    """Whether a safetensors file is a LoRA with the keys of `diffusers` or of kohya's programs."""
    with open_tensors(path) as file:
        return any(key.endswith((*MATRIX, *KOHYA_ENDS)) for key in file.keys())  # noqa: SIM118


def read_for_model(view: ModelView, path: Path) -> AdapterContents:
    """Return the adapter of the one component in a file that a model can be."""
    adapters = read_file(path, dict.fromkeys(COMPONENTS, view.modules))
    fitting = [
        contents for contents in adapters.values() if view.modules.keys() >= {*contents.names}
    ]
    if len(fitting) != 1:
        raise AdapterFileError(
            f"{path} holds {', '.join(adapters)}, and {len(fitting)} of these fit the model; name "
            "the component (disha.interop.image_lora.load)"
        )
    return fitting[0]


def read_file(
    path: Path, modules: Mapping[str, Collection[str]] = MappingProxyType({})
) -> dict[str, AdapterContents]:
    """Return component -> its adapter.

    `modules` has the names of the modules of each component; without it, no model is known.
    """
    tensors, metadata = read_tensors(path)
    with explain_settings(path):
        return _read(path, tensors, metadata, modules)


def _read(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    modules: Mapping[str, Collection[str]],
) -> dict[str, AdapterContents]:
    """Return component -> its adapter, from the tensors of a file and its metadata."""
    tensors, alphas = _rename_from_kohya(tensors, modules)
    pairs, rest = PeftFolder(path, {}, tensors).split_pairs()
    factors: dict[str, list[LayerFactors]] = {}
    unknown = [weight for weight in pairs if weight.partition(".")[0] not in COMPONENTS]
    if unknown or rest.tensors:
        raise AdapterFileError(
            f"{path} has {list_names([*unknown, *rest.tensors])}, which is no factor, lora_A or "
            f"lora_B, of {', '.join(COMPONENTS)}; use the file in the program that it is made for"
        )
    for weight, (a, b, _) in pairs.items():
        component, _, name = weight.partition(".")
        layout = Layout(CONV) if a.dim() > 2 else Layout("out in")
        model_name = _name_in_model(component, name, modules.get(component))
        scale = 1.0  # it is multiplied into B, unless the file tells alpha
        settings = _settings_of(path, component, metadata)
        if "lora_alpha" in settings.fields:
            scale = scale_of(settings, name, len(a))
        elif weight in alphas:
            scale = alphas[weight] / len(a)
        of_layer = LayerFactors(model_name, a, b, layout, scale)
        factors.setdefault(component, []).append(of_layer)
    return {
        component: contents_of_factors(f"{path}, {component}", layers)
        for component, layers in factors.items()
    }


def _rename_from_kohya(
    tensors: Mapping[str, Tensor], modules: Mapping[str, Collection[str]]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return tensors of kohya's programs under the keys of `diffusers`, and each layer's alpha.

    Their names have underscores for dots, so the modules of components tell the names. What is not
    theirs stays as it is.
    """
    names = {}
    for start, component in OF_KOHYA.items():
        for name in modules.get(component, ()):
            underscored = name.replace(".", "_")
            names[f"{start}_{underscored}"] = f"{component}.{name}"
            names["_".join((start, "text_model", underscored))] = f"{component}.{name}"
    renamed = {}
    alphas = {}
    for key, tensor in tensors.items():
        layer, _, end = key.partition(".")
        name = names.get(layer, layer)
        if end == "alpha":
            alphas[name] = tensor.item()
        elif end in KOHYA_ENDS:
            renamed[name + KOHYA_ENDS[end]] = tensor
        else:
            renamed[key] = tensor
    return renamed, alphas


def _settings_of(path: Path, component: str, metadata: Mapping[str, str]) -> PeftFolder:
    """Return PEFT's settings of a component, which `diffusers` notes since its version 0.34."""
    noted = json.loads(metadata.get(SETTINGS_KEY, "{}")).items()
    start = f"{component}."
    fields = {key.removeprefix(start): value for key, value in noted if key.startswith(start)}
    return PeftFolder(path, fields, {})


def _name_in_model(component: str, name: str, modules: Collection[str] | None) -> str:
    """Return the name of a layer in a model that has these modules.

    Without them, the name is that in present versions of `transformers`, in which only the second
    text encoder of a pipeline has a `text_model`.
    """
    if not component.startswith("text_encoder"):
        return name
    flat = name.removeprefix("text_model.")
    is_flat = component == "text_encoder"
    if modules is not None:
        is_flat = flat in modules
    return flat if is_flat else name
