"""Tiny random image models of `diffusers`, with inputs, and text encoders."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


@dataclass(frozen=True)
class ImageModel:
    """A class of models, the name of its component in a pipeline, sizes, and inputs."""

    cls: type[nn.Module]
    component: str
    sizes: dict[str, Any]
    inputs: dict[str, tuple[int, ...]]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.cls(**self.sizes).eval()

    def run(self, model: nn.Module) -> Tensor:
        torch.manual_seed(1)
        given: dict[str, Any] = {name: torch.randn(shape) for name, shape in self.inputs.items()}
        given["timestep"] = torch.tensor([3])
        if self.cls is PixArtTransformer2DModel:
            given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        return model(**given).sample


UNET = ImageModel(
    UNet2DConditionModel,
    "unet",
    {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    },
    {"sample": (1, 4, 8, 8), "encoder_hidden_states": (1, 5, 12)},
)
FLUX = ImageModel(
    FluxTransformer2DModel,
    "transformer",
    {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 4, 8),
    },
    {
        "hidden_states": (1, 6, 4),
        "encoder_hidden_states": (1, 3, 12),
        "pooled_projections": (1, 8),
        "img_ids": (6, 3),
        "txt_ids": (3, 3),
    },
)
SD3 = ImageModel(
    SD3Transformer2DModel,
    "transformer",
    {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
    },
    {
        "hidden_states": (1, 4, 8, 8),
        "encoder_hidden_states": (1, 3, 12),
        "pooled_projections": (1, 8),
    },
)
PIXART = ImageModel(
    PixArtTransformer2DModel,
    "transformer",
    {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "norm_num_groups": 4,
    },
    {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 3, 12)},
)
IMAGE_MODELS = {"unet": UNET, "flux": FLUX, "sd3": SD3, "pixart": PIXART}


def text_encoder(*, projection: bool = False) -> nn.Module:
    """Return a tiny CLIP text encoder."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
