"""Names of layers in the LoRA files of image models.

A file has one or more components of a pipeline: a UNet or a transformer, and text encoders. The
first factor of a layer has this key, where `<name>` is the layer's name in `diffusers`, and
`<n_a_m_e>` is the same with `_` in place of dots:

    form       component                           key
    diffusers  any                                 <component>.<name>.lora_A.weight
    kohya      UNet                                lora_unet_<n_a_m_e>.lora_down.weight
    kohya      CLIP text encoders                  lora_te_<n_a_m_e>.lora_down.weight, or lora_te1_
                                                   and lora_te2_ in a model with two of them
    kohya      Flux                                lora_unet_double_blocks_0_img_attn_qkv..., named
                                                   and joined as in the original model
    comfyui    UNet, CLIP text encoders            as kohya
    comfyui    transformer (Flux, SD3, PixArt)     transformer.<name>.lora_A.weight

Source: loaders/lora_conversion_utils.py of huggingface/diffusers; networks/lora.py and
networks/convert_flux_lora.py of kohya-ss/sd-scripts; comfy/lora.py and comfy/utils.py of
Comfy-Org/ComfyUI.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor

from disha.errors import ArgumentError
from disha.text import brief, first_few

__all__ = [
    "ALPHA",
    "CLASSES",
    "COMPONENTS",
    "FLUX_ROWS",
    "FORMS",
    "METADATA",
    "Component",
    "Form",
    "check_component",
    "check_form",
    "component_of",
    "flux_key",
    "in_file",
    "in_model",
    "joined_rows",
    "kohya_key",
    "layers_of",
    "readable",
]

Form = Literal["diffusers", "kohya", "comfyui"]

FORMS: tuple[Form, ...] = get_args(Form)

METADATA = "lora_adapter_metadata"
"""Where `diffusers` keeps the configuration of a LoRA in the metadata of its file."""

ALPHA = ".alpha"
"""The end of the key of a layer's alpha."""

Component = Literal["unet", "transformer", "text_encoder", "text_encoder_2"]

COMPONENTS: tuple[Component, ...] = get_args(Component)
"""The components of a pipeline that can have a LoRA, by their names in `diffusers`."""

CLASSES: Mapping[str, Collection[str]] = {
    "kohya": (
        "UNet2DConditionModel",
        "FluxTransformer2DModel",
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
    ),
    "comfyui": (
        "UNet2DConditionModel",
        "FluxTransformer2DModel",
        "SD3Transformer2DModel",
        "PixArtTransformer2DModel",
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
    ),
}
"""The classes of the models whose names are known, by the form that needs to know them."""

_KOHYA: Mapping[str, Component] = {
    "unet": "unet",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
}
"""How keys of kohya start, after `lora_` -> the component."""

_UNET_BLOCKS = (
    r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\."
    r"(resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)"
    r"|attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)))"
    r"|(downsamplers|upsamplers)\.0\.conv)"
)
_UNET_REST = r"conv_in|conv_out|(time|add)_embedding\.linear_[12]"
_CLIP = r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
_TRANSFORMER = (
    r"transformer_blocks\.\d+\.(attn[12]?\.(to_[qkv]|to_out\.0|to_add_out|add_[qkv]_proj)"
    r"|(ff|ff_context)\.net\.(0\.proj|2)|(norm1|norm1_context)\.linear)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
    r"|x_embedder|context_embedder|norm_out\.linear|proj_out|pos_embed\.proj"
    r"|time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]"
    r"|adaln_single\.(linear|emb\.(timestep|resolution|aspect_ratio)_embedder\.linear_[12])"
    r"|caption_projection\.linear_[12]"
)

_WORDS = re.compile(
    "time_embedding|add_embedding|time_emb_proj|transformer_blocks|conv_shortcut|down_blocks"
    "|up_blocks|mid_block|conv_in|conv_out|linear_1|linear_2|proj_in|proj_out|to_q|to_k|to_v|to_out"
    r"|text_model|self_attn|q_proj|k_proj|v_proj|out_proj|[a-z]+\d*|\d+"
)
"""The parts of names in UNets and in CLIP. Some of them contain a `_` themselves."""

_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_FLUX = {
    "transformer_blocks": ("double_blocks", _DOUBLE),
    "single_transformer_blocks": ("single_blocks", _SINGLE),
}
"""Flux: name of the blocks in diffusers -> their name in the original model, and there: layer ->
the layers of diffusers that it joins."""

FLUX_ROWS = (1, 1, 1, 4)
"""How many rows q, k, v and proj_mlp have, which Flux joins: multiples of the weight's columns."""


def check_form(form: object) -> None:
    """Raise `ArgumentError` unless it is one of `FORMS`."""
    if form not in FORMS:
        raise ArgumentError(f"unknown form {brief(form)}; allowed are {', '.join(FORMS)}")


def check_component(name: object) -> None:
    """Raise `ArgumentError` unless it is one of `COMPONENTS`."""
    if name not in COMPONENTS:
        raise ArgumentError(
            f"an image LoRA has no component {brief(name)}; allowed are {', '.join(COMPONENTS)}"
        )


def joined_rows(a: Tensor, count: int) -> list[int]:
    """Return how many rows of B belong to each of the layers that Flux joins.

    Args:
        a: A (rank, in) of the joined layers.
        count: how many layers are joined.
    """
    return [rows * a.shape[1] for rows in FLUX_ROWS[:count]]


# --- from names in a model to keys ---------------------------------------------------------------


def component_of(names: Sequence[str]) -> Component:
    """Return which component of a pipeline has layers of these names.

    Raises:
        ArgumentError: the names don't show it.
    """
    for component in COMPONENTS:
        if all(readable("comfyui", component, name) for name in names):
            # Both text encoders have layers of these names. Without this word, it is the first.
            if names[0].startswith("text_model."):
                break
            return component
    raise ArgumentError(
        f"the names of the layers ({first_few(names, 3, ', ')} ...) do not show which component of "
        f"a pipeline they belong to; name it (--component for the command): {', '.join(COMPONENTS)}"
    )


def readable(form: str, component: str, name: str) -> bool:
    """Whether the readers of a form look for a layer of that name."""
    if form == "diffusers":
        return name != ""  # the model itself is no layer
    if component.startswith("text_encoder"):
        return re.fullmatch(_CLIP, name) is not None
    if component == "unet":
        known = _UNET_BLOCKS if form == "kohya" else f"{_UNET_BLOCKS}|{_UNET_REST}"
        return re.fullmatch(known, name) is not None
    if form == "kohya":
        return flux_key(name) is not None
    return re.fullmatch(_TRANSFORMER, name) is not None


def in_file(component: str, name: str) -> str:
    """Return the name of a layer in a file.

    In files, names in text encoders start with `text_model.`. In some models of recent versions of
    `transformers`, they do not.
    """
    if component.startswith("text_encoder") and re.fullmatch(_CLIP, name):
        return f"text_model.{name.removeprefix('text_model.')}"
    return name


def kohya_key(component: str, name: str, components: Collection[str]) -> str:
    """Return the key of a layer of a UNet or of a CLIP text encoder, without the factor.

    Args:
        component: the component.
        name: the layer's name in the model.
        components: all components of the pipeline that are known.
    """
    prefix = "lora_unet"
    if component.startswith("text_encoder"):
        several = not {"text_encoder_2", "transformer"}.isdisjoint(components)
        number = "2" if component == "text_encoder_2" else "1" if several else ""
        prefix = f"lora_te{number}"
    return f"{prefix}_{in_file(component, name).replace('.', '_')}"


def flux_key(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the key that holds a layer of Flux, and the names of all layers that are joined there.

    The result is None if there is no such key.

    Examples:
        >>> from disha.interop.image_names import flux_key
        >>> flux_key("single_transformer_blocks.3.proj_out")
        ('lora_unet_single_blocks_3_linear2', ('single_transformer_blocks.3.proj_out',))
    """
    blocks, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    if blocks not in _FLUX or not number.isdecimal():
        return None
    theirs, layers = _FLUX[blocks]
    for layer, parts in layers.items():
        if part in parts:
            joined = tuple(f"{blocks}.{number}.{one}" for one in parts)
            return f"lora_unet_{theirs}_{number}_{layer}", joined
    return None


# --- from keys to names --------------------------------------------------------------------------


def layers_of(key: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the component of a key (without the factor), and the names of the layers joined there.

    The result is None if the key is unknown.

    Examples:
        >>> from disha.interop.image_names import layers_of
        >>> layers_of("lora_te_text_model_encoder_layers_0_self_attn_q_proj")
        ('text_encoder', ('text_model.encoder.layers.0.self_attn.q_proj',))
    """
    for component in COMPONENTS:
        name = key.removeprefix(f"{component}.")
        if name not in ("", key):
            return component, (name,)
    kohya = re.fullmatch(rf"lora_({'|'.join(_KOHYA)})_(\w+)", key)
    if kohya is None:
        return None
    prefix, rest = kohya.groups()
    for blocks, (theirs, layers) in _FLUX.items():
        flux = re.fullmatch(rf"{theirs}_(\d+)_({'|'.join(layers)})", rest)
        if prefix == "unet" and flux is not None:
            number, layer = flux.groups()
            return "transformer", tuple(f"{blocks}.{number}.{part}" for part in layers[layer])
    component = _KOHYA[prefix]
    name = ".".join(_WORDS.findall(rest))
    known = readable("comfyui", component, name) and name.replace(".", "_") == rest
    return (component, (name,)) if known else None


def in_model(component: str, name: str, modules: Collection[str] | None) -> str:
    """Return the name in a model of a layer that has this name in a file: undoes `in_file`.

    Args:
        component: the component.
        name: the name in the file.
        modules: the names of the model's modules. Without them, the result is the name in present
            versions of `transformers`.
    """
    bare = name.removeprefix("text_model.")
    if not component.startswith("text_encoder") or bare == name:
        return name
    flat = component == "text_encoder" if modules is None else bare in modules
    return bare if flat else name
