"""LoRA files of image models: the real `diffusers` loads them and computes what the adapter does.

For kohya's programs, the oracle is the reader of their files in `diffusers`, and the rule of these
programs: W + alpha / rank * up @ down.
"""

import copy
import re

import peft
import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file
from torch import nn

import disha
from disha.cli import main
from disha.files.contents import read_contents
from disha.files.saving import adapter_contents
from disha.interop import image_lora, lora
from disha.model.view import ModelView
from tests.conftest import assert_same, assert_unchanged, perturb, snapshot
from tests.image_models import FLUX, IMAGE_MODELS, PIXART, SD3, UNET, text_encoder
from tests.peft_models import refused_export

EVERY = r"to_|ff|proj|conv|linear|embedder|fc"
BLOCKS = r"(down_blocks|mid_block|up_blocks)\..*(to_|ff\.|proj|conv)"
"""The layers of a UNet that kohya's programs adapt."""

FLUX_BLOCKS = r"transformer_blocks\."
TOKENS = torch.arange(10).view(1, 10)


def adapted(base, target=EVERY, r=2, **options):
    model = perturb(disha.inject_adapters(copy.deepcopy(base), target, r, **options))
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
    report = image_lora.export({kind.component: ours}, path)
    assert report.error == 0
    # load_lora_adapter reads the metadata of a file only if it is told that it is safetensors
    for source, options in ((path, {}), (path, {"use_safetensors": True}), (load_file(path), {})):
        theirs = copy.deepcopy(base)
        theirs.load_lora_adapter(
            str(source) if source is path else source, prefix=kind.component, **options
        )
        close(kind.run(theirs.eval()), expected)
    back = copy.deepcopy(base)
    image_lora.load({kind.component: back}, path)
    close(kind.run(back), expected)
    assert scale != 1 or torch.equal(kind.run(back), expected)


@pytest.fixture
def pipeline(tmp_path):
    """The models of a pipeline, plain and adapted, and the one file of its adapters."""
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
    return base, ours, path


def test_diffusers_loads_the_file_of_a_pipeline(pipeline):
    base, ours, path = pipeline
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(path))
    theirs = copy.deepcopy(base)
    for name in ("text_encoder", "text_encoder_2"):
        StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
            state, alphas, theirs[name], prefix=name
        )
        found, expected = theirs[name](TOKENS)[0], ours[name](TOKENS)[0]
        assert not torch.allclose(expected, base[name](TOKENS)[0], atol=1e-3)
        close(found, expected)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, theirs["unet"])
    close(UNET.run(theirs["unet"]), UNET.run(ours["unet"]))


def test_the_file_of_a_pipeline_comes_back(pipeline):
    base, ours, path = pipeline
    back = copy.deepcopy(base)
    image_lora.load(back, path)
    close(UNET.run(back["unet"]), UNET.run(ours["unet"]))


def test_the_file_of_a_pipeline_has_the_prefixes_of_kohya(pipeline):
    _, _, path = pipeline
    to_kohya(path)
    prefixes = {re.match("lora_[a-z0-9]+", key)[0] for key in load_file(path)}
    assert prefixes == {"lora_unet", "lora_te1", "lora_te2"}


def test_pixart_has_no_loader_in_diffusers_and_peft_loads_it(tmp_path):
    base = PIXART.model()
    ours = adapted(base, scale=0.7)
    lora.export(ours, tmp_path / "folder")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "folder")).eval()
    close(PIXART.run(theirs), PIXART.run(ours))


def test_sixteen_bits_stay_unless_the_scale_would_be_rounded(tmp_path):
    path, base = tmp_path / "lora.safetensors", nn.Sequential(nn.Linear(8, 8)).bfloat16()
    for scale, dtype in ((0.5, torch.bfloat16), (0.7, torch.float32)):
        ours = adapted(base, "0", scale=scale, dtype=torch.bfloat16)
        image_lora.export({"unet": ours}, path)
        block = ours[0].disha["default"].block.detach().double()
        b = load_file(path)["unet.0.lora_B.weight"]
        assert b.dtype == dtype
        close(b.double(), scale * block.T, 1e-7)


# --- kohya's programs, by the converters of diffusers --------------------------------------------


def to_kohya(path):
    save_file(convert_state_dict_to_kohya(load_file(path)), path)


def test_kohya_through_the_converters_of_diffusers_and_back(tmp_path):
    base, path = UNET.model(), tmp_path / "lora.safetensors"
    ours = adapted(base, EVERY, scale=0.7, rank_pattern={"to_k": 4})
    image_lora.export({"unet": torch.compile(ours)}, path)  # the wrapper counts for nothing
    to_kohya(path)
    merged = copy.deepcopy(base)
    applied(merged, path, by_underscores(merged))
    close(UNET.run(merged), UNET.run(ours))
    tensors = load_file(path)
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert tensors[f"{conv}.lora_down.weight"].shape == (18, 8, 3, 3)
    assert tensors[f"{conv}.lora_up.weight"].shape == (8, 18, 1, 1)
    assert tensors[f"{conv}.alpha"].item() == 18
    state, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(str(path))
    save_file(convert_unet_state_dict_to_peft(state), path)
    back = copy.deepcopy(base)
    image_lora.load({"unet": back}, path)
    close(UNET.run(back), UNET.run(ours))


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_trained_file_of_kohya(tmp_path, component):
    base, path = UNET.model() if component == "unet" else text_encoder(), tmp_path / "kohya"
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)][:4]
    start = "lora_unet_" if component == "unet" else "lora_te_text_model_"
    tensors = {}
    for name in names:
        key, layer = start + name.replace(".", "_"), base.get_submodule(name)
        tensors[f"{key}.lora_down.weight"] = torch.randn(3, layer.in_features)
        tensors[f"{key}.lora_up.weight"] = torch.randn(layer.out_features, 3)
        tensors[f"{key}.alpha"] = torch.tensor(1.5)
    save_file(tensors, path)
    one, other = copy.deepcopy(base), copy.deepcopy(base)
    image_lora.load({component: one}, path)
    disha.load_adapter(other, path)
    for name in names:
        key = start + name.replace(".", "_")
        delta = 0.5 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
        for model in (one, other):
            close(model.get_submodule(name).weight + 0, base.get_submodule(name).weight + delta)


# --- BAT, and what can't be written --------------------------------------------------------------


def test_bat_is_cut_to_a_rank(tmp_path):
    base, path = UNET.model(), tmp_path / "lora.safetensors"
    ours = adapted(base, "to_q|conv1", 4, method="bat")
    with pytest.raises(disha.ArgumentError, match="give `rank`"):
        image_lora.export({"unet": ours}, path)
    assert not path.exists()
    assert image_lora.export({"unet": ours}, path, rank=16).error < 1e-5
    theirs = copy.deepcopy(base)
    theirs.load_lora_adapter(str(path), prefix="unet")
    close(UNET.run(theirs.eval()), UNET.run(ours), 1e-4)
    again = copy.deepcopy(base)
    image_lora.load({"unet": again}, path)
    close(UNET.run(again), UNET.run(ours), 1e-4)


def test_a_trained_lora_with_its_settings(tmp_path):
    base, path = UNET.model(), tmp_path / "pytorch_lora_weights.safetensors"
    theirs = copy.deepcopy(base)
    alphas = {"alpha_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2}}
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "conv1"], **alphas)
    theirs.add_adapter(settings)
    with torch.no_grad():
        for name, factor in theirs.named_parameters():
            if "lora_" in name:
                factor.add_(torch.randn_like(factor), alpha=0.1)
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(theirs),
        unet_lora_adapter_metadata=settings.to_dict(),
    )
    ours = copy.deepcopy(base)
    disha.load_adapter(ours, path)
    close(UNET.run(ours), UNET.run(theirs.eval()))
    image_lora.export({"unet": ours}, tmp_path / "again.safetensors")
    again = copy.deepcopy(base)
    again.load_lora_adapter(str(tmp_path / "again.safetensors"), prefix="unet")
    close(UNET.run(again.eval()), UNET.run(ours))


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), {}, "groups=2"),
        (nn.Conv2d(8, 8, 3, dilation=2), {}, "is dilated"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), {}, "padding_mode='circular'"),
        (nn.ConvTranspose2d(8, 8, 3), {}, "does not know a ConvTranspose2d"),
        (nn.Embedding(8, 8), {}, "can't hold layer of the unet"),
        (nn.Linear(8, 8), {"also_train": "norm"}, "can't hold norm.bias"),
    ],
)
def test_what_no_form_can_hold(tmp_path, layer, options, message):
    model = nn.ModuleDict({"layer": layer, "norm": nn.LayerNorm(8)})
    ours = adapted(model, "layer", **options)
    with refused_export(tmp_path, ours, message):
        image_lora.export({"unet": ours}, tmp_path / "lora.safetensors")


def test_the_model_itself_has_no_key(tmp_path):
    model = disha.inject_adapters(nn.Linear(8, 8), "all-linear", 2)
    contents = adapter_contents(ModelView(model))
    with refused_export(tmp_path, model, "the model"):
        image_lora.write_file(tmp_path / "lora.safetensors", "unet", contents)


def test_wrong_arguments(tmp_path):
    path, ours = tmp_path / "lora.safetensors", adapted(nn.Sequential(nn.Linear(8, 8)), "0")
    for models, options, message in (
        ({"vae": ours}, {}, "no component 'vae'; allowed are unet, transformer"),
        ({"unet": ours}, {"adapter": "style"}, "has an adapter 'style'"),
        ({"scheduler": None}, {}, "no component of scheduler"),
        (ours, {}, "must be a mapping such as"),
    ):
        with pytest.raises(disha.DishaError, match=message):
            image_lora.export(models, path, **options)
    assert not path.exists()


# --- bad files -----------------------------------------------------------------------------------

A, B = torch.eye(2).repeat(1, 4), torch.arange(16.0).view(8, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"unet.a.lokr_w1": A, "unet.a.lokr_w2": B}, "has unet.a.lokr_w1, .* no factor"),
        ({"unet.a.lora_A.weight": A, "unet.a.lora_magnitude_vector": B}, "no pair .* unet.a;"),
        ({"diffusion_model.blocks.0.lora_A.weight": A}, "no pair .* diffusion_model"),
        ({"base_model.model.a.lora_A.weight": A}, "no pair .* base_model"),
        ({"other.a.lora_A.weight": A, "other.a.lora_B.weight": B}, "has other.a, .* no factor"),
        ({"unet.a.lora_A.weight": A}, "no pair .* unet.a;"),
        ({"unet.a.lora_B.weight": B}, "no pair .* unet.a;"),
        ({"unet.a.lora_A.weight": A, "unet.a.lora_B.weight": B.T}, "don't belong together"),
    ],
)
def test_files_that_can_not_be_read(tmp_path, tensors, message):
    path = tmp_path / "lora.safetensors"
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
    with pytest.raises(disha.DishaError, match=message) as caught:
        image_lora.read_file(path)
    assert str(path) in str(caught.value)


def test_settings_that_are_no_json(tmp_path):
    path = tmp_path / "lora.safetensors"
    settings = {image_lora.SETTINGS_KEY: "{"}
    save_file({"unet.a.lora_A.weight": A, "unet.a.lora_B.weight": B}, path, settings)
    with pytest.raises(disha.AdapterFileError, match="has settings that can't be read"):
        image_lora.read_file(path)


def two_models(folder):
    """Two models of a pipeline, plain and adapted, and the file of both adapters."""
    models = {"unet": UNET.model(), "text_encoder": text_encoder()}
    targets = {"unet": "to_q", "text_encoder": "fc1"}
    ours = {name: adapted(models[name], target) for name, target in targets.items()}
    image_lora.export(ours, folder / "lora.safetensors")
    return models, ours, folder / "lora.safetensors"


def test_all_models_or_none(tmp_path):
    models, _, path = two_models(tmp_path)
    with pytest.raises(disha.ArgumentError, match=r"holds text_encoder, unet, and .* no text_enc"):
        image_lora.load({"unet": models["unet"]}, path)
    disha.inject_adapters(models["text_encoder"], "fc2", 2, adapter="style", freeze=False)
    queries = [m for name, m in models["unet"].named_modules() if name.endswith("to_q")]
    queries[-1].weight = nn.Parameter(torch.zeros(3, 4))
    before = {name: snapshot(model) for name, model in models.items()}
    with pytest.raises(disha.AdapterFileError, match="to_q"):
        image_lora.load(models, path)
    for name, model in models.items():
        assert_unchanged(model, before[name])
    with pytest.raises(disha.DishaError, match="to_q"):
        image_lora.load({"unet": FLUX.model(), "text_encoder": text_encoder()}, path)


def test_of_several_adapters_the_named_one_is_exported(tmp_path):
    model = adapted(UNET.model())
    perturb(disha.inject_adapters(model, EVERY, 2, adapter="other"), seed=1)
    files = []
    for adapter in ("default", "other"):
        image_lora.export({"unet": model}, tmp_path / adapter, adapter=adapter)
        files.append(load_file(tmp_path / adapter))
    assert any(not torch.equal(values, files[1][key]) for key, values in files[0].items())


def test_a_file_replaces_the_adapter_of_its_models_and_of_no_other(tmp_path):
    models, ours, path = two_models(tmp_path)
    image_lora.load(models, path)
    before = copy.deepcopy(models)
    for name, model in ours.items():
        perturb(model, seed=1)
        image_lora.export({name: model}, tmp_path / name)
    with pytest.raises(disha.ArgumentError, match="pass replace=True"):
        image_lora.load(models, tmp_path / "unet")
    image_lora.load(models, tmp_path / "unet", replace=True)
    for name, expected in (("unet", ours), ("text_encoder", before)):
        assert_same(*(disha.adapter_state_dict(one[name]) for one in (models, expected)))


# --- the command ---------------------------------------------------------------------------------


def test_the_command_converts_both_ways(tmp_path):
    adapter, back = tmp_path / "adapter.safetensors", tmp_path / "back.safetensors"
    disha.save_adapter(adapted(UNET.model(), BLOCKS, scale=0.5), adapter)
    expected, out = read_contents(adapter), tmp_path / "lora.safetensors"
    command = ["convert", str(adapter), str(out), "--to", "diffusers", "--component", "unet"]
    assert main(command) == 0
    assert main(["convert", str(out), str(back), "--to", "disha"]) == 0
    found = read_contents(back)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(
        torch.equal(found.tensors[key], 0.5 * expected.tensors[key]) for key in found.tensors
    )
    assert {layer.scale for layer in found.layers} == {1.0}  # B has the scale


def test_the_command_asks_for_a_component(tmp_path, capsys):
    (_, models, path), out = two_models(tmp_path), tmp_path / "out.safetensors"
    command = ["convert", str(path), str(out), "--to", "disha"]
    assert main(command) == 2
    assert "choose one with --component" in capsys.readouterr().err
    assert main([*command, "--component", "text_encoder"]) == 0
    back = text_encoder()
    disha.load_adapter(back, out)
    assert torch.equal(back(TOKENS)[0], models["text_encoder"](TOKENS)[0])
    command = ["convert", str(out), str(tmp_path / "x"), "--to", "diffusers"]
    assert main(command) == 2
    assert "component" in capsys.readouterr().err


def test_the_command_cuts_bat_to_a_rank_with_a_base(tmp_path, capsys):
    base, path = UNET.model(), tmp_path / "bat.safetensors"
    base.save_pretrained(tmp_path / "unet")
    ours = adapted(base, "to_q|conv1", 4, method="bat")
    disha.save_adapter(ours, path)
    out = tmp_path / "lora.safetensors"
    command = ["convert", str(path), str(out), "--to", "diffusers", "--component", "unet"]
    assert main(command) == 2
    assert "--rank" in capsys.readouterr().err
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
        return [block.grad for block in disha.adapter_parameters(model)]

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
