"""How to read the ``config.json`` of each family: its keys and their defaults.

Defaults are those of the transformers library, as the files are written for it. If a key asks for
something that the decoder does not compute, an error names the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from disha.finetune.errors import CheckpointError, UnsupportedModelError
from disha.finetune.models.decoder import DecoderConfig
from disha.finetune.models.fields import WAY_OUT, Fields
from disha.finetune.models.rope import llama3_factors

__all__ = ["FAMILIES", "Family", "config_from_json", "family_of"]

SUPPORTED = "Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3"


@dataclass(frozen=True)
class Family:
    """The features of one family of models, and its defaults for keys that a file leaves out.

    Args:
        name: `model_type` in config.json, and `general.architecture` in GGUF files.
        causal: the class name in `architectures`.
        context: the default of `max_position_embeddings`.
        kv_heads: the default of `num_key_value_heads`; None for the number of heads.
        head_dim: the default of `head_dim`; None for the hidden size divided by the heads.
        window: the default of `sliding_window`; None if the family has no sliding windows.
        window_by: the key that turns the sliding window on; None if it is always on.
        qkv_bias: whether q, k and v always have a bias.
        has_attention_bias: whether `attention_bias` gives q, k, v and o a bias.
        has_mlp_bias: whether `mlp_bias` gives the feed-forward layers a bias.
        head_norm: whether query and key heads are normalised.
    """

    name: str
    causal: str
    context: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    window_by: str | None = None
    qkv_bias: bool = False
    has_attention_bias: bool = False
    has_mlp_bias: bool = False
    head_norm: bool = False


LLAMA = Family(
    "llama", "LlamaForCausalLM", context=2048, has_attention_bias=True, has_mlp_bias=True
)
MISTRAL = Family("mistral", "MistralForCausalLM", context=131072, kv_heads=8, window=4096)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    context=32768,
    kv_heads=32,
    window=4096,
    window_by="use_sliding_window",
    qkv_bias=True,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    context=32768,
    kv_heads=32,
    head_dim=128,
    window=4096,
    window_by="use_sliding_window",
    has_attention_bias=True,
    head_norm=True,
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}

# Keys of related models, with the values that change nothing.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0,),
    "partial_rotary_factor": (1,),
    "attention_multiplier": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "query_pre_attn_scalar": (None,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "use_qk_norm": (False,),
    "use_mrope": (False,),
    "clip_qkv": (None,),
    "no_rope_layers": (None,),
    "attention_chunk_size": (None,),
}

FULL, SLIDING = "full_attention", "sliding_attention"


def family_of(name: object, path: Path, families: Mapping[str, Family] = FAMILIES) -> Family:
    """Return the family of a `model_type` or GGUF architecture.

    Args:
        name: the name in the file.
        path: the file; for messages.
        families: the supported families, by name.

    Raises:
        UnsupportedModelError: the name is none of these.
    """
    if not isinstance(name, str) or name not in families:
        raise UnsupportedModelError(
            f"{path} holds a model of architecture {name!r}; supported are "
            f"{', '.join(map(repr, families))} ({SUPPORTED}); {WAY_OUT}"
        )
    return families[name]


def config_from_json(values: Mapping[str, Any], path: Path) -> DecoderConfig:
    """Return the sizes and constants of the decoder that a ``config.json`` describes.

    Args:
        values: the file's contents.
        path: the file; for messages.

    Raises:
        CheckpointError: a key is missing or of the wrong type.
        UnsupportedModelError: the architecture is another one, or a key asks for something that
            the decoder does not compute.
    """
    keys, family = Fields(values, path), family_of(values.get("model_type"), path)
    _check_supported(keys, family)
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    attention_bias = family.has_attention_bias and keys.flag("attention_bias")
    config = DecoderConfig(
        vocabulary=keys.integer("vocab_size"),
        hidden=hidden,
        feed_forward=keys.integer("intermediate_size"),
        layers=keys.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=_kv_heads(keys, family, heads),
        head_dim=_head_dim(keys, family, hidden, heads),
        context=keys.integer("max_position_embeddings", family.context),
        rope_base=_rope(keys).number("rope_theta", 10000.0),
        norm_epsilon=keys.number("rms_norm_eps", 1e-6),
        tied_head=keys.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        feed_forward_bias=family.has_mlp_bias and keys.flag("mlp_bias"),
        head_norm=family.head_norm,
    )
    # These lists are as long as the sizes say, so they are made after the sizes are checked.
    window, windowed_layers = _windows(keys, family, config.layers)
    return replace(
        config,
        rope_factors=_rope_factors(keys, config),
        window=window,
        windowed_layers=windowed_layers,
    )


def _check_supported(keys: Fields, family: Family) -> None:
    classes = keys.get("architectures") or [family.causal]
    if not isinstance(classes, list) or family.causal not in classes:
        raise keys.refused("architectures", classes, f"supported is {family.causal!r}")
    if keys.get("quantization_config") is not None:
        raise UnsupportedModelError(
            f"{keys.path} has a quantization_config: its weights are quantised already. Use "
            "the model's folder in bf16 or fp32, where --bits 8 or --bits 4 quantise it, or "
            "install transformers (pip install 'disha-torch[transformers]')"
        )
    keys.require_neutral(NEUTRAL)


def _kv_heads(keys: Fields, family: Family, heads: int) -> int:
    # A null means as many as heads. A missing key means the family's default.
    if "num_key_value_heads" in keys.values or family.kv_heads is None:
        return keys.integer("num_key_value_heads", heads)
    return family.kv_heads


def _head_dim(keys: Fields, family: Family, hidden: int, heads: int) -> int:
    default = None if "head_dim" in keys.values else family.head_dim
    if keys.get("head_dim", default) is not None:
        return keys.integer("head_dim", default)
    if heads < 1 or hidden % heads:
        raise CheckpointError(
            f"{keys.path} has hidden_size = {hidden}, which can't be divided among its "
            f"{heads} heads, and no head_dim"
        )
    return hidden // heads


def _windows(keys: Fields, family: Family, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Return the size of the sliding window, and the layers that have one."""
    window = _window(keys, family)
    kinds = keys.get("layer_types")
    if kinds is None:
        # Mistral has a window in every layer. Qwen's key counts the first layers without one.
        first = 0 if family.window_by is None else max(0, keys.integer("max_window_layers", 28))
        return window, () if window is None else tuple(range(first, layers))
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or not set(map(str, kinds)) <= {FULL, SLIDING}
    ):
        raise keys.refused(
            "layer_types", kinds, f"supported is a list of {layers}, each {FULL!r} or {SLIDING!r}"
        )
    windowed = tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING)
    if windowed and window is None:
        raise keys.refused("layer_types", kinds, "the sliding window is not turned on")
    if family.window_by is None and len(windowed) != (0 if window is None else layers):
        raise keys.refused(
            "layer_types", kinds, f"{family.name} has the same attention in all layers"
        )
    return window, windowed


def _window(keys: Fields, family: Family) -> int | None:
    on = family.window is not None and (family.window_by is None or keys.flag(family.window_by))
    default = None if "sliding_window" in keys.values else family.window
    if not on or keys.get("sliding_window", default) is None:
        return None
    return keys.integer("sliding_window", default)


def _rope(keys: Fields) -> Fields:
    """Return the keys of the rotary embedding, in the newer spelling or the older one."""
    key = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
    found = keys.get(key) or {}
    if not isinstance(found, dict) or any(isinstance(one, dict) for one in found.values()):
        raise keys.refused(key, found, "supported is one object for all layers")
    inside = Fields({"rope_theta": keys.get("rope_theta"), **found}, keys.path)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise keys.refused(key, found, "supported are rope_type 'default', 'linear' and 'llama3'")
    inside.require_neutral({"partial_rotary_factor": (1,)})
    return Fields({**inside.values, "rope_type": kind}, keys.path)


def _rope_factors(keys: Fields, config: DecoderConfig) -> tuple[float, ...] | None:
    """Return the numbers that divide the rotary frequencies; None for none."""
    rope = _rope(keys)
    if rope.get("rope_type") == "default":
        return None
    factor = rope.number("factor")
    if rope.get("rope_type") == "linear":
        return (factor,) * (config.head_dim // 2)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    original = "original_max_position_embeddings"
    context = keys.number(original, rope.number(original, config.context))
    if not (0 < low < high and factor > 0 and context > 0):
        raise CheckpointError(
            f"{keys.path} has a llama3 rotary scaling with factor {factor}, low_freq_factor {low}, "
            f"high_freq_factor {high} and {original} {context}; they must be greater than 0, and "
            "low_freq_factor below high_freq_factor"
        )
    return llama3_factors(config.head_dim, config.rope_base, factor, low, high, context)
