"""LoRA files of image models: the real `diffusers` loads them and computes what the adapter does.

For kohya's programs, the oracle is the reader of their files in `diffusers`. For ComfyUI, it is a
table of the keys that it looks for, and its rule: W + alpha / rank * up @ down.
"""

from __future__ import annotations

import copy
import json
import re

import peft
import pytest
import torch
from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import nn

import disha
from disha.files.contents import adapter_contents, read_contents
from disha.interop import image_lora, lora
from disha.model import ModelView
from tests.conftest import assert_unchanged, perturb, snapshot
from tests.image_models import FLUX, IMAGE_MODELS, PIXART, SD3, UNET, text_encoder

EVERY = r"to_|ff|proj|conv|linear|embedder|fc"
BLOCKS = r"(down_blocks|mid_block|up_blocks)\..*(to_|ff\.|proj|conv)"
"""The layers of a UNet that kohya's programs adapt."""

FLUX_BLOCKS = r"transformer_blocks\."
TOKENS = torch.arange(10).view(1, 10)


def adapted(base, target=EVERY, r=2, **options):
    model = disha.inject_adapters(copy.deepcopy(base), target, r, **options)
    perturb(model)
    for block in disha.adapter_parameters(model):
        block.data.mul_(0.1)
    return model


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def applied(base, path, weight_of):
    """Add alpha / rank * up @ down to the weights of a model, as ComfyUI does with each key.

    Args:
        base: the model; changed.
        path: the file.
        weight_of: returns the weight, or the rows of one, for a key without its end.
    """
    tensors = load_file(path)
    ups = (".lora_up.weight", ".lora_B.weight")
    for key, up in tensors.items():
        if key.endswith(ups):
            name = key.removesuffix(ups[0]).removesuffix(ups[1])
            down = tensors.get(f"{name}.lora_down.weight", tensors.get(f"{name}.lora_A.weight"))
            weight = weight_of(name)
            scale = tensors[f"{name}.alpha"].item() / down.shape[0]
            with torch.no_grad():
                weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return base


def by_underscores(model):
    """Return the function from a key of kohya to the weight of a UNet."""
    weights = {
        "lora_unet_" + name.removesuffix(".weight").replace(".", "_"): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".weight")
    }
    return weights.__getitem__


# --- diffusers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("kind", [UNET, FLUX, SD3], ids=["unet", "flux", "sd3"])
def test_diffusers_loads_it_and_computes_the_same(tmp_path, kind, scale):
    base, path = kind.model(), tmp_path / "lora.safetensors"
    ours = adapted(base, scale=scale, rank_pattern={"to_k": 4})
    expected = kind.run(ours)
    assert not torch.allclose(expected, kind.run(base), atol=1e-2)
    report = image_lora.export(ours, path)
    assert report.error == 0
    # load_lora_adapter reads the metadata of a file only if it is told that it is safetensors
    for source, options in ((path, {}), (path, {"use_safetensors": True}), (load_file(path), {})):
        theirs = copy.deepcopy(base)
        theirs.load_lora_adapter(
            str(source) if source is path else source, prefix=kind.component, **options
        )
        close(kind.run(theirs.eval()), expected)
    back = copy.deepcopy(base)
    image_lora.load(back, path)
    close(kind.run(back), expected)
    assert scale != 1 or torch.equal(kind.run(back), expected)


def test_one_file_for_a_pipeline(tmp_path):
    base = {
        "unet": UNET.model(),
        "text_encoder": text_encoder(),
        "text_encoder_2": text_encoder(projection=True),
        "vae": nn.Linear(2, 2),
        "scheduler": None,
    }
    ours = copy.deepcopy(base)
    ours["unet"] = adapted(base["unet"], BLOCKS)
    for name in ("text_encoder", "text_encoder_2"):
        ours[name] = adapted(base[name], "k_proj|fc", scale=0.5, rank_pattern={"fc1": 4})
    path = tmp_path / "lora.safetensors"
    image_lora.export(ours, path)
    state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(path), return_lora_metadata=True
    )
    for given in (metadata, None):
        theirs = copy.deepcopy(base)
        for name in ("text_encoder", "text_encoder_2"):
            StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
                state, alphas, theirs[name], prefix=name, metadata=given
            )
            found, expected = theirs[name](TOKENS)[0], ours[name](TOKENS)[0]
            assert not torch.allclose(expected, base[name](TOKENS)[0], atol=1e-3)
            close(found, expected)
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(
            state, alphas, theirs["unet"], metadata=given
        )
        close(UNET.run(theirs["unet"]), UNET.run(ours["unet"]))

    image_lora.export(ours, path, "kohya")
    prefixes = {re.match("lora_[a-z0-9]+", key)[0] for key in load_file(path)}
    assert prefixes == {"lora_unet", "lora_te1", "lora_te2"}
    back = copy.deepcopy(base)
    report = image_lora.load(back, path)
    assert "text_encoder.encoder.layers.0.mlp.fc1.bone_block" in report.matched
    for name in ("text_encoder", "text_encoder_2"):
        assert torch.equal(back[name](TOKENS)[0], ours[name](TOKENS)[0])


def test_pixart_has_no_loader_in_diffusers_and_peft_loads_it(tmp_path):
    base = PIXART.model()
    ours = adapted(base, scale=0.7)
    with pytest.raises(disha.ConversionError, match="can't load a LoRA into a PixArt"):
        image_lora.export(ours, tmp_path / "lora.safetensors")
    lora.export(ours, tmp_path / "folder")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "folder")).eval()
    close(PIXART.run(theirs), PIXART.run(ours))


def test_sixteen_bits_stay_unless_the_scale_would_be_rounded(tmp_path):
    path, base = tmp_path / "lora.safetensors", nn.Sequential(nn.Linear(8, 8)).bfloat16()
    for scale, dtype in ((0.5, torch.bfloat16), (0.7, torch.float32)):
        ours = adapted(base, "0", scale=scale)
        image_lora.export({"unet": ours}, path)
        block = ours[0].disha["default"].block.detach().double()
        b = load_file(path)["unet.0.lora_B.weight"]
        assert b.dtype == dtype
        close(b.double(), scale * block.T, 1e-7)


# --- kohya ---------------------------------------------------------------------------------------


def test_kohya_through_the_converter_of_diffusers(tmp_path):
    base, path = UNET.model(), tmp_path / "lora.safetensors"
    ours = adapted(
        base, r"(down_blocks|mid_block|up_blocks)\..*(to_|ff\.|proj|shortcut)", scale=0.7
    )
    image_lora.export(ours, path, "kohya")
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(path))
    theirs = copy.deepcopy(base)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, network_alphas=alphas, unet=theirs)
    close(UNET.run(theirs), UNET.run(ours))


def test_kohya_keeps_the_alpha_of_each_layer(tmp_path):
    base, path = UNET.model(), tmp_path / "lora.safetensors"
    ours = adapted(base, BLOCKS, scale=0.7, rank_pattern={"to_k": 4})
    image_lora.export(torch.compile(ours), path, "kohya")  # the wrapper counts for nothing
    merged = copy.deepcopy(base)
    applied(merged, path, by_underscores(merged))
    close(UNET.run(merged), UNET.run(ours))
    tensors = load_file(path)
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert tensors[f"{conv}.lora_down.weight"].shape == (18, 8, 3, 3)
    assert tensors[f"{conv}.lora_up.weight"].shape == (8, 18, 1, 1)
    assert tensors[f"{conv}.alpha"].item() == 0.7 * 18
    back = copy.deepcopy(base)
    image_lora.load(back, path)
    assert torch.equal(UNET.run(back), UNET.run(ours))
    [scale] = {block.scale for block in blocks_of(back)}
    assert scale == 0.7


def blocks_of(model):
    return [
        layer.disha["default"] for layer in model.modules() if isinstance(layer, disha.AdaptedLayer)
    ]


def bone_file(path, ranks, size=3072):
    """Write a diffusers file of Flux with Bone factors, without a model; return B A x by layer."""
    torch.manual_seed(0)
    x, tensors, outputs = torch.randn(5 * size), {}, {}
    for name, r in ranks.items():
        inputs = 5 * size if name.endswith("proj_out") else size
        rows = 4 * size if name.endswith("proj_mlp") else size
        a = torch.eye(r).repeat(1, inputs // r)
        b = torch.randn(rows, r)
        tensors[f"transformer.{name}.lora_A.weight"] = a
        tensors[f"transformer.{name}.lora_B.weight"] = b
        outputs[name] = b @ (a @ x[:inputs])
    save_file(tensors, path)
    return x, outputs


SINGLE, DOUBLE = "single_transformer_blocks.37", "transformer_blocks.18"


@pytest.mark.parametrize(
    "ranks",
    [
        {f"{SINGLE}.attn.to_q": 2, f"{SINGLE}.attn.to_k": 2, f"{SINGLE}.attn.to_v": 2}
        | {f"{SINGLE}.proj_mlp": 2, f"{SINGLE}.proj_out": 2},
        {f"{SINGLE}.attn.to_q": 1, f"{SINGLE}.attn.to_v": 3, f"{SINGLE}.proj_mlp": 2}
        | {f"{DOUBLE}.attn.add_k_proj": 3, f"{DOUBLE}.attn.to_add_out": 2},
    ],
    ids=["shared", "blocks"],
)
def test_flux_of_kohya_through_the_converter_of_diffusers(tmp_path, ranks):
    path, kohya = tmp_path / "flux.safetensors", tmp_path / "kohya.safetensors"
    x, expected = bone_file(path, ranks)
    image_lora.write_file(kohya, image_lora.read_file(path), "kohya")
    found = FluxLoraLoaderMixin.lora_state_dict(str(kohya))
    for key, a in found.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            y = found[key.replace("lora_A", "lora_B")] @ (a @ x[: a.shape[1]])
            close(y, expected.pop(name, torch.zeros_like(y)), 1e-3)
    assert not expected
    down = load_file(kohya)["lora_unet_single_blocks_37_linear1.lora_down.weight"]
    assert down.shape[0] == (
        2 if len(set(ranks.values())) == 1 else 6
    )  # a shared A, or all of them
    back = image_lora.read_file(kohya)["transformer"][1]
    again = image_lora.read_file(path)["transformer"][1]
    assert back.keys() == again.keys()
    assert all(torch.equal(back[name], again[name]) for name in again)


@pytest.mark.parametrize("rank", [2, 3])
def test_layers_that_flux_joins_are_not_rounded_to_the_dtype_of_the_first(tmp_path, rank):
    bone_file(tmp_path / "flux", {f"{SINGLE}.attn.to_q": 2, f"{SINGLE}.attn.to_k": rank})
    header, blocks = image_lora.read_file(tmp_path / "flux")["transformer"]
    blocks = {key: b.bfloat16() if "to_q" in key else b.float() for key, b in blocks.items()}
    image_lora.write_file(tmp_path / "kohya", {"transformer": (header, blocks)}, "kohya")
    back = image_lora.read_file(tmp_path / "kohya")["transformer"][1]
    assert back.keys() == blocks.keys()
    assert all(torch.equal(back[key], block.float()) for key, block in blocks.items())


def test_a_whole_flux_as_kohya_and_back(tmp_path):
    base, path = FLUX.model(), tmp_path / "lora.safetensors"
    for ours in (
        adapted(base, FLUX_BLOCKS, scale=0.7, rank_pattern={"to_k|add_v": 4}),
        disha.inject_adapters(copy.deepcopy(base), FLUX_BLOCKS, 2),  # untrained: B is zero
    ):
        image_lora.export(ours, path, "kohya")
        back = copy.deepcopy(base)
        image_lora.load(back, path)
        assert len(blocks_of(back)) == len(blocks_of(ours))
        assert torch.equal(FLUX.run(back), FLUX.run(ours))


def test_what_kohya_can_not_hold(tmp_path):
    path = tmp_path / "lora.safetensors"
    for base, target, message in (
        (UNET.model(), "conv_in|to_q", r"kohya has no key for 1 layer \(unet\.conv_in\)"),
        (FLUX.model(), "x_embedder|to_q", r"no key for 1 layer \(transformer\.x_embedder\)"),
        (SD3.model(), "to_q", "not known for a SD3Transformer2DModel"),
    ):
        with pytest.raises(disha.ConversionError, match=message):
            image_lora.export(adapted(base, target), path, "kohya")
    contents = adapter_contents(ModelView(adapted(SD3.model(), "to_q")))
    with pytest.raises(disha.ConversionError, match="may be Flux or Stable Diffusion 3"):
        image_lora.write_file(path, {"transformer": contents}, "kohya")
    flux = adapted(FLUX.model(), "single.*to_[qk]")
    blocks_of(flux)[0].set_scale(2.0)
    with pytest.raises(disha.ConversionError, match="their scales differ"):
        image_lora.export(flux, path, "kohya")
    assert not path.exists()


# --- ComfyUI -------------------------------------------------------------------------------------

RESNET = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
ATTENTION = ("attn1", "attn2")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out_0")


def comfyui_unet_keys():
    """Return the keys of layers that ComfyUI looks for in a UNet of two blocks with one layer.

    These are the keys that its functions unet_to_diffusers (comfy/utils.py) and
    model_lora_keys_unet (comfy/lora.py) give, without those of norms.
    """
    keys = ["conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2"]
    keys += ["down_blocks_0_downsamplers_0_conv", "up_blocks_0_upsamplers_0_conv"]
    resnets = ["down_blocks_0_resnets_0", "down_blocks_1_resnets_0"]
    resnets += [f"up_blocks_{x}_resnets_{i}" for x in (0, 1) for i in (0, 1)]
    resnets += ["mid_block_resnets_0", "mid_block_resnets_1"]
    keys += [f"{resnet}_{layer}" for resnet in resnets for layer in RESNET]
    attentions = ["down_blocks_0_attentions_0", "mid_block_attentions_0"]
    attentions += ["up_blocks_1_attentions_0", "up_blocks_1_attentions_1"]
    for attention in attentions:
        block = f"{attention}_transformer_blocks_0"
        keys += [f"{attention}_proj_in", f"{attention}_proj_out"]
        keys += [f"{block}_{attn}_{layer}" for attn in ATTENTION for layer in PROJECTIONS]
        keys += [f"{block}_ff_net_0_proj", f"{block}_ff_net_2"]
    return {f"lora_unet_{key}" for key in keys}


def test_comfyui_knows_every_key_of_a_unet(tmp_path):
    base, path = UNET.model(), tmp_path / "lora.safetensors"
    ours = adapted(base, scale=0.7)
    image_lora.export(ours, path, "comfyui")
    keys = {key.partition(".")[0] for key in load_file(path)}
    assert len(keys) == len(blocks_of(ours)) == 83
    assert keys <= comfyui_unet_keys()
    merged = copy.deepcopy(base)
    close(UNET.run(applied(merged, path, by_underscores(merged))), UNET.run(ours))


JOINT = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj"]
JOINT += ["attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2"]
JOINT += ["ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear"]
COMFYUI_TRANSFORMERS = {
    "flux": {f"transformer_blocks.0.{layer}" for layer in JOINT}
    | {f"single_transformer_blocks.0.attn.{layer}" for layer in ("to_q", "to_k", "to_v")}
    | {f"single_transformer_blocks.0.{one}" for one in ("proj_mlp", "proj_out", "norm.linear")}
    | {"x_embedder", "context_embedder", "norm_out.linear", "proj_out"}
    | {
        f"time_text_embed.{one}_embedder.linear_{n}" for one in ("timestep", "text") for n in (1, 2)
    },
    "sd3": {f"transformer_blocks.{n}.{layer}" for n in (0, 1) for layer in JOINT}
    | {"pos_embed.proj", "context_embedder", "norm_out.linear", "proj_out"}
    | {
        f"time_text_embed.{one}_embedder.linear_{n}" for one in ("timestep", "text") for n in (1, 2)
    },
    "pixart": {f"transformer_blocks.0.attn{n}.to_{one}" for n in (1, 2) for one in "qkv"}
    | {f"transformer_blocks.0.{one}" for one in ("attn1.to_out.0", "attn2.to_out.0")}
    | {"transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2", "pos_embed.proj"}
    | {"adaln_single.linear", "caption_projection.linear_1", "caption_projection.linear_2"}
    | {f"adaln_single.emb.timestep_embedder.linear_{n}" for n in (1, 2)}
    | {"proj_out"},
}
"""The layers that flux_to_diffusers, mmdit_to_diffusers and pixart_to_diffusers of ComfyUI name."""


@pytest.mark.parametrize("name", list(COMFYUI_TRANSFORMERS))
def test_comfyui_knows_every_key_of_a_transformer(tmp_path, name):
    kind, path = IMAGE_MODELS[name], tmp_path / "lora.safetensors"
    base = kind.model()
    ours = adapted(base, scale=0.7)
    image_lora.export(ours, path, "comfyui")
    keys = {
        re.sub(r"\.(alpha|lora_[AB]\.weight)$", "", key.removeprefix("transformer."))
        for key in load_file(path)
    }
    assert len(keys) == len(blocks_of(ours))
    assert keys <= COMFYUI_TRANSFORMERS[name]
    merged = copy.deepcopy(base)
    weights = dict(merged.named_parameters())
    applied(merged, path, lambda key: weights[f"{key.removeprefix('transformer.')}.weight"])
    close(kind.run(merged), kind.run(ours))
    back = copy.deepcopy(base)
    image_lora.load(back, path)
    assert torch.equal(kind.run(back), kind.run(ours))


# --- BAT, and what can't be written --------------------------------------------------------------


def test_bat_is_cut_to_a_rank(tmp_path):
    base, path = UNET.model(), tmp_path / "lora.safetensors"
    ours = adapted(base, "to_q|conv1", 4, method="bat")
    with pytest.raises(disha.ArgumentError, match="give `rank`"):
        image_lora.export(ours, path)
    with pytest.raises(disha.ConversionError, match="would lose more than max_error"):
        image_lora.export(ours, path, rank=1, max_error=0.01)
    assert not path.exists()
    assert image_lora.export(ours, path, rank=16).error < 1e-5
    theirs = copy.deepcopy(base)
    theirs.load_lora_adapter(str(path), prefix="unet")
    close(UNET.run(theirs.eval()), UNET.run(ours), 1e-4)
    with pytest.raises(disha.ConversionError, match="is not a Bone adapter"):
        image_lora.read_file(path)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), {}, "groups=2"),
        (nn.Conv2d(8, 8, 3, dilation=2), {}, "is dilated"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), {}, "padding_mode='circular'"),
        (nn.ConvTranspose2d(8, 8, 3), {}, "does not know a ConvTranspose2d"),
        (nn.Embedding(8, 8), {}, "'index out'"),
        (nn.Linear(8, 8), {"also_train": "norm"}, r"trained with the blocks \(norm.bias"),
    ],
)
def test_what_no_form_can_hold(tmp_path, layer, options, message):
    model = nn.ModuleDict({"layer": layer, "norm": nn.LayerNorm(8)})
    ours = adapted(model, "layer", **options)
    for form in ("diffusers", "kohya", "comfyui"):
        with pytest.raises(disha.ConversionError, match=message if form == "diffusers" else "."):
            image_lora.export({"unet": ours}, tmp_path / "lora.safetensors", form)
    assert list(tmp_path.iterdir()) == []


def test_the_model_itself_has_no_key(tmp_path):
    model = disha.inject_adapters(nn.Linear(8, 8), "all-linear", 2)
    contents = adapter_contents(ModelView(model))
    for form in ("diffusers", "kohya", "comfyui"):
        with pytest.raises(disha.ConversionError, match="has no key for 1 layer"):
            image_lora.write_file(tmp_path / "lora.safetensors", {"unet": contents}, form)
    assert list(tmp_path.iterdir()) == []


class TinyUNet(nn.Sequential):
    pass


def test_wrong_arguments(tmp_path):
    path, ours = tmp_path / "lora.safetensors", adapted(nn.Sequential(nn.Linear(8, 8)), "0")
    unet = adapted(TinyUNet(nn.Linear(8, 8)), "0")
    for models, options, message in (
        ({"unet": ours}, {"form": "a1111"}, "unknown form 'a1111'; allowed are diffusers, kohya"),
        ({"vae": ours}, {}, "no component 'vae'; allowed are unet, transformer"),
        ({"transformer": unet}, {}, "a TinyUNet is not a transformer.*; name the component unet"),
        (ours, {}, "a Sequential does not show which component it is"),
        ({"unet": ours}, {"adapter": "style"}, "no adapter 'style'"),
        ({"scheduler": None}, {}, "holds no nn.Module"),
        ([ours], {}, "a mapping from components"),
    ):
        with pytest.raises(disha.DishaError, match=message):
            image_lora.export(models, path, **options)
    assert not path.exists()


# --- bad files -----------------------------------------------------------------------------------

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
KEY = "lora_unet_down_blocks_0_resnets_0_conv1"
A, B = torch.eye(2).repeat(1, 4), torch.randn(8, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{KEY}.lokr_w1": A, f"{KEY}.lokr_w2": B}, "another method than LoRA .*lokr_w1"),
        ({f"{KEY}.hada_w1_a": A, f"{KEY}.alpha": B[0, 0]}, "another method than LoRA .*hada_w1_a"),
        ({f"{KEY}.lora_down.weight": A, f"{KEY}.dora_scale": B}, "another method .*dora_scale"),
        ({"unet.a.lora_A.weight": A, "unet.a.lora_magnitude_vector": B}, "another method"),
        ({"unet.a.processor.to_q_lora.down.weight": A}, "old versions of diffusers"),
        ({"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": A}, "unknown keys .*input_blocks"),
        ({"diffusion_model.blocks.0.lora_A.weight": A}, "unknown keys .*another architecture"),
        ({f"{QKV}.lora_down.weight": A, f"{QKV}.lora_up.weight": B}, "B has 8 rows; in Flux, it"),
        ({"base_model.model.a.lora_A.weight": A}, "is a file of a folder .* name the folder"),
        ({"unet..lora_A.weight": A, "unet..lora_B.weight": B}, r"unknown keys .*unet\.\.lora_A"),
        ({f"{KEY}.lora_down.weight": A}, "has only .*lora_down.weight, and a LoRA has two factors"),
        ({"unet.a.lora_A.weight": A, "unet.a.lora_B.weight": B.T}, r"shapes \(2, 8\) and \(2, 8\)"),
        ({"unet.a.lora_A.weight": A, "unet.a.lora_B.weight": B * torch.nan}, "not finite"),
        ({"unet.a.lora_A.weight": A * 2, "unet.a.lora_B.weight": B}, "is not a Bone adapter"),
        (
            {"unet.a.lora_A.weight": A, "unet.a.lora_B.weight": B, "unet.a.alpha": B[0]},
            "alpha must be one number",
        ),
        (
            {"unet.a.lora_A.weight": A, "unet.a.lora_B.weight": B, "unet.a.alpha": B[0, 0] / 0},
            "unet.a.alpha",
        ),
        (
            {
                "unet.a.lora_A.weight": A,
                "unet.a.lora_B.weight": B,
                "unet.a.alpha": torch.tensor(1 + 2j),
            },
            "alpha must be one number, and real; .* its dtype torch.complex64",
        ),
        (
            {
                "unet.a.lora_A.weight": A,
                "unet.a.lora_B.weight": B,
                "unet.a.lora_up.weight": 2 * B,
            },
            "unet.a.lora_B.weight and unet.a.lora_up.weight are the same factor of one layer",
        ),
        (
            {
                "unet.conv_in.lora_A.weight": A,
                "unet.conv_in.lora_B.weight": B,
                "lora_unet_conv_in.lora_down.weight": A,
                "lora_unet_conv_in.lora_up.weight": 2 * B,
            },
            "several tensors, under different names, for conv_in.bone_block",
        ),
    ],
)
def test_files_that_can_not_be_read(tmp_path, tensors, message):
    path = tmp_path / "lora.safetensors"
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
    with pytest.raises(disha.DishaError, match=message) as caught:
        image_lora.read_file(path)
    assert str(path) in str(caught.value)
    assert ("PEFT" in str(caught.value)) == ("folder" in message)


def test_a_layer_without_alpha_has_the_scale_1_as_in_diffusers(tmp_path):
    base, path = UNET.model(), tmp_path / "lora.safetensors"
    image_lora.export(adapted(base, "to_q", scale=0.7), path, "kohya")
    kept = {key: one for key, one in load_file(path).items() if not key.endswith(".alpha")}
    save_file(kept, path)
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(path))
    assert not alphas
    theirs, back = copy.deepcopy(base), copy.deepcopy(base)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, network_alphas=alphas, unet=theirs)
    image_lora.load(back, path)
    close(UNET.run(back), UNET.run(theirs))


def test_the_alpha_in_the_metadata_of_a_diffusers_file_counts(tmp_path):
    path = tmp_path / "lora.safetensors"
    settings = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"b": 1}}
    tensors = {
        f"unet.{n}.lora_{k}.weight": t.clone() for n in "ab" for k, t in (("A", A), ("B", B))
    }
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings)})
    header = image_lora.read_file(path)["unet"][0]
    assert [(layer.name, layer.scale) for layer in header.layers] == [("a", 2.0), ("b", 0.5)]


def test_all_models_or_none(tmp_path):
    models = {"unet": UNET.model(), "text_encoder": text_encoder()}
    ours = {
        "unet": adapted(models["unet"], "to_q"),
        "text_encoder": adapted(models["text_encoder"], "fc1"),
    }
    path = tmp_path / "lora.safetensors"
    image_lora.export(ours, path)
    with pytest.raises(disha.ArgumentError, match=r"holds unet, text_encoder, and .* no text_enc"):
        image_lora.load(models["unet"], path)
    models["text_encoder"].encoder.layers[0].mlp.fc1 = nn.Linear(16, 25)
    before = {name: snapshot(model) for name, model in models.items()}
    with pytest.raises(disha.AdapterFileError, match="fc1"):
        image_lora.load(models, path)
    for name, model in models.items():
        assert_unchanged(model, before[name])
    with pytest.raises(disha.DishaError, match="to_q"):
        image_lora.load({"unet": FLUX.model(), "text_encoder": text_encoder()}, path)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_converts_both_ways(tmp_path, capsys):
    from disha.cli import main

    adapter, back = tmp_path / "adapter.safetensors", tmp_path / "back.safetensors"
    disha.save_adapter(adapted(UNET.model(), BLOCKS, scale=0.5), adapter)
    expected = read_contents(adapter)
    for form in ("diffusers", "kohya"):
        out = tmp_path / f"{form}.safetensors"
        command = ["convert", str(adapter), str(out), "--to", form, "--component", "unet"]
        assert main(command) == 0
        assert f"({form})" in capsys.readouterr().out
        command = ["convert", str(out), str(back), "--to", "disha", "--overwrite"]
        assert main(command) == 0
        header, tensors = read_contents(back)
        scale = 1.0 if form != "diffusers" else 0.5  # there, B has the scale
        assert tensors.keys() == expected[1].keys()
        assert all(torch.equal(tensors[key], scale * expected[1][key]) for key in tensors)
        assert {layer.scale for layer in header.layers} == {0.5 / scale}


def test_the_command_asks_for_a_component(tmp_path, capsys):
    from disha.cli import main

    path, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    models = {"unet": adapted(UNET.model(), "to_q"), "text_encoder": adapted(text_encoder(), "fc1")}
    image_lora.export(models, path)
    command = ["convert", str(path), str(out), "--to", "disha"]
    assert main(command) == 2
    assert "holds unet, text_encoder; choose one with --component" in capsys.readouterr().err
    assert main([*command, "--component", "text_encoder"]) == 0
    back = text_encoder()
    disha.load_adapter(back, out)
    assert torch.equal(back(TOKENS)[0], models["text_encoder"](TOKENS)[0])
    disha.save_adapter(adapted(nn.Sequential(nn.Linear(8, 8)), "0"), out)
    command = ["convert", str(out), str(tmp_path / "x"), "--to", "diffusers"]
    assert main(command) == 2
    assert "component" in capsys.readouterr().err
    assert main([*command, "--component", "unet"]) == 0


def test_the_command_cuts_bat_to_a_rank_with_a_base(tmp_path, capsys):
    from disha.cli import main

    base, path = UNET.model(), tmp_path / "bat.safetensors"
    base.save_pretrained(tmp_path / "unet")
    ours = adapted(base, "to_q|conv1", 4, method="bat")
    disha.save_adapter(ours, path)
    out = tmp_path / "lora.safetensors"
    command = ["convert", str(path), str(out), "--to", "diffusers", "--component", "unet"]
    assert main(command) == 2
    assert "give --base and --rank" in capsys.readouterr().err
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    assert main([*command, "--rank", "16", "--base", str(weights)]) == 0
    theirs = copy.deepcopy(base)
    theirs.load_lora_adapter(str(out), prefix="unet")
    close(UNET.run(theirs.eval()), UNET.run(ours), 1e-4)


# --- the models themselves -----------------------------------------------------------------------


@pytest.mark.parametrize("name", list(IMAGE_MODELS))
def test_adapters_act_and_train_in_image_models(name):
    accelerate = pytest.importorskip("accelerate")
    kind = IMAGE_MODELS[name]
    model = adapted(kind.model())
    expected = kind.run(model)

    def gradients():
        model.zero_grad()
        kind.run(model).square().mean().backward()
        return [block.block.grad for block in blocks_of(model)]

    plain = gradients()
    unused = 1 if name == "sd3" else 0  # its last block computes queries of the text, unused
    assert sum(bool(grad.any()) for grad in plain) == len(plain) - unused
    model.enable_gradient_checkpointing()
    assert all(map(torch.equal, gradients(), plain))
    model.fuse_qkv_projections()  # a copy of the weights with their updates, as they are now
    close(kind.run(model), expected)
    model.unfuse_qkv_projections()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(kind.run(model), expected)
