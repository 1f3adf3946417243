"""What each family's ``config.json`` means: which keys there are, and what is computed by default.

Defaults are those of the transformers library, which is what the files are written for. Keys that
would change what is computed, in ways that our decoder does not follow, are refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from disha.finetune.errors import CheckpointError
from disha.finetune.models.decoder import DecoderConfig
from disha.finetune.models.rope import LinearScaling, Llama3Scaling, RopeScaling

__all__ = ["FAMILIES", "SUPPORTED", "WAY_OUT", "Family", "config_from_json", "family_of"]

SUPPORTED = "Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3"
WAY_OUT = (
    "any other model can be given as --model module:function, a function that returns an nn.Module"
)


@dataclass(frozen=True)
class Family:
    """What one family of models computes, and what its keys are when a file leaves them out.

    Args:
        name: `model_type` in config.json, and `general.architecture` in GGUF files.
        causal: the class in `architectures` of a language model.
        context: `max_position_embeddings` by default.
        kv_heads: `num_key_value_heads` by default; None for as many as there are heads.
        head_dim: `head_dim` by default; None for the width divided among the heads.
        window: `sliding_window` by default.
        window_by: the key that turns the sliding window on; None where a window alone does.
        has_window: whether there are sliding windows at all.
        qkv_bias: whether q, k and v always have a bias.
        has_attention_bias: whether `attention_bias` gives q, k, v and o a bias.
        has_mlp_bias: whether `mlp_bias` gives the feed-forward layers one.
        head_norm: whether query and key heads are normalised.
    """

    name: str
    causal: str
    context: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    window_by: str | None = None
    has_window: bool = False
    qkv_bias: bool = False
    has_attention_bias: bool = False
    has_mlp_bias: bool = False
    head_norm: bool = False


LLAMA = Family(
    "llama", "LlamaForCausalLM", context=2048, has_attention_bias=True, has_mlp_bias=True
)
MISTRAL = Family(
    "mistral", "MistralForCausalLM", context=131072, kv_heads=8, window=4096, has_window=True
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    context=32768,
    kv_heads=32,
    window=4096,
    window_by="use_sliding_window",
    has_window=True,
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
    has_window=True,
    has_attention_bias=True,
    head_norm=True,
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}

# Keys of related models, with the values that change nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "attention_multiplier": (1, None),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "logits_scaling": (1, None),
    "logit_scale": (1, None),
    "attn_logit_softcapping": (0, None),
    "final_logit_softcapping": (0, None),
    "query_pre_attn_scalar": (None,),
    "num_experts": (0, 1, None),
    "num_local_experts": (0, 1, None),
    "use_qk_norm": (False, None),
    "use_mrope": (False, None),
    "clip_qkv": (None,),
    "no_rope_layers": (None,),
    "attention_chunk_size": (None,),
}

_FULL, _SLIDING = "full_attention", "sliding_attention"


def family_of(name: object, path: Path) -> Family:
    """The family of a `model_type` or GGUF architecture.

    Raises:
        CheckpointError: it is none of those that our decoder computes.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"{path} holds a model of architecture {name!r}; supported are "
            f"{', '.join(map(repr, FAMILIES))} ({SUPPORTED}); {WAY_OUT}"
        )
    return FAMILIES[name]


def config_from_json(fields: Mapping[str, Any], path: Path) -> DecoderConfig:
    """The decoder that a ``config.json`` describes.

    Args:
        fields: its contents.
        path: the file; for messages.

    Raises:
        CheckpointError: another architecture, a key that is missing or of the wrong type, or one
            that asks for what our decoder does not compute.
    """
    return _Reader(fields, path).config()


@dataclass(frozen=True)
class _Reader:
    """Typed access to the fields of a config.json.

    Args:
        fields: its contents.
        path: the file.
    """

    fields: Mapping[str, Any]
    path: Path

    def config(self) -> DecoderConfig:
        family = family_of(self.fields.get("model_type"), self.path)
        self._check_followed(family)
        hidden, heads = self._integer("hidden_size"), self._integer("num_attention_heads")
        context = self._integer("max_position_embeddings", family.context)
        base, scaling = self._rope(context)
        attention_bias = family.has_attention_bias and self._flag("attention_bias")
        sized = DecoderConfig(
            vocabulary=self._integer("vocab_size"),
            hidden=hidden,
            feed_forward=self._integer("intermediate_size"),
            layers=self._integer("num_hidden_layers"),
            heads=heads,
            kv_heads=self._key_value_heads(family, heads),
            head_dim=self._head_dim(family, hidden, heads),
            context=context,
            rope_base=base,
            norm_epsilon=self._number("rms_norm_eps", 1e-6),
            tied_head=self._flag("tie_word_embeddings"),
            rope_scaling=scaling,
            qkv_bias=family.qkv_bias or attention_bias,
            output_bias=attention_bias,
            feed_forward_bias=family.has_mlp_bias and self._flag("mlp_bias"),
            head_norm=family.head_norm,
        )
        # Layers are listed only now, as the sizes have been checked.
        window, windowed_layers = self._windows(family, sized.layers)
        return replace(sized, window=window, windowed_layers=windowed_layers)

    def _check_followed(self, family: Family) -> None:
        classes = self.fields.get("architectures") or [family.causal]
        if not isinstance(classes, list) or family.causal not in classes:
            raise self._refused("architectures", classes, f"supported is {family.causal!r}")
        if self.fields.get("quantization_config") is not None:
            raise CheckpointError(
                f"{self.path} has a quantization_config: its weights are quantised already. Use "
                "the model's folder in bf16 or fp32; --bits 8 or --bits 4 quantise it"
            )
        for key, neutral in _NEUTRAL.items():
            value = self.fields.get(key, neutral[0])
            if value not in neutral:
                raise self._refused(key, value, f"only {neutral[0]!r} is supported")

    def _key_value_heads(self, family: Family, heads: int) -> int:
        default = heads if family.kv_heads is None else family.kv_heads
        if self.fields.get("num_key_value_heads", default) is None:
            return heads
        return self._integer("num_key_value_heads", default)

    def _head_dim(self, family: Family, hidden: int, heads: int) -> int:
        if self.fields.get("head_dim", family.head_dim) is not None:
            return self._integer("head_dim", family.head_dim)
        if heads < 1 or hidden % heads:
            raise CheckpointError(
                f"{self.path} has hidden_size = {hidden}, which can't be divided among its "
                f"{heads} heads, and no head_dim"
            )
        return hidden // heads

    def _windows(self, family: Family, layers: int) -> tuple[int | None, tuple[int, ...]]:
        """How far a sliding window reaches, and the layers that have one."""
        window = self._window(family)
        kinds = self.fields.get("layer_types")
        if kinds is None:
            # Mistral has it in every layer; Qwen's key counts the layers without, the first ones.
            first = (
                0 if family.window_by is None else max(0, self._integer("max_window_layers", 28))
            )
            return window, () if window is None else tuple(range(first, layers))
        if (
            not isinstance(kinds, list)
            or len(kinds) != layers
            or not set(map(str, kinds)) <= {_FULL, _SLIDING}
        ):
            raise self._refused(
                "layer_types", kinds, f"supported is a list of {layers}, {_FULL!r} or {_SLIDING!r}"
            )
        windowed = tuple(layer for layer, kind in enumerate(kinds) if kind == _SLIDING)
        if windowed and window is None:
            raise self._refused("layer_types", kinds, "and the sliding window is not turned on")
        if family.window_by is None and len(windowed) != (0 if window is None else layers):
            raise self._refused(
                "layer_types", kinds, f"{family.name} has the same attention in all layers"
            )
        return window, windowed

    def _window(self, family: Family) -> int | None:
        on = family.has_window and (family.window_by is None or self._flag(family.window_by))
        if not on or self.fields.get("sliding_window", family.window) is None:
            return None
        return self._integer("sliding_window", family.window)

    def _rope(self, context: int) -> tuple[float, RopeScaling | None]:
        """Base and scaling of the rotary frequencies, in the newer spelling or the older one."""
        key = "rope_scaling" if self.fields.get("rope_scaling") else "rope_parameters"
        found = self.fields.get(key) or {}
        if not isinstance(found, dict) or any(isinstance(one, dict) for one in found.values()):
            raise self._refused(key, found, "supported is one object for all layers")
        outside = {"rope_theta": self.fields.get("rope_theta", 10000.0)}
        inside = _Reader({**outside, **found}, self.path)
        kind = found.get("rope_type", found.get("type", "default"))
        if inside.fields.get("partial_rotary_factor", 1) not in (1, None):
            raise self._refused(key, found, "a partial_rotary_factor other than 1 is not supported")
        base = inside._number("rope_theta")
        if kind == "default":
            return base, None
        if kind == "linear":
            return base, LinearScaling(inside._number("factor"))
        if kind == "llama3":
            original = "original_max_position_embeddings"
            unscaled = self._number(original, inside._number(original, context))
            return base, Llama3Scaling(
                inside._number("factor"),
                inside._number("low_freq_factor"),
                inside._number("high_freq_factor"),
                unscaled,
            )
        raise self._refused(
            key, found, "supported are rope_type 'default', 'linear' and 'llama3'", WAY_OUT
        )

    def _refused(self, key: str, value: object, *why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} asks for {key} = {value!r}, which is not supported, and ignoring it "
            f"would give another model; {'; '.join(why)}"
        )

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self._field(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {key} must be an integer, found {value!r}")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._field(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {key} must be a number, found {value!r}")
        # A whole number in JSON can be larger than any float.
        if not abs(value) <= sys.float_info.max:
            raise CheckpointError(
                f"{self.path}: {key} must be finite, found a number beyond floats"
            )
        return float(value)

    def _flag(self, key: str) -> bool:
        value = self.fields.get(key) or False
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {key} must be true or false, found {value!r}")
        return value

    def _field(self, key: str, default: float | None) -> object:
        value = self.fields.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(
                f"{self.path} lacks the key {key}; get the model's folder again, as the library "
                "that made it wrote it"
            )
        return value
