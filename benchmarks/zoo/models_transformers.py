"""Tiny models of the transformers library, built by rules from each default configuration.

A rule is a regex of configuration fields and the small value that they get. `SPECIAL` corrects the
rules for single model types. Inputs follow from the names of forward's arguments; several
candidates are tried.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, ResNetConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

from benchmarks.zoo.cases import Built, Case, NotRun, run, seed, short, tensors, wake

WIDTH, INNER, HEADS, KV_HEADS, HEAD = 64, 96, 4, 2, 16
LAYERS, VOCABULARY, EXPERTS, PER_TOKEN = 2, 160, 4, 2
IMAGE, PATCH = 32, 8
GENTLE_IMAGE = 224
MOST_LAYERS = 6
MOST_PARAMETERS = 35_000_000
BATCH, LENGTH = 2, 12

# --- which field gets which value ----------------------------------------------------------------

RULES: tuple[tuple[str, int], ...] = (
    (r"(embed(ding)?|hidden|model|projection|embd|emb|proj|decoder|encoder|output|out_hidden|"
     r"attention_hidden|d)_(size|dim|model)|"
     r"dim|n_embd|hidden_size_\w+|\w+_hidden_size|\w+_embed_dim|\w+_hidden_dim|"
     r"pooler_output_size|lru_width|entity_emb_size|adapter_out_dim", WIDTH),
    (r"(\w+_)?intermediate_(size|dim)|(\w+_)?ffn_(dim|size|hidden_size)|mlp_dim|d_ff|"
     r"feed_forward_(dim|size)|(\w+_)?dim_feedforward|(\w+_)?mlp_hidden_size", INNER),
    (r"(num_|n_|\w+_)?(attention_)?heads?", HEADS),
    (r"(\w+_)?num_key_value_heads|num_kv_heads", KV_HEADS),
    (r"(\w+_)?head_dim|d_kv|d_head|dim_head|\w+_dim_head|kv_channels|\w+_head_size", HEAD),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", HEAD + 8),
    (r"(num_|n_)?(hidden_)?layers?|depth|\w+_depth|\w+_layers|num_blocks", LAYERS),
    (r"(\w+_)?vocab(ulary)?_size|num_embeddings|vocab_size_per_layer_input", VOCABULARY),
    (r"(num|n|moe_num|num_local|n_routed|num_routed)_(local_|routed_)?experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k", PER_TOKEN),
    (r"num_shared_experts|n_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"\w*lora_rank|mamba_d_head|mamba_head_dim|mamba_d_state|ssm_state_size|"
     r"state_size|num_mel_bins|(proj_)?codevector_dim|num_conv_pos_embeddings|"
     r"classifier_proj_size|xvector_output_dim|coordinate_size|shape_size", 16),
    (r"first_k_dense_replace|decoder_sparse_step|moe_layer_interval|"
     r"expert_layer_period|num_dense_layers", 1),
    (r"max_position_embeddings|n_positions|max_(source|target)_positions|"
     r"max_seq_len\w*|\w+_max_position_embeddings", 128),
    (r"img_size|input_size|(\w+_)?image_size|crop_size", IMAGE),
    (r"patch_size", PATCH),
    (r"sliding_window|attention_window_size|sliding_window_size|mamba_n_heads|"
     r"mamba_num_heads|mamba_chunk_size|chunk_size|chunk_length|time_step_rank|"
     r"num_queries|num_query_tokens|num_latents|resampler_n_latents|"
     r"resampler_num_latents", 8),
    (r"linear_(key|value)_head_dim|index_head_dim|swa_head_dim", HEAD),
    (r"linear_num_key_heads|index_n_heads|linear_num_heads", KV_HEADS),
    (r"linear_num_value_heads", HEADS),
    (r"index_topk|num_denoising|num_codebooks|num_quantizers|mm_tokens_per_image", 4),
    (r"mamba_d_ssm", 128),
    (r"codebook_size|num_codevectors_per_group", 32),
    (r"num_conv_pos_embedding_groups|num_frames", 2),
    (r"upsample_initial_channel|num_position_embeddings|d_latents|latent_dim", 64),
    (r"query_pre_attn_scalar", HEAD),
    (r"image_seq_length", (IMAGE // PATCH) ** 2),
)  # fmt: skip

KEPT = re.compile(
    r"num_(channels|register_tokens|labels|nextn_predict_layers|feature_levels|kv_shared_layers)"
    r"|.*_(std|eps|scale|dropout|ratio|stride|kernel|layerdrop|bias|act|loss|coefficient)"
    r"|chunk_size_feed_forward|vision_feature_layer|num_adapter_layers"
    r"|cross_attention_frequency|downsample_factor|subsampling_factor"
)
"""Fields that no rule may change."""

TOKEN = re.compile(r".*token_(id|index|ids)|\w+_token|.*_index|.*_pos_id")
USUAL_TOKENS = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "cls_token_id": 3, "sep_token_id": 2, "unk_token_id": 3, "mask_token_id": 4,
    "forced_eos_token_id": 2, "forced_bos_token_id": 1,
}  # fmt: skip
FIRST_TOKEN = 100
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")

GENTLE = re.compile(
    r"(num_|n_)?(hidden_)?layers?|(num_)?(encoder|decoder)_(hidden_)?layers|n_layers?|depth|"
    r"num_(encoder|decoder)_layers|vocab_size|num_(local_)?experts|n_routed_experts|image_size"
)
"""Fields that are changed where changing all of them gives a model that does not run."""


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}
    return {"rope_parameters": rope}


def _resnet() -> dict[str, Any]:
    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 64, 96],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    return {"backbone_config": backbone}


SPECIAL: dict[str, Any] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "qwen3_vl_text",
                     "qwen3_vl_moe_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text"),
                    _mrope(4, 2, 2)),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "glm4v_moe_text"),
                    _mrope(2, 1, 1, partial_rotary_factor=0.5)),
    **{name: {"head_dim": HEAD} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe",
                                             "hunyuan_vl_text", "ministral")},
    **{name: {"prediction_length": 4, "context_length": 16}
       for name in ("autoformer", "informer", "time_series_transformer")},
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr", "deformable_detr",
                     "table-transformer", "omdet-turbo"), _resnet),
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0},
    "xlstm": {"num_heads": HEADS},
    "xmod": {"default_language": "en_XX"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"expert_layer_period": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "align_vision_model": {"width_coefficient": 0.25, "depth_coefficient": 0.1},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "decision_transformer": {"state_dim": 17, "act_dim": 4},
    "nemotron": {"num_key_value_heads": KV_HEADS, "head_dim": HEAD},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 16},
    "glm5_next_text": {"num_key_value_heads": HEADS, "index_topk": 16, "index_kpool": 4},
    "clap_audio_model": {"spec_size": 64, "num_mel_bins": 16, "patch_embeds_hidden_size": 32,
                         "depths": [1, 1], "num_attention_heads": [2, 4], "hidden_size": 64,
                         "window_size": 4},
}  # fmt: skip
"""Model type -> values of fields which the rules don't get right, or a function that gives them."""

AVOIDED: dict[str, str] = dict.fromkeys(
    ("deepseek_ocr2", "emu3", "gemma3n", "granite4_vision", "zamba"),
    "the rules give no small model, and building a large one takes too long",
)
"""Model type -> why it is not tried."""


def rule(name: str) -> int | None:
    """Return the small value for a field, or None."""
    if KEPT.fullmatch(name):
        return None
    for pattern, value in COMPILED_RULES:
        if pattern.fullmatch(name):
            return value
    return None


COMPILED_RULES = [(re.compile(pattern), value) for pattern, value in reversed(RULES)]


class Shrinker:
    """Makes a small configuration from a default one.

    Args:
        gentle: shrink only the number of layers, experts and tokens.
    """

    def __init__(self, gentle: bool) -> None:
        self.gentle = gentle
        self.ids: dict[str, int] = {}

    def shrink(self, default: Any, special: Any = None) -> Any:
        """Return a small configuration of the same class."""
        values = {}
        fields = {k: v for k, v in vars(default).items() if not k.startswith("_")}
        usual = _usual(type(default))
        layers = self._layers(fields)
        for name, value in fields.items():
            small = self._small(name, value, layers, fields)
            if small is not None:
                values[name] = small
            elif name in usual and value != usual[name]:  # a whole sets it for its part
                values[name] = value
        values.update(special() if callable(special) else special or {})
        accepted = _constructor_fields(type(default))
        known = {k: v for k, v in values.items() if k in accepted or k in default.attribute_map}
        config = type(default)(**known)
        for name, value in values.items():  # what is computed from others, and not an argument
            if name in fields and name not in known and not isinstance(value, PreTrainedConfig):
                setattr(config, name, value)
        return config

    def _layers(self, fields: dict[str, Any]) -> tuple[int, ...]:
        """Return which layers are kept: enough for one of every kind."""
        count = next((fields[n] for n in LAYER_COUNTS if n in fields), None)
        if not isinstance(count, int):
            return tuple(range(LAYERS))
        per_layer = [
            v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == count > 4
        ]
        seen, kept = set(), []
        for i in range(count if per_layer else LAYERS):
            kind = tuple(str(v[i]) for v in per_layer)
            if kind not in seen or not per_layer:
                seen.add(kind)
                kept.append(i)
        if len(kept) < LAYERS:
            kept = sorted({*kept, *range(LAYERS)})
        return tuple(kept[:MOST_LAYERS])

    def _small(self, name: str, value: Any, layers: tuple[int, ...], fields: dict[str, Any]) -> Any:
        if isinstance(value, PreTrainedConfig):
            return self.shrink(value, SPECIAL.get(value.model_type))
        if value is None or isinstance(value, (bool, str)):
            return None
        if TOKEN.fullmatch(name) and not isinstance(value, float):
            return self._token(name, value)
        if name == "rope_parameters" and isinstance(value, dict):
            return None if self.gentle else _small_rope(value)
        if isinstance(value, (list, tuple)):
            return self._short(name, value, layers, fields)
        if not isinstance(value, int):
            return None
        if name in LAYER_COUNTS:
            return min(value, len(layers))
        if self.gentle and not GENTLE.fullmatch(name):
            return None
        if self.gentle and name == "image_size":
            return min(value, GENTLE_IMAGE)
        if name == "head_dim" and fields.get("qk_rope_head_dim"):
            return 8
        if name == "num_key_value_heads" and "kv_lora_rank" in fields:
            return HEADS
        small = rule(name)
        return None if small is None or value <= 0 else min(small, value)

    def _token(self, name: str, value: Any) -> Any:
        if name in USUAL_TOKENS:
            return USUAL_TOKENS[name] if isinstance(value, int) else None
        if isinstance(value, int) and value >= FIRST_TOKEN // 2:
            kind = re.sub(r"_(id|index)$", "", name)
            return self.ids.setdefault(kind, FIRST_TOKEN + len(self.ids))
        return None

    def _short(self, name: str, value: Any, layers: tuple[int, ...], fields: dict[str, Any]) -> Any:
        kind = type(value)
        if not value:
            return None
        count = next((fields[n] for n in LAYER_COUNTS if n in fields), None)
        if isinstance(count, int) and len(value) == count and count > 4:
            return kind(value[i] for i in layers)
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return None
        if re.fullmatch(r"depths?|layers|num_blocks|\w*stage_layers|\w+_depths|stage_num_blocks",
                        name):  # fmt: skip
            return kind(min(v, 1) for v in value)
        if self.gentle:
            return None
        if name in ("image_size", "img_size"):
            return kind(IMAGE for _ in value)
        if name == "patch_size":
            return kind(min(v, PATCH) for v in value)
        return kind(32 for _ in value) if name in ("conv_dim", "tdnn_dim") else None


def _usual(config_class: type) -> dict[str, Any]:
    try:
        return dict(vars(config_class()))
    except Exception:
        return {}


def _small_rope(value: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, one in value.items():
        if isinstance(one, dict):
            one = _small_rope(one)
        elif key == "mrope_section":
            factor = value.get("partial_rotary_factor", 1.0)
            half = int(HEAD * max(factor, 0.5)) // 2
            one = [half - 2 * (half // 3), half // 3, half // 3]
        elif key == "partial_rotary_factor":
            one = max(one, 0.5)
        elif key in ("short_factor", "long_factor") and isinstance(one, (list, tuple)):
            one = list(one)[: HEAD // 2]
        small[key] = one
    return small


def _constructor_fields(config_class: type) -> set[str]:
    found = set(inspect.signature(config_class.__init__).parameters)
    for cls in config_class.__mro__:
        found |= set(getattr(cls, "__annotations__", {}))
    return found - {"self", "kwargs", "args"}


# --- which class ---------------------------------------------------------------------------------

HEADS_IN_ORDER = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM",
    "SPEECH_SEQ_2_SEQ", "CTC", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION",
    "MASK_GENERATION", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "TEXT_TO_WAVEFORM",
    "TEXT_TO_SPECTROGRAM", "TIME_SERIES_PREDICTION", "VISUAL_QUESTION_ANSWERING",
    "SEQUENCE_CLASSIFICATION", "PRETRAINING",
)  # fmt: skip


def classes_of(model_type: str) -> list[type[nn.Module]]:
    """Return the model classes of a type: with a head first, then the model without one."""
    default = CONFIG_MAPPING[model_type]()
    order = list(HEADS_IN_ORDER)
    if default.is_encoder_decoder:
        order.sort(key=lambda head: "SEQ" not in head or head == "SEQUENCE_CLASSIFICATION")
    mappings = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in order]
    if hasattr(default, "text_config") and hasattr(default, "vision_config"):
        mappings = ["MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_MAPPING_NAMES", *mappings]
    names: list[str] = []
    for mapping in (*mappings, "MODEL_MAPPING_NAMES"):
        found = getattr(modeling_auto, mapping, {}).get(model_type, ())
        names += [found] if isinstance(found, str) else list(found)
    found = [getattr(transformers, name, None) for name in dict.fromkeys(names)]
    return [cls for cls in found if cls is not None]


# --- inputs --------------------------------------------------------------------------------------


def _value(config: Any, names: tuple[str, ...], default: Any) -> Any:
    """Return the first of these fields that the configuration or a part of it has."""
    for one in (config, *_parts(config)):
        for name in names:
            value = getattr(one, name, None)
            if value is not None and not isinstance(value, (bool, str)):
                return value
    return default


def _parts(config: Any) -> Iterator[Any]:
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from _parts(value)


def _ids(length: int = LENGTH, low: int = 5, high: int = 90) -> Tensor:
    return torch.randint(low, high, (BATCH, length))


def _images(config: Any) -> list[Tensor]:
    vision = getattr(config, "vision_config", None) or config
    channels = _value(vision, ("num_channels", "in_channels", "in_chans"), 3)
    channels = channels if isinstance(channels, int) else channels[0]
    size = _value(vision, ("image_size", "img_size"), IMAGE)
    first, second = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    sizes = [(first, second), (IMAGE, IMAGE), (64, 64), (128, 128), (224, 224)]
    return [torch.randn(BATCH, channels, *one) for one in dict.fromkeys(sizes)]


def candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Iterate over inputs that the model may run with, the likeliest first."""
    config: Any = model.config
    arguments = inspect.signature(model.forward).parameters
    required = [
        name
        for name, one in arguments.items()
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    common = _common(config, arguments, required)
    main = getattr(model, "main_input_name", "input_ids")
    yield from _multimodal(model, config, arguments, common)
    if "input_ids" in arguments and "pixel_values" in arguments:
        for image in _images(config)[:3]:
            yield {**common, "input_ids": _ids(), "pixel_values": image}
    if ("pixel_values" in arguments and main != "input_ids") or "pixel_values" in required:
        yield from _vision(config, common)
    if "pixel_values_videos" in arguments:
        for image in _images(config)[:3]:
            frames = _value(config, ("num_frames", "frames_per_clip"), 2)
            yield {**common, "pixel_values_videos": torch.stack([image] * frames, 1)}
    if "input_features" in arguments:
        yield from ({**common, **features} for features in _features(config, arguments))
    if "input_values" in arguments:
        for shape in ((BATCH, 4000), (BATCH, 1, 4000), (BATCH, 64, 16), (BATCH, 1, 1920),
                      (BATCH, 16, 64), (BATCH, 1, 9600)):  # fmt: skip
            yield {**common, "input_values": torch.randn(*shape) * 0.3}
    if "input_ids" in arguments:
        for length in (LENGTH, 16, 32, 64):
            yield {**common, "input_ids": _ids(length)}
    if "past_values" in arguments:
        yield from _series(config, common, arguments)
    if "hidden_states" in arguments or "inputs_embeds" in arguments:
        name = "hidden_states" if "hidden_states" in arguments else "inputs_embeds"
        yield {**common, name: torch.randn(BATCH, LENGTH, WIDTH)}
    if "inputs" in arguments:
        yield {**common, "inputs": _ids()}


def _common(config: Any, arguments: Any, required: list[str]) -> dict[str, Any]:
    """Return the inputs that go with whichever main one."""
    common: dict[str, Any] = {}
    if "decoder_input_ids" in arguments:
        common["decoder_input_ids"] = _ids(7)
    if "bbox" in arguments:
        corner = torch.randint(0, 40, (BATCH, LENGTH, 2))
        common["bbox"] = torch.cat([corner, corner + 10], -1)
    if "attention_mask" in required:
        common["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if "return_loss" in arguments:
        common["return_loss"] = False
    return common


def _vision(config: Any, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    common = {k: v for k, v in common.items() if k != "attention_mask"}
    images = _images(config)
    frames = _value(config, ("num_frames",), 2)
    for image in images:
        yield {**common, "pixel_values": image}
    for image in images[:2]:
        yield {**common, "pixel_values": torch.stack([image] * int(frames), 1)}
    for image in images:
        if image.shape[-1] <= 128:
            mask = torch.ones(BATCH, *image.shape[-2:], dtype=torch.long)
            yield {**common, "pixel_values": image, "pixel_mask": mask}


def _features(config: Any, arguments: Any) -> Iterator[dict[str, Any]]:
    bins = _value(config, ("num_mel_bins", "feature_size", "input_feat_per_channel",
                           "feature_projection_input_dim", "input_dim"), 16)  # fmt: skip
    longest = _value(config, ("max_source_positions",), 128)
    for shape in ((BATCH, bins, 2 * longest), (BATCH, 64, bins), (BATCH, bins, 64),
                  (BATCH, 1, 64, bins), (BATCH, 128, bins)):  # fmt: skip
        yield {"input_features": torch.randn(*shape)}


def _series(config: Any, common: dict[str, Any], arguments: Any) -> Iterator[dict[str, Any]]:
    length = _value(config, ("context_length",), 32)
    lags = max(_value(config, ("lags_sequence",), [0]))
    inputs = _value(config, ("num_input_channels", "input_size"), 1)
    horizon = _value(config, ("prediction_length",), 4) or 4
    yield {**common, "past_values": torch.randn(BATCH, length, inputs)}
    yield {**common, "past_values": torch.randn(BATCH, length + lags)}
    full = {
        "past_values": torch.rand(BATCH, length + lags),
        "past_time_features": torch.randn(BATCH, length + lags, 0),
        "past_observed_mask": torch.ones(BATCH, length + lags),
        "future_values": torch.rand(BATCH, horizon),
        "future_time_features": torch.randn(BATCH, horizon, 0),
    }
    yield {**common, **{k: v for k, v in full.items() if k in arguments}}
    yield {**common, "past_values": torch.randn(BATCH, length)}


def _multimodal(
    model: nn.Module, config: Any, arguments: Any, common: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Iterate over inputs of text with an image or a sound in it.

    The text has as many placeholders as the model says that the image has features.
    """
    parts = (("image", "pixel_values", _pictures), ("audio", "input_features", _features))
    for kind, name, inputs in parts:
        token = _value(config, (f"{kind}_token_id", f"{kind}_token_index"), None)
        if token is not None and "input_ids" in arguments and name in arguments:
            features = getattr(model, f"get_{kind}_features", None)
            for extra in inputs(config, arguments):
                yield from _with_placeholders(model, common, extra, int(token), features)


def _pictures(config: Any, arguments: Any) -> Iterator[dict[str, Any]]:
    vision = getattr(config, "vision_config", None) or config
    if "image_grid_thw" in arguments:
        patch = _value(vision, ("patch_size",), PATCH)
        frames = _value(vision, ("temporal_patch_size",), 1)
        channels = _value(vision, ("in_channels", "num_channels", "in_chans"), 3)
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        for time in dict.fromkeys((frames, 1)):
            flat = torch.randn(16 * BATCH, channels * time * patch * patch)
            yield {"pixel_values": flat, "image_grid_thw": grid}
            yield {
                "pixel_values": flat.view(-1, channels, patch, patch) if time == 1 else flat,
                "image_grid_thw": grid,
            }
    for image in _images(config)[:2]:
        yield {"pixel_values": image}
        if "image_sizes" in arguments:
            sizes = torch.tensor([list(image.shape[-2:])] * BATCH)
            yield {"pixel_values": image, "image_sizes": sizes}
            yield {"pixel_values": torch.stack([image] * 2, 1), "image_sizes": sizes}
        yield {"pixel_values": image[:, None]}


def _with_placeholders(
    model: nn.Module, common: dict[str, Any], extra: dict[str, Any], token: int, features: Any
) -> Iterator[dict[str, Any]]:
    if features is None:
        return
    accepted = inspect.signature(features).parameters
    try:
        with torch.no_grad():
            found = features(**{k: v for k, v in extra.items() if k in accepted})
    except Exception:
        return
    for count in _row_counts(found):
        ids = _ids(count + 6)
        ids[:, 2 : 2 + count] = token
        inputs = {**common, **extra, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield inputs
        arguments = inspect.signature(model.forward).parameters
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in arguments:
                yield {**inputs, name: (ids == token).long()}


def _row_counts(features: Any) -> list[int]:
    """Return how many placeholders each sample may need, from the features of all of them."""
    pooled = getattr(features, "pooler_output", None)
    counts = []
    for one in (pooled, features):
        if one is None:
            continue
        if isinstance(one, (list, tuple)) and all(isinstance(t, Tensor) for t in one):
            rows = sum(math.prod(t.shape[:-1]) for t in one)
            counts.append(rows // BATCH)
            continue
        for tensor in itertools.islice(tensors(one), 3):
            if tensor.ndim >= 2:
                counts.append(math.prod(tensor.shape[:-1]) // BATCH)
                counts.append(math.prod(tensor.shape[:-1]))
    return [count for count in dict.fromkeys(counts) if 0 < count <= 400]


# --- building ------------------------------------------------------------------------------------


def build(model_type: str) -> Built:
    """Build a tiny model of a type, or of its first part that can be built, and find inputs."""
    reasons = []
    for one in (model_type, *parts_of().get(model_type, ())):
        if one in AVOIDED:
            reasons.append(AVOIDED[one])
            continue
        for gentle in (False, True):
            try:
                built = _build(one, gentle)
            except NotRun as error:
                reasons.append(str(error))
                continue
            if one != model_type:
                built.note = f"only its part {built.note}: {reasons[0]}"
            return built
    raise NotRun(reasons[0])


def _build(model_type: str, gentle: bool) -> Built:
    reason = "no model class"
    try:
        classes = classes_of(model_type)
    except Exception as error:
        raise NotRun(f"no default configuration: {short(error)}") from None
    for cls in classes:
        try:
            default = CONFIG_MAPPING[model_type]()
            config = Shrinker(gentle).shrink(default, SPECIAL.get(model_type))
            _refuse_large(cls, config)
            seed()
            model = wake(cls(config).float().eval())
        except NotRun as error:
            reason = str(error)
            continue
        except Exception as error:
            reason = f"{cls.__name__} can't be built: {short(error)}"
            continue
        if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
            reason = f"{cls.__name__} has too many parameters"
            continue
        tried = []
        seed()
        for inputs in candidates(model):
            built = Built(model, kwargs=inputs, note=cls.__name__)
            try:
                with torch.no_grad():
                    output = run(built)
            except Exception as error:
                tried.append(f"{'+'.join(inputs)}: {short(error)}")
                continue
            if any(t.is_floating_point() and t.numel() for t in tensors(output)):
                return built
            tried.append("no tensors in the output")
        reason = f"{cls.__name__} does not run: {'; '.join(dict.fromkeys(tried[:8]))}"
    raise NotRun(reason)


def _refuse_large(cls: type[nn.Module], config: Any) -> None:
    """Raise if a model would have too many parameters, if that can be computed without memory."""
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(config).parameters())
    except Exception:
        return
    if count > MOST_PARAMETERS:
        raise NotRun(f"{cls.__name__} has {count:,} parameters even when small")


def parts_of() -> dict[str, list[str]]:
    """Return each model type -> the types of its parts, which are no architectures by themselves.

    A part is of the same folder of the library as the type whose name it starts with.
    """
    folders: dict[str, list[str]] = {}
    for model_type in CONFIG_MAPPING_NAMES:
        folders.setdefault(model_type_to_module_name(model_type), []).append(model_type)
    parts = {}
    for folder, types in folders.items():
        same = [t for t in types if t.replace("-", "_").replace(".", "_") == folder]
        whole = same[0] if same else min(types, key=len)
        parts[whole] = [t for t in types if t != whole]
    return parts


def cases() -> list[Case]:
    """Return a case for every model type of the library that has a folder of its own."""
    return [Case("transformers", one, partial(build, one)) for one in sorted(parts_of())]
