"""How to read the ``config.json`` of each family: its keys and their defaults.

Defaults are those of the transformers library, because the files are written for it. If a key asks
for something that the decoder does not compute, an error names the key.
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
        qkv_bias: whether q, k and v have a bias.
        head_norm: whether query and key heads are normalised.
    """

    name: str
    causal: str
    context: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    qkv_bias: bool = False
    head_norm: bool = False


LLAMA = Family("llama", "LlamaForCausalLM", context=2048)
MISTRAL = Family("mistral", "MistralForCausalLM", context=131072, kv_heads=8, window=4096)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", context=32768, kv_heads=32, qkv_bias=True)
QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", context=32768, kv_heads=32, head_dim=128, head_norm=True
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}

# Keys of unusual or related models, with the values that have no effect.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
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
        qkv_bias=family.qkv_bias,
        head_norm=family.head_norm,
        window=_window(keys, family),
    )
    # A size says how many factors there are. So they are made after the sizes are checked.
    return replace(config, rope_factors=_rope_factors(keys, config))


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
    # With null, there are as many as heads. Without the key, the family's default holds.
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


def _window(keys: Fields, family: Family) -> int | None:
    """Return the size of the sliding window that all layers have; None if they have none."""
    default = None if "sliding_window" in keys.values else family.window
    found = None if family.window is None else keys.get("sliding_window", default)
    window = None if found is None else keys.integer("sliding_window", default)
    kind = "full_attention" if window is None else "sliding_attention"
    kinds = keys.get("layer_types", [])
    if not isinstance(kinds, list) or any(one != kind for one in kinds):
        raise keys.refused("layer_types", kinds, f"supported is {kind!r} in all layers")
    return window


def _rope(keys: Fields) -> Fields:
    """Return the keys of the rotary embedding, in the newer spelling or the older one."""
    key = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
    found = keys.get(key) or {}
    if not isinstance(found, dict) or any(isinstance(one, dict) for one in found.values()):
        raise keys.refused(key, found, "supported is one object for all layers")
    inside = Fields({"rope_theta": keys.get("rope_theta"), **found}, keys.path)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise keys.refused(key, found, "supported are rope_type 'default' and 'llama3'")
    inside.require_neutral({"partial_rotary_factor": (1,)})
    return Fields({**inside.values, "rope_type": kind}, keys.path)


def _rope_factors(keys: Fields, config: DecoderConfig) -> tuple[float, ...] | None:
    """Return the numbers that divide the rotary frequencies; None if nothing divides them."""
    rope = _rope(keys)
    if rope.get("rope_type") == "default":
        return None
    factor = rope.number("factor")
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
