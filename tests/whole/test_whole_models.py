"""Whole models of other libraries, tiny and random, each through an adapter's whole life.

Everything that can be adapted is. What matters here is what no single layer shows: owners that
read a layer's weight without calling it, fused paths, tied weights, layers of other libraries.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

import disha
from tests.conftest import assert_same, assert_unchanged, perturb, seed_torch, snapshot
from tests.reference import METHODS

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]

DEPTHWISE = {"conv_dw|conv1d": 1}
SHARED = {r"^shared$": "encoder and decoder have embeddings of their own that share its weight"}
VOCABULARY = 32


@dataclass(frozen=True)
class Case:
    """A model, an input for it, and which part of its output is compared.

    Args:
        make: returns the model, random.
        inputs: returns the arguments of a call.
        expected: a part of the adapted layers' names, so that a case can't lose what it is for.
        rank_pattern: r of layers that can't have 2.
        unused: regex of layers that no input reaches, and so must not be adapted -> why.
        fused: whether torch computes parts of it fused, which adapted layers leave.
        single: whether the model computes some parts in float32 whatever its dtype.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    expected: tuple[str, ...]
    rank_pattern: dict[str, int] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    fused: bool = False
    single: bool = False
    result: Callable[[Any], torch.Tensor] = lambda output: getattr(output, "logits", output)

    def model(self) -> nn.Module:
        """Return the model in float64, without the zeros that keep gradients from layers."""
        seed_torch(0)
        model = self.make().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1 / math.sqrt(fan_in(parameter)))
        return model.eval()

    def arguments(self) -> dict[str, Any]:
        seed_torch(1)
        inputs = self.inputs()
        return {
            name: value.double() if value.is_floating_point() else value
            for name, value in inputs.items()
        }

    def output(self, model: nn.Module) -> torch.Tensor:
        return self.result(model(**self.arguments()))

    def inject(self, model: nn.Module, method: str, **options: Any) -> nn.Module:
        options |= {"exclude": list(self.unused), "rank_pattern": self.rank_pattern}
        return disha.inject_adapters(model, ".", 2, method=method, **options)

    def adapted(self, method: str) -> nn.Module:
        return perturb(self.inject(self.model(), method))

    def close(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        limit = (1e-4 if self.single else 1e-9) * max(1.0, float(expected.detach().abs().max()))
        assert actual.dtype == expected.dtype
        assert actual.isfinite().all()
        assert (actual - expected).abs().max() <= limit


def fan_in(parameter: nn.Parameter) -> int:
    return parameter[0].numel() if parameter.dim() > 1 else 1


def train(model: nn.Module) -> nn.Module:
    """Put the model in training mode, but for batch norms, which would see other statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def images(size: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"x": torch.randn(2, 3, size, size)}


def tokens(length: int = 7, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def text() -> dict[str, Any]:
    return {"input_ids": tokens()}


def text_to_text() -> dict[str, Any]:
    return {"input_ids": tokens(8, 4), "decoder_input_ids": tokens(5, 4)}


def hugging_face(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if "text_config" in options:
        options["text_config"] = {**special, **options["text_config"]}
        special = {}
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**special, **options))


def switch_transformer() -> nn.Module:
    """A mixture of experts that are modules; its routers in the model's dtype for once."""
    model = hugging_face(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_heads=2,
        num_experts=2,
        expert_capacity=64,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    )()
    for module in model.modules():
        if isinstance(getattr(module, "classifier", None), nn.Linear):
            module.dtype = torch.float64
    return model


def swin(block: type[nn.Module], merging: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: SwinTransformer(
        patch_size=[2, 2],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
        num_classes=5,
        block=block,
        downsample_layer=merging,
    )


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


def encoder_decoder(batch_first: bool) -> Callable[[], nn.Module]:
    return lambda: nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=batch_first)


def sequences(batch_first: bool, padded: bool) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        source, target = torch.randn(2, 6, 8), torch.randn(2, 4, 8)
        if not batch_first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        if not padded:
            return {"src": source, "tgt": target}
        padding = torch.arange(6) >= torch.tensor([[6], [4]])
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        return {"src": source, "tgt": target, **masks}

    return inputs


VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8}
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

CASES = {
    "torchvision ViT": Case(
        lambda: VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5),
        images(16),
        ("conv_proj", "mlp.0", "heads", *(f"self_attention.{name}" for name in ATTENTION)),
        fused=True,
    ),
    "torchvision ResNet": Case(
        lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5),
        images(32),
        ("conv1", "layer2.0.downsample.0", "fc"),
    ),
    "torchvision Swin v2": Case(
        swin(SwinTransformerBlockV2, PatchMergingV2),
        images(16),
        ("attn.qkv", "attn.proj", "cpb_mlp.0"),
    ),
    "nn.Transformer": Case(
        encoder_decoder(False),
        sequences(False, padded=False),
        ("linear1", "linear2", *(f"attn.{name}" for name in ATTENTION)),
        fused=True,
    ),
    "nn.Transformer, padding masks": Case(
        encoder_decoder(True),
        sequences(True, padded=True),
        ("linear1", "linear2", *(f"attn.{name}" for name in ATTENTION)),
        fused=True,
    ),
    "timm ViT": Case(
        timm_model("vit_tiny_patch16_224", **VIT),
        images(16),
        ("patch_embed.proj", "attn.qkv", "mlp.fc1", "head"),
    ),
    "timm ConvNeXt": Case(
        timm_model("test_convnext"),
        images(32),
        ("stem.0", "conv_dw", "mlp.fc1", "downsample.1"),
        rank_pattern=DEPTHWISE,
    ),
    "timm EfficientNet": Case(
        timm_model("test_efficientnet"),
        images(32),
        ("conv_stem", "conv_dw", "se.conv_reduce", "classifier"),
        rank_pattern=DEPTHWISE,
    ),
    "timm BEiT": Case(
        timm_model("beit_base_patch16_224", **VIT), images(16), ("attn.qkv", "attn.proj")
    ),
    "GPT-2": Case(
        hugging_face(
            "GPT2LMHeadModel",
            "GPT2Config",
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        text,
        ("attn.c_attn", "mlp.c_proj", "wte", "wpe"),  # the head reads the block of wte
    ),
    "Llama": Case(
        hugging_face("LlamaForCausalLM", "LlamaConfig", **TOWER, num_key_value_heads=1),
        text,
        ("q_proj", "down_proj", "embed_tokens", "lm_head"),
    ),
    "T5": Case(
        hugging_face(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
        ),
        text_to_text,
        unused=SHARED,
        expected=(
            "SelfAttention.q",
            "EncDecAttention.k",
            "wo",
            "relative_attention_bias",
            "embed_tokens",
        ),
    ),
    "Whisper": Case(
        hugging_face(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            num_mel_bins=8,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_source_positions=8,
            max_target_positions=8,
            decoder_start_token_id=1,
            dropout=0.0,
        ),
        lambda: {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": tokens(5)},
        ("encoder.conv1", "encoder_attn.q_proj", "embed_positions", "fc2"),
    ),
    "CLIP": Case(
        hugging_face(
            "CLIPModel",
            "CLIPConfig",
            text_config={**TOWER, "max_position_embeddings": 8},
            vision_config={**TOWER, "image_size": 16, "patch_size": 8},
            projection_dim=16,
        ),
        lambda: {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 16, 16)},
        ("text_model.encoder", "patch_embedding", "position_embedding", "visual_projection"),
        result=lambda output: torch.cat([output.text_embeds, output.image_embeds]),
    ),
    "Mamba": Case(
        hugging_face(
            "MambaForCausalLM",
            "MambaConfig",
            hidden_size=16,
            state_size=4,
            num_hidden_layers=2,
            conv_kernel=3,
            time_step_rank=4,
        ),
        text,
        ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"),
        rank_pattern=DEPTHWISE,
        single=True,
    ),
    "Switch Transformer": Case(
        switch_transformer,
        text_to_text,
        unused=SHARED,
        single=True,
        expected=("experts.expert_0.wi", "experts.expert_1.wo", "router.classifier"),
    ),
}

PAIRS = list(zip(CASES, itertools.cycle(METHODS), strict=False))
"""Each model once, with the methods in turn.

`tests/layers/test_layouts.py` has every method for every layout."""


def blocks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: block.detach().clone() for name, block in disha.adapter_state_dict(model).items()}


def take_steps(case: Case, model: nn.Module, count: int = 3) -> list[float]:
    optimizer = torch.optim.Adam(disha.adapter_parameters(model), lr=1e-3)
    generator, losses = torch.Generator().manual_seed(2), []
    for _ in range(count):
        optimizer.zero_grad()
        output = case.output(model)
        target = torch.randn(output.shape, generator=generator, dtype=output.dtype)
        generator.manual_seed(2)
        loss = (output - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "method"), PAIRS)
class TestWholeModel:
    def test_injection_changes_nothing(self, name, method):
        case = CASES[name]
        model = case.model()
        with_gradients = case.output(model)
        with torch.no_grad():
            without = case.output(model)
        # Not frozen: torch chooses another attention kernel for a bias without gradients.
        case.inject(model, method, freeze=False)
        layers = [row.name for row in disha.summary(model).layers]
        assert all(any(part in layer for layer in layers) for part in case.expected), layers
        agree = case.close if case.fused else assert_same
        agree(case.output(model), with_gradients)
        with torch.no_grad():
            agree(case.output(model), without)

    def test_every_block_moves(self, name, method):
        case = CASES[name]
        model = case.model()
        base = {key: value.clone() for key, value in model.state_dict().items()}
        case.inject(model, method)
        before = blocks(model)
        losses = take_steps(case, model if case.fused else train(model))
        assert losses[-1] < losses[0]
        after = blocks(model)
        moved = {key: float((after[key] - before[key]).abs().max()) for key in before}
        # Adam moves by about its rate whatever has a gradient, and by next to nothing what has
        # only rounding noise.
        assert {key: size for key, size in moved.items() if size < 1e-4} == {}
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in base.items())

    def test_every_mode_sees_the_adapter(self, name, method):
        case = CASES[name]
        model = case.adapted(method)
        expected = case.output(train(model))
        with disha.adapters_disabled(model):
            assert (case.output(model) - expected).abs().max() > 1e-3
        model.eval()
        case.close(case.output(model), expected)
        with torch.no_grad():
            case.close(case.output(model), expected)
        with torch.inference_mode():
            case.close(case.output(model), expected)

    def test_a_file_into_a_fresh_base_gives_equal_outputs_and_goes(self, name, method, tmp_path):
        case = CASES[name]
        model = case.adapted(method)
        disha.save_adapter(model, tmp_path / "a")
        fresh = case.model()
        base = case.output(fresh)
        before = snapshot(fresh)
        disha.load_adapter(fresh, tmp_path / "a")
        assert torch.equal(case.output(fresh), case.output(model))
        assert blocks(fresh).keys() == blocks(model).keys()
        disha.remove_adapters(fresh)
        assert_unchanged(fresh, before)
        assert torch.equal(case.output(fresh), base)

    def test_merged_is_unmerged_and_comes_back_bit_for_bit(self, name, method):
        case = CASES[name]
        model = case.adapted(method)
        expected = case.output(model)
        before = snapshot(model)
        disha.merge_adapters(model, untie=True)
        case.close(case.output(model), expected)
        with torch.no_grad():
            case.close(case.output(model), expected)
        disha.unmerge_adapters(model)
        assert_unchanged(model, before)
        assert torch.equal(case.output(model), expected)
