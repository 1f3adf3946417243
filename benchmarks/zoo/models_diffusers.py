"""Tiny models of the diffusers library, with configurations by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models import transformers, unets
from torch import Tensor

from benchmarks.zoo.cases import Built, Case, NotRun, building, run, seed, wake

Inputs = Callable[[], dict[str, Any]]

HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}
UNET: dict[str, Any] = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
}  # fmt: skip
CROSS: dict[str, Any] = {
    **UNET, "cross_attention_dim": 32, "attention_head_dim": 4, "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
DOWN_AND_UP: dict[str, Any] = {
    "block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def noise(*shape: int) -> Tensor:
    """Return normal random numbers; there are two samples."""
    return torch.randn(2, *shape)


def times() -> Tensor:
    """Return a time step for each sample."""
    return torch.tensor([7, 300])


def _text(width: int, length: int = 6) -> dict[str, Any]:
    return {"encoder_hidden_states": noise(length, width)}


def _mask(length: int = 6) -> dict[str, Any]:
    return {"encoder_attention_mask": torch.ones(2, length, dtype=torch.bool)}


def _image(channels: int, size: int = 16) -> dict[str, Any]:
    return {"sample": noise(channels, size, size), "timestep": times()}


def _hidden(*shape: int) -> dict[str, Any]:
    return {"hidden_states": noise(*shape), "timestep": times()}


def _flux_ids() -> dict[str, Any]:
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return {"img_ids": grid, "txt_ids": torch.zeros(6, 3)}


MODELS: dict[str, tuple[dict[str, Any], Inputs]] = {
    "UNet2DModel": (
        {**UNET, "sample_size": 16, "attention_head_dim": 8,
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        lambda: _image(3)),
    "UNet2DConditionModel": (CROSS, lambda: {**_image(4), **_text(32)}),
    "UNet1DModel": (
        {"block_out_channels": (32, 32, 64), "sample_size": 64, "extra_in_channels": 64},
        lambda: {"sample": noise(2, 256), "timestep": times()}),
    "UNet3DConditionModel": (
        {**CROSS, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
         "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
        lambda: {"sample": noise(4, 3, 16, 16), "timestep": times(), **_text(32)}),
    "UNetMotionModel": (
        {**UNET, "cross_attention_dim": 32, "num_attention_heads": 4,
         "motion_num_attention_heads": 4,
         "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
         "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")},
        lambda: {"sample": noise(4, 3, 16, 16), "timestep": times(),
                 "encoder_hidden_states": torch.randn(6, 6, 32)}),
    "UNetSpatioTemporalConditionModel": (
        {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32,
         "num_attention_heads": (2, 4), "addition_time_embed_dim": 32, "num_frames": 3,
         "projection_class_embeddings_input_dim": 96,
         "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
         "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")},
        lambda: {"sample": noise(3, 8, 16, 16), "timestep": times(), **_text(32, 1),
                 "added_time_ids": torch.rand(2, 3)}),
    "ControlNetModel": (
        {**{k: v for k, v in CROSS.items() if k not in ("sample_size", "up_block_types")},
         "conditioning_embedding_out_channels": (16, 32)},
        lambda: {**_image(4), **_text(32), "controlnet_cond": noise(3, 32, 32)}),
    "UVit2DModel": (
        {"hidden_size": 64, "cond_embed_dim": 32, "micro_cond_encode_dim": 8,
         "micro_cond_embed_dim": 40, "encoder_hidden_size": 32, "vocab_size": 32,
         "codebook_size": 24, "in_channels": 32, "block_out_channels": 32, "num_res_blocks": 1,
         "num_hidden_layers": 2, "num_attention_heads": 4, "block_num_heads": 4,
         "intermediate_size": 96, "sample_size": 8},
        lambda: {"input_ids": torch.randint(0, 24, (2, 8, 8)), **_text(32),
                 "pooled_text_emb": noise(32), "micro_conds": torch.rand(2, 5)}),
    "StableCascadeUNet": (
        {"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 16,
         "patch_size": 1, "conditioning_dim": 32, "block_out_channels": (32, 64),
         "num_attention_heads": (2, 4), "down_num_layers_per_block": (1, 1),
         "up_num_layers_per_block": (1, 1), "down_blocks_repeat_mappers": (1, 1),
         "up_blocks_repeat_mappers": (1, 1),
         "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock",
                                    "SDCascadeAttnBlock"),) * 2,
         "clip_text_in_channels": 32, "clip_text_pooled_in_channels": 32,
         "clip_image_in_channels": 32, "clip_seq": 2, "switch_level": (False,)},
        lambda: {"sample": noise(4, 8, 8), "timestep_ratio": torch.rand(2),
                 "clip_text_pooled": noise(1, 32), "clip_text": noise(4, 32),
                 "clip_img": noise(1, 32)}),
    "AutoencoderKL": (DOWN_AND_UP, lambda: {"sample": noise(3, 16, 16)}),
    "AsymmetricAutoencoderKL": (
        {"down_block_out_channels": (32, 64), "up_block_out_channels": (32, 64),
         "norm_num_groups": 8, "down_block_types": ("DownEncoderBlock2D",) * 2,
         "up_block_types": ("UpDecoderBlock2D",) * 2},
        lambda: {"sample": noise(3, 16, 16)}),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16),
         "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
        lambda: {"sample": torch.rand(2, 3, 16, 16)}),
    "VQModel": (
        {**DOWN_AND_UP, "num_vq_embeddings": 32, "latent_channels": 3},
        lambda: {"sample": noise(3, 16, 16)}),
    "AutoencoderDC": (
        {"in_channels": 3, "latent_channels": 4, "attention_head_dim": 8,
         "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
         "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
         "encoder_block_out_channels": (16, 32), "decoder_block_out_channels": (16, 32),
         "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
         "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
         "upsample_block_type": "interpolate", "downsample_block_type": "stride_conv",
         "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"},
        lambda: {"sample": noise(3, 16, 16)}),
    "AutoencoderKLTemporalDecoder": (
        {"block_out_channels": (32, 64), "layers_per_block": 1,
         "down_block_types": ("DownEncoderBlock2D",) * 2},
        lambda: {"sample": noise(3, 16, 16), "num_frames": 2}),
    "AutoencoderOobleck": (
        {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "channel_multiples": [1, 2],
         "decoder_channels": 8, "decoder_input_channels": 4, "audio_channels": 2},
        lambda: {"sample": noise(2, 64)}),
    "AutoencoderKLCogVideoX": (
        {**DOWN_AND_UP, "block_out_channels": (16, 16, 16, 16), "norm_num_groups": 4,
         "down_block_types": ("CogVideoXDownBlock3D",) * 4, "latent_channels": 4,
         "up_block_types": ("CogVideoXUpBlock3D",) * 4, "temporal_compression_ratio": 4},
        lambda: {"sample": noise(3, 5, 16, 16)}),
    "AutoencoderKLWan": (
        {"base_dim": 16, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
         "temperal_downsample": [False, True, True]},
        lambda: {"sample": noise(3, 5, 16, 16)}),
    "AutoencoderKLMochi": (
        {"in_channels": 15, "out_channels": 3, "latent_channels": 4,
         "encoder_block_out_channels": (32, 32, 32, 32),
         "decoder_block_out_channels": (32, 32, 32, 32), "layers_per_block": (1, 1, 1, 1, 1)},
        lambda: {"sample": noise(3, 7, 16, 16)}),
    "AutoencoderKLLTXVideo": (
        {"latent_channels": 8, "block_out_channels": (8, 8, 8, 8),
         "decoder_block_out_channels": (8, 8, 8, 8), "layers_per_block": (1, 1, 1, 1, 1),
         "decoder_layers_per_block": (1, 1, 1, 1, 1)},
        lambda: {"sample": noise(3, 9, 32, 32)}),
    "FluxTransformer2DModel": (
        {**HEADS, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6),
         "guidance_embeds": True},
        lambda: {**_hidden(16, 4), **_text(32), "pooled_projections": noise(32), **_flux_ids(),
                 "guidance": torch.ones(2)}),
    "Flux2Transformer2DModel": (
        {**HEADS, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 4, 4),
         "timestep_guidance_channels": 32},
        lambda: {**_hidden(16, 4), **_text(32), "img_ids": torch.rand(16, 4),
                 "txt_ids": torch.rand(6, 4), "guidance": torch.ones(2)}),
    "ChromaTransformer2DModel": (
        {**HEADS, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6), "approximator_num_channels": 8,
         "approximator_hidden_dim": 32, "approximator_layers": 1},
        lambda: {**_hidden(16, 4), **_text(32), **_flux_ids()}),
    "SD3Transformer2DModel": (
        {**HEADS, "sample_size": 16, "in_channels": 4, "num_layers": 2,
         "joint_attention_dim": 32, "caption_projection_dim": 64, "pooled_projection_dim": 32,
         "out_channels": 4, "pos_embed_max_size": 16, "dual_attention_layers": (0,),
         "qk_norm": "rms_norm"},
        lambda: {**_hidden(4, 16, 16), **_text(32), "pooled_projections": noise(32)}),
    "PixArtTransformer2DModel": (
        {**HEADS, "sample_size": 16, "in_channels": 4, "out_channels": 8, "num_layers": 1,
         "cross_attention_dim": 64, "caption_channels": 32, "use_additional_conditions": False},
        lambda: {**_hidden(4, 16, 16), **_text(32)}),
    "DiTTransformer2DModel": (
        {**HEADS, "sample_size": 16, "in_channels": 4, "num_layers": 1},
        lambda: {**_hidden(4, 16, 16), "class_labels": torch.tensor([1, 5])}),
    "HunyuanDiT2DModel": (
        {**HEADS, "in_channels": 4, "patch_size": 2, "num_layers": 2, "hidden_size": 64,
         "mlp_ratio": 2.0, "cross_attention_dim": 32, "cross_attention_dim_t5": 32,
         "pooled_projection_dim": 32, "text_len": 4, "text_len_t5": 4, "sample_size": 16,
         "use_style_cond_and_image_meta_size": False},
        lambda: {"hidden_states": noise(4, 16, 16), "timestep": times().float(),
                 **_text(32, 4), "text_embedding_mask": torch.ones(2, 4),
                 "encoder_hidden_states_t5": noise(4, 32),
                 "text_embedding_mask_t5": torch.ones(2, 4),
                 "image_meta_size": None, "style": None,
                 "image_rotary_emb": [torch.ones(64, 16), torch.zeros(64, 16)]}),
    "SanaTransformer2DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1,
         "num_cross_attention_heads": 4, "cross_attention_head_dim": 16,
         "cross_attention_dim": 64, "caption_channels": 32, "sample_size": 8},
        lambda: {**_hidden(4, 8, 8), **_text(32)}),
    "AuraFlowTransformer2DModel": (
        {**HEADS, "sample_size": 16, "in_channels": 4, "num_mmdit_layers": 1,
         "num_single_dit_layers": 1, "joint_attention_dim": 32, "caption_projection_dim": 64,
         "pos_embed_max_size": 64},
        lambda: {**_hidden(4, 16, 16), **_text(32)}),
    "Lumina2Transformer2DModel": (
        {"sample_size": 16, "in_channels": 4, "hidden_size": 48, "num_layers": 1,
         "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2,
         "multiple_of": 16, "axes_dim_rope": (4, 4, 4), "axes_lens": (64, 64, 64),
         "cap_feat_dim": 32},
        lambda: {**_hidden(4, 16, 16), **_text(32), **_mask()}),
    "QwenImageTransformer2DModel": (
        {**HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 1,
         "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)},
        lambda: {**_hidden(16, 16), **_text(32), "img_shapes": [[(1, 4, 4)]] * 2,
                 "encoder_hidden_states_mask": torch.ones(2, 6)}),
    "CogView4Transformer2DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "text_embed_dim": 32,
         "time_embed_dim": 32, "condition_dim": 8, "pos_embed_max_size": 16, "sample_size": 16,
         "rope_axes_dim": (16, 16)},
        lambda: {**_hidden(4, 16, 16), **_text(32), "original_size": torch.full((2, 2), 16.0),
                 "target_size": torch.full((2, 2), 16.0), "crop_coords": torch.zeros(2, 2)}),
    "ZImageTransformer2DModel": (
        {"in_channels": 4, "dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 4,
         "n_kv_heads": 4, "cap_feat_dim": 32, "axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64]},
        lambda: {"x": [torch.randn(4, 1, 16, 16) for _ in range(2)], "t": torch.rand(2),
                 "cap_feats": [torch.randn(6, 32) for _ in range(2)]}),
    "OmniGenTransformer2DModel": (
        {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 96, "num_layers": 1, "pad_token_id": 0, "vocab_size": 100,
         "in_channels": 4, "time_step_dim": 32,
         "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}},
        lambda: {**_hidden(4, 8, 8), "input_ids": torch.randint(1, 90, (2, 10)),
                 "input_img_latents": [], "input_image_sizes": {},
                 "attention_mask": torch.ones(2, 27, 27),
                 "position_ids": torch.arange(27).repeat(2, 1)}),
    "PriorTransformer": (
        {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1,
         "embedding_dim": 32, "num_embeddings": 6, "additional_embeddings": 4},
        lambda: {**_hidden(32), "proj_embedding": noise(32), **_text(32)}),
    "Transformer2DModel": (
        {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 32,
         "norm_num_groups": 8, "cross_attention_dim": 32},
        lambda: {"hidden_states": noise(32, 8, 8), **_text(32)}),
    "WanTransformer3DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 32,
         "ffn_dim": 96, "num_layers": 1, "rope_max_seq_len": 32},
        lambda: {**_hidden(4, 2, 8, 8), **_text(32)}),
    "HunyuanVideoTransformer3DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 32,
         "rope_axes_dim": (4, 6, 6)},
        lambda: {**_hidden(4, 2, 8, 8), **_text(32), **_mask(), "pooled_projections": noise(32),
                 "guidance": torch.ones(2)}),
    "CogVideoXTransformer3DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 32,
         "text_embed_dim": 32, "num_layers": 1, "sample_width": 8, "sample_height": 8,
         "sample_frames": 5, "max_text_seq_length": 6},
        lambda: {**_hidden(2, 4, 8, 8), **_text(32)}),
    "LTXVideoTransformer3DModel": (
        {**HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 64,
         "num_layers": 1, "caption_channels": 32},
        lambda: {**_hidden(32, 8), **_text(32), **_mask(), "num_frames": 2, "height": 4,
                 "width": 4}),
    "MochiTransformer3DModel": (
        {**HEADS, "num_layers": 2, "pooled_projection_dim": 32, "in_channels": 4,
         "text_embed_dim": 32, "time_embed_dim": 32, "max_sequence_length": 6},
        lambda: {**_hidden(4, 2, 8, 8), **_text(32), **_mask()}),
    "LatteTransformer3DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 1, "sample_size": 8,
         "patch_size": 2, "cross_attention_dim": 64, "caption_channels": 32,
         "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "video_length": 2,
         "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
         "attention_bias": True},
        lambda: {**_hidden(4, 2, 8, 8), **_text(32)}),
    "StableAudioDiTModel": (
        {"sample_size": 8, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8,
         "num_attention_heads": 4, "num_key_value_attention_heads": 2, "out_channels": 4,
         "cross_attention_dim": 32, "time_proj_dim": 16, "global_states_input_dim": 32,
         "cross_attention_input_dim": 32},
        lambda: {**_hidden(4, 8), **_text(32), "global_hidden_states": noise(1, 32),
                 "rotary_embedding": (torch.rand(9, 4), torch.rand(9, 4))}),
}  # fmt: skip


def _build(name: str) -> Built:
    cls = next(
        (getattr(m, name) for m in (diffusers, transformers, unets) if hasattr(m, name)), None
    )
    if cls is None:
        raise NotRun("this release of diffusers has no such class")
    config, inputs = MODELS[name]
    with building():
        seed()
        model = wake(cls(**config).float().eval())
        seed()
        built = Built(model, kwargs=inputs(), note=name)
        with torch.no_grad():
            run(built)
    return built


def cases() -> list[Case]:
    """Return a case for every model that has a configuration here."""
    return [Case("diffusers", name, partial(_build, name)) for name in MODELS]
