"""`disha.interop.peft` against the real PEFT: what either writes, the other computes alike.

The folders in `golden/` were written by PEFT 0.14.0 and 0.18.1, the last that had Bone, from
weights that `waves` gives, with the outputs that it computed.
"""

import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from peft import MissConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

import disha
from disha import (
    AdapterFileError,
    AdapterIOError,
    ArgumentError,
    ConversionError,
    DishaError,
)
from disha.files import disk
from disha.files.contents import keep_blocks, read_contents, write_contents
from disha.files.saving import adapter_contents
from disha.interop import peft as miss
from disha.interop.peft import export, load, write_folder
from disha.interop.peft_format import exact_pattern, exact_targets
from disha.interop.peft_reading import base_of_model, read_folder
from disha.model.view import ModelView
from tests import reference
from tests.conftest import assert_same, perturb, refused
from tests.peft_models import (
    assert_same_folders,
    close,
    config_of,
    llama,
    net,
    output,
    perturb_all,
    refused_to_load,
    rewrite,
    tensors_of,
    with_fields,
    with_tensor,
)

GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = {
    "bone": {"method": "bone", "r": 4},
    "tile": {"method": "bone", "r": 4, "r_out": 2},
    "bat": {"method": "bat", "r": 2},
}
MISS = {
    "bone": {"init_weights": True, "r": 4},
    "tile": {"init_weights": "mini", "r": 4, "mini_r": 2},
    "bat": {"init_weights": "bat", "r": 2},
}


def known(model):
    return base_of_model(ModelView(model))


def from_peft(folder, make, **arguments):
    """Return a fresh base with the folder loaded by PEFT, which must not warn of missing keys."""
    model = PeftModel.from_pretrained(make(), folder, **arguments)
    return model.eval()


def trained_by_peft(make, folder, **config):
    """Let PEFT inject, write random values into all that trains, and save; return the output."""
    model = get_peft_model(make(), MissConfig(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise * 0.3)
    model.save_pretrained(folder)
    return output(model, make)


# --- to PEFT -------------------------------------------------------------------------------------


CASES = [
    (net, "bone", "inner", list),
    (net, "tile", r"layers\.1\.q", list),
    (net, "bat", r"^q$", str),
    (net, "tile", r"^inner|\.[qv]$|^q$", list),
    (llama, "bone", "mlp|o_proj", list),
    (llama, "tile", "[qv]_proj", list),
    (llama, "bat", r"layers\.1\..*_proj", list),
]
"""Each method with each model, and each form of `target_modules`: names, or a regex of names that
are the ends of others."""


@pytest.mark.parametrize(("make", "kind", "target", "form"), CASES)
def test_peft_computes_what_we_export(make, kind, target, form, tmp_path):
    model = perturb(disha.inject_adapters(make(), target, **KINDS[kind]))
    expected = output(model, make)
    assert not torch.allclose(expected, output(make(), make))

    report = export(model, tmp_path / "folder")
    close(output(model, make), expected)
    theirs = from_peft(tmp_path / "folder", make)
    close(output(theirs, make), expected)
    merged = theirs.merge_and_unload()
    close(output(merged, make), expected)

    adapted = {
        name for name, module in model.named_modules() if isinstance(module, disha.AdaptedLayer)
    }
    assert set(from_peft(tmp_path / "folder", make).base_model.targeted_module_names) == adapted
    assert ({layer.name for layer in report.layers}, report.error) == (adapted, 0)
    written = config_of(tmp_path / "folder")["target_modules"]
    assert isinstance(written, form)
    assert form is str or written == sorted(adapted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_stay(dtype, tmp_path):
    model = llama().to(dtype)
    perturb(disha.inject_adapters(model, "q_proj", 4, also_train="model.norm", dtype=dtype))
    export(model, tmp_path)
    assert {tensor.dtype for tensor in tensors_of(tmp_path).values()} == {dtype}

    theirs = PeftModel.from_pretrained(llama().to(dtype), tmp_path, autocast_adapter_dtype=False)
    blocks = {n: p for n, p in theirs.named_parameters() if "miss_block" in n}
    assert {block.dtype for block in blocks.values()} == {dtype}
    torch.testing.assert_close(output(theirs, llama), output(model, llama), rtol=0.05, atol=0.02)

    base = llama().to(dtype)
    load(base, tmp_path)
    assert {p.dtype for n, p in base.named_parameters() if ".disha." in n} == {dtype}
    assert torch.equal(output(base, llama), output(model, llama))
    wider = llama().to(dtype)
    load(wider, tmp_path, dtype=torch.float64)
    assert {p.dtype for n, p in wider.named_parameters() if ".disha." in n} == {torch.float64}


@pytest.mark.parametrize(("method", "kept"), [("bone", 0.25), ("bat", 0.0)])
def test_dropout_is_kept_where_peft_has_one(method, kept, tmp_path):
    model = disha.inject_adapters(net(), "inner", 2, method=method, dropout=0.25)
    export(model, tmp_path)
    assert config_of(tmp_path)["miss_dropout"] == kept
    base = net()
    load(base, tmp_path)
    assert base.inner.disha["default"].dropout == kept


def test_notes_go_both_ways(tmp_path):
    model = disha.inject_adapters(net(), "inner", 4)
    notes = {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}
    write_folder(tmp_path, replace(adapter_contents(ModelView(model)), metadata=notes))
    found = peft.PeftConfig.from_pretrained(tmp_path)
    assert (found.base_model_name_or_path, found.task_type) == ("org/base", "CAUSAL_LM")
    contents = read_folder(tmp_path, known(net()))
    assert contents.metadata == notes


def wrapped_by_compile(model):
    return torch.compile(model)


def wrapped_by_checkpointing(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.inner = checkpoint_wrapper(model.inner)
    return model


def wrapped_by_ddp(model):
    return nn.parallel.DistributedDataParallel(model)


@pytest.mark.parametrize("wrap", [wrapped_by_compile, wrapped_by_checkpointing, wrapped_by_ddp])
def test_names_are_those_of_the_plain_model(wrap, tmp_path):
    if wrap is wrapped_by_ddp:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = perturb(disha.inject_adapters(net(), r"inner|\.q", 2, also_train="^norm"))
        export(model, tmp_path / "plain")
        model = wrap(model)
        export(model, tmp_path / "wrapped")
        assert_same_folders(tmp_path / "wrapped", tmp_path / "plain")
        expected = disha.adapter_state_dict(model)
        perturb(model, seed=2)
        load(model, tmp_path / "plain", replace=True)
        assert_same(disha.adapter_state_dict(model), expected)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("method", "tolerance"), [("bone", 1e-5), ("bat", 1e-2)])
def test_a_quantized_base(method, tolerance, tmp_path, monkeypatch):
    """BAT's tolerance is that of the kernels: PEFT multiplies with the dequantised weight."""
    from bitsandbytes.nn import Linear4bit

    # On some CPUs it packs the weights of PEFT's layers, and computes in bfloat16 then.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)

    def quantized():
        torch.manual_seed(0)
        base = nn.Sequential(Linear4bit(64, 64, quant_type="nf4"), nn.Linear(64, 8))
        return base.to("cpu").eval()  # training takes other kernels

    model = perturb(disha.inject_adapters(quantized(), ".", 8, method=method))
    x = torch.randn(4, 64)
    expected = model(x)
    assert not torch.allclose(quantized()(x), expected, atol=0.1)
    export(model, tmp_path)
    theirs = PeftModel.from_pretrained(quantized(), tmp_path)
    torch.testing.assert_close(theirs(x), expected, rtol=tolerance, atol=tolerance)
    ours = quantized()
    load(ours, tmp_path)
    assert torch.equal(ours(x), expected)


# --- what PEFT can't express ---------------------------------------------------------------------


def square():
    return nn.Sequential(nn.Linear(8, 8))


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(8, 8))


NOT_EXPRESSIBLE = {
    "ragged bat": (
        lambda: nn.Sequential(nn.Linear(9, 8)),
        {"r": 4, "method": "bat"},
        "needs an r that divides both sizes",
    ),
    "groups": (square, {"r": 4, "groups": 2}, "knows bone and bat, not bone_groups2"),
    "scale": (square, {"r": 4, "scale": 2.0}, "no scale"),
    "several r": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
        {"r": 4, "rank_pattern": {"1": 2}},
        "one r, this has [2, 4]",
    ),
    "conv": (
        lambda: nn.Sequential(nn.Conv1d(8, 8, 3)),
        {"r": 4},
        "the layout of this weight is 'out in *kernel'",
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(8, 8)),
        {"r": 4},
        "the layout of this weight is 'index out'",
    ),
    "weights as (in, out)": (conv1d, {"r": 4}, "the layout of this weight is 'in out'"),
    "rows": (square, {"r": 4, "rows": {"0": [(0, 4)]}}, "all rows of a weight"),
}


@pytest.mark.parametrize("case", NOT_EXPRESSIBLE)
def test_what_peft_lacks_is_refused_before_anything_is_written(case, tmp_path):
    make, arguments, reason = NOT_EXPRESSIBLE[case]
    model = disha.inject_adapters(make(), ".*", **arguments)
    with refused(model, ConversionError, "nothing was written") as caught:
        export(model, tmp_path / "folder")
    assert reason in str(caught.value)
    assert not (tmp_path / "folder").exists()


def test_remedies_work(tmp_path):
    model = net()
    perturb(disha.inject_adapters(model, r"layers\..*[qv]", 2, scale=0.5, rank_pattern={"q": 3}))
    expected = output(model, net)
    disha.combine_adapters(model, {"default": 1.0}, into="plain", r=6)
    export(model, tmp_path, "plain")
    close(output(from_peft(tmp_path, net), net), expected)


def test_export_while_merged(tmp_path):
    model = perturb(disha.inject_adapters(net(), "inner", 4))
    expected = output(model, net)
    disha.merge_adapters(model)
    export(model, tmp_path)
    close(output(from_peft(tmp_path, net), net), expected)


class TestAFolderThatIsThere:
    """An adapter is exported to a folder that has it with other values."""

    @pytest.fixture
    def model(self):
        return disha.inject_adapters(net(), "inner", 4)

    @pytest.fixture
    def folder(self, model, tmp_path):
        folder = tmp_path / "folder"
        export(model, folder)
        (folder / "README.md").write_text("mine")
        perturb(model)
        return folder

    def files(self, folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def test_its_files_are_replaced_and_those_of_others_stay(self, model, folder):
        before = self.files(folder)
        export(model, folder)
        after = self.files(folder)
        assert after.keys() == before.keys()
        assert after["README.md"] == b"mine"
        assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]

    def test_on_a_full_disk_it_stays(self, model, folder, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        before = self.files(folder)
        monkeypatch.setattr(disk, "save_file", full)
        with pytest.raises(AdapterIOError, match=r"No space left .*nothing was changed"):
            export(model, folder)
        assert self.files(folder) == before
        with pytest.raises(AdapterIOError, match=r"No space left .*nothing was changed"):
            export(model, folder / "new" / "newer")
        assert not (folder / "new").exists()

    def test_a_folder_in_the_place_of_a_file_leaves_the_others(self, model, folder):
        (folder / "adapter_config.json").unlink()
        (folder / "adapter_config.json").mkdir()
        before = self.files(folder)
        with pytest.raises(AdapterIOError, match=r"Is a directory; nothing was changed"):
            export(model, folder)
        assert self.files(folder) == before


def test_a_file_in_the_place_of_the_folder_and_an_unknown_adapter_are_refused(tmp_path):
    model = disha.inject_adapters(net(), "inner", 4)
    (tmp_path / "file").touch()
    with pytest.raises(AdapterIOError, match=r"can't save to .*File exists"):
        export(model, tmp_path / "file")
    with pytest.raises(ArgumentError, match="no adapter 'other'"):
        export(model, tmp_path / "other", "other")
    assert not (tmp_path / "other").exists()


# --- from PEFT -----------------------------------------------------------------------------------


CONFIGS = {
    net: {
        "ends": {"target_modules": ["inner", "q"]},
        "a name": {"target_modules": ["layers.1.q"]},
        "regex": {"target_modules": r"layers\.\d+\.(q|v)|^inner$"},
        "lookahead": {"target_modules": r"(?!layers\.1).*q"},
        "excluded": {"target_modules": ["q", "v"], "exclude_modules": ["layers.2.q", "v"]},
        "excluded by regex": {"target_modules": ["q"], "exclude_modules": "q"},
        "saved": {"target_modules": ["q"], "modules_to_save": ["norm", "head"]},
        "saved around a target": {"target_modules": ["q", "head.0"], "modules_to_save": ["head"]},
    },
    llama: {
        "ends": {"target_modules": ["q_proj", "down_proj"]},
        "regex": {"target_modules": r".*\.(self_attn|mlp)\.[qd].*_proj"},
        "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
        "layers": {
            "target_modules": ["v_proj"],
            "layers_to_transform": [0],
            "layers_pattern": "layers",
        },
        "all-linear": {"target_modules": "all-linear"},
        "the default": {},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        "the head": {"target_modules": ["lm_head"]},  # PEFT saves its frozen weight too
    },
}  # fmt: skip


PEFT_CASES = [(make, case) for make, cases in CONFIGS.items() for case in cases]


@pytest.mark.parametrize(
    ("make", "case", "kind"),
    [(*case, kind) for case, kind in zip(PEFT_CASES, itertools.cycle(KINDS), strict=False)]
    + [(net, "ends", kind) for kind in KINDS],
)
def test_we_compute_what_peft_saved(make, case, kind, tmp_path):
    expected = trained_by_peft(make, tmp_path, **{**MISS[kind], **CONFIGS[make][case]})
    model = make()
    report = load(model, tmp_path)
    assert report.complete
    close(output(model, make), expected)
    disha.merge_adapters(model)
    close(output(model, make), expected)


def described(contents):
    return {key: (one.shape, one.dtype) for key, one in contents.tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_by_way_of_peft_change_nothing(kind, tmp_path):
    model = net()
    disha.inject_adapters(model, r"inner|\.q", **KINDS[kind], also_train="^norm", adapter="mine")
    perturb_all(model, ["norm.weight", "norm.bias"])
    contents = adapter_contents(ModelView(model), "mine")
    export(model, tmp_path / "ours", "mine")
    from_peft(tmp_path / "ours", net).save_pretrained(tmp_path / "theirs")

    for name in ("ours", "theirs"):
        base = net()
        load(base, tmp_path / name, "other")
        again = adapter_contents(ModelView(base), "other")
        assert again.layers == contents.layers  # fingerprints of the base too
        assert again.also_train == contents.also_train
        assert described(again) == described(contents)
        chosen = {"target": None, "also_train": ()}
        assert {**again.config.to_json(), **chosen} == {**contents.config.to_json(), **chosen}
        assert_same(again.tensors, contents.tensors)


def test_arguments_of_load(tmp_path):
    model = disha.inject_adapters(net(), "inner", 4, also_train="^norm")
    perturb_all(model, ["norm.weight"])
    export(model, tmp_path)
    base = net()
    load(base, tmp_path, also_train=False, freeze=False)
    assert torch.equal(base.norm.weight, net().norm.weight)
    assert base.q.weight.requires_grad
    disha.mark_only_adapters_trainable(base)
    assert adapter_contents(ModelView(base)).also_train == ()
    with pytest.raises(ArgumentError, match="replace=True"):
        load(base, tmp_path)
    with pytest.raises(ArgumentError, match="contain a dot"):
        load(base, tmp_path, "a.b")


# --- Bone as PEFT had it before ------------------------------------------------------------------


def waves(tensor, step):
    with torch.no_grad():
        values = torch.sin(step * torch.arange(1, tensor.numel() + 1, dtype=torch.float64))
        tensor.copy_(values.view_as(tensor))


@pytest.mark.parametrize("folder", ["peft_bone", "peft_bone_bat"])
def test_folders_of_bone_load_as_peft_computed_them(folder):
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    for step, parameter in enumerate(model.parameters(), 1):
        waves(parameter, step * 0.7)
    load(model, GOLDEN / folder)
    x = torch.empty(3, 12, dtype=torch.float64)
    waves(x, 0.11)
    expected = json.loads((GOLDEN / folder / "expected.json").read_text())["output"]
    close(model(x), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("init_weights", [True, False, "bat"])
def test_bone_is_the_formula(init_weights, tmp_path):
    method = "bat" if init_weights == "bat" else "bone"
    shape = (3, 2, 2) if method == "bat" else (2, 6)
    block = torch.randn(shape, dtype=torch.float64)
    config = {"peft_type": "BONE", "r": 2, "init_weights": init_weights, "target_modules": ["v"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"base_model.model.layers.{i}.v.bone_block": block * i for i in range(3)}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = net()
    weight = model.layers[2]["v"].weight.detach().clone()
    load(model, tmp_path)
    disha.merge_adapters(model)
    close(
        model.layers[2]["v"].weight.detach(),
        weight + reference.delta_weight(method, weight, 2 * block),
    )


def test_settings_of_bone_that_are_refused(tmp_path):
    shutil.copytree(GOLDEN / "peft_bone", tmp_path, dirs_exist_ok=True)
    base = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))
    for values, says in (
        ({"bias": "bone_only"}, "uses bias"),
        ({"r": 0}, "r must be at least 1"),
        ({"init_weights": []}, "has settings that can't be read: unhashable"),
    ):
        rewrite(tmp_path, **{"init_weights": True, "bias": "none", **values})
        refused_to_load(tmp_path, miss, base, says, DishaError)


# --- without a model -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_files_convert_both_ways_without_a_model(kind, tmp_path):
    model = perturb(disha.inject_adapters(net(), r"^inner|^q", **KINDS[kind]))
    disha.save_adapter(model, tmp_path / "a.safetensors", metadata={"task_type": "CAUSAL_LM"})
    file = read_contents(tmp_path / "a.safetensors")
    write_folder(tmp_path / "folder", file)
    assert config_of(tmp_path / "folder")["target_modules"] == ["inner", "q"]
    assert config_of(tmp_path / "folder")["task_type"] == "CAUSAL_LM"
    rewrite(tmp_path / "folder", task_type=None)  # its model class needs a transformers model
    close(output(from_peft(tmp_path / "folder", net), net), output(model, net))

    contents = read_folder(tmp_path / "folder", known(net()))
    write_contents(tmp_path / "b.safetensors", contents)
    again = read_contents(tmp_path / "b.safetensors")
    plain = [{**vars(layer), "base": None} for layer in file.layers]
    assert [vars(layer) for layer in again.layers] == plain
    assert (again.also_train, described(again)) == (file.also_train, described(file))
    assert_same(again.tensors, file.tensors)
    base = net()
    disha.load_adapter(base, tmp_path / "b.safetensors")
    close(output(base, net), output(model, net))
    contents = keep_blocks(read_folder(tmp_path / "folder", known(net())))
    assert contents.also_train == ()
    assert set(contents.tensors) == {layer.key for layer in contents.layers}


def test_other_layers_that_a_file_selects_stay_as_they_are(tmp_path):
    """`q` as an item of a list also means every `layers.<n>.q`, where PEFT adds nothing."""
    model = perturb(disha.inject_adapters(net(), "^q$", 2))
    write_folder(tmp_path, adapter_contents(ModelView(model)))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        theirs = from_peft(tmp_path, net)
    close(output(theirs, net), output(model, net))


def test_a_file_tells_too_little_for_whole_modules(tmp_path):
    model = disha.inject_adapters(net(), "^q$", 2, also_train="^norm")
    contents = adapter_contents(ModelView(model))
    with pytest.raises(ConversionError, match="load the file into the model and export from there"):
        write_folder(tmp_path / "folder", contents)
    assert not (tmp_path / "folder").exists()


def test_contents_need_the_base(tmp_path):
    export(disha.inject_adapters(net(), "inner", 4, also_train="^norm"), tmp_path)
    with pytest.raises(AdapterFileError, match="adapts inner, and the base has no such linear"):
        read_folder(tmp_path, known(nn.Sequential()))
    with pytest.raises(ConversionError, match=r"only the base tells the sizes of inner"):
        read_folder(tmp_path)


# --- folders from strangers ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A good folder: Bone on two layers, a module saved whole."""
    model = disha.inject_adapters(net(), r"inner|layers\.0\.v", 4, also_train="^norm")
    perturb_all(model, ["norm.weight"])
    export(model, tmp_path)
    return tmp_path


def cut_off(folder):
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-5])


BLOCK = "inner.miss_block"
BAD = {
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "can't read"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "no JSON object"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[5]"), "no JSON object"),
    "cut off": (cut_off, "is not a complete safetensors file"),
    "a LoRA": (with_fields(peft_type="LORA"), "miss_block' belongs to no layer"),
    "another type": (with_fields(peft_type="LOHA"), "is of peft_type 'LOHA', not LORA"),
    "r of another": (with_fields(r=3), "expected a block of shape (3, 6)"),
    "r too large": (with_fields(r=11), "r=11 is larger than in_features=10"),
    "another kind": (with_fields(init_weights="bat"), "a block of shape (4, 6) does not fit"),
    "unknown kind": (with_fields(init_weights="nice"), "unknown method 'nice'"),
    "mini that does not divide": (with_fields(init_weights="mini", mini_r=4), "does not divide"),
    "nothing saved": (with_fields(modules_to_save=None), "norm.weight: it does not train, and"),
    "no list": (with_fields(modules_to_save=5), "has settings that can't be read: 'int' object"),
    "biases": (with_fields(bias="MiSS_only"), "uses bias"),
    "wrong shape": (with_tensor(BLOCK, lambda t: t[:, :-1].clone()), "expected a block of shape"),
    "infinite": (with_tensor(BLOCK, lambda t: t / 0), "not finite"),
    "another shape": (with_tensor("norm.weight", lambda t: t[1:].clone()), "norm.weight"),
    "no blocks": (
        lambda folder: (
            with_tensor(BLOCK, lambda t: None)(folder),
            with_tensor("layers.0.v.miss_block", lambda t: None)(folder),
        ),
        "has no tensors of a layer; save it again",
    ),
    "a block more": (with_tensor("x.miss_block", lambda t: torch.zeros(4, 6)), "adapts x, and the"),
    "a block of a norm": (
        with_tensor("norm.miss_block", lambda t: torch.zeros(4, 6)),
        "adapts norm, and the base has no such linear",
    ),
    "a parameter more": (
        with_tensor("scale", lambda t: torch.zeros(6, dtype=torch.float64)),
        "scale: it does not train, and differs",
    ),
    "a tensor more": (with_tensor("more", lambda t: torch.zeros(6)), "'more' belongs to no layer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_and_change_nothing(case, folder):
    change, reason = BAD[case]
    change(folder)
    refused_to_load(folder, miss, net(), reason, DishaError)


def test_nothing_in_a_pickle_is_run(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": torch.nn.Linear}, folder / "adapter_model.bin")  # not tensors alone
    model = net()
    with refused(model, AdapterFileError, "or holds what could run"):
        load(model, folder)


def test_a_folder_of_an_older_peft_holds_the_same(folder):
    expected, model = net(), net()
    load(expected, folder)
    torch.save(tensors_of(folder), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    load(model, folder)
    close(output(model, net), output(expected, net))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(.*)*x"},
        {"target_modules": "("},
        {"target_modules": None},
        {"exclude_modules": "(a|b|.)*" * 9 + "!"},
        {"layers_to_transform": [1], "layers_pattern": "(.*)*x"},
    ],
    ids=str,
)
def test_fields_that_select_layers_are_not_evaluated(fields, folder):
    """A regex of a stranger can run for ever; the tensors say which layers are adapted."""
    expected, model = net(), net()
    load(expected, folder)
    rewrite(folder, **fields)
    load(model, folder)
    close(output(model, net), output(expected, net))


def test_a_selected_layer_without_a_block_is_a_block_of_zeros_in_peft(folder):
    with_tensor(BLOCK, lambda t: None)(folder)
    model = net()
    load(model, folder)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        theirs = from_peft(folder, net)
    close(output(theirs, net), output(model, net))


# --- names ---------------------------------------------------------------------------------------

MODULES = [
    *("embed", "q", "norm", "layers", "h.1.q", "a.h.2.q", "lm_head", "head", "head.q", "a+b.q"),
    *(f"layers.{n}" for n in range(3)),
    *(f"layers.{n}.{m}.{p}" for n in range(3) for m in ("attn", "mlp") for p in ("q", "v")),
]


@pytest.mark.parametrize("config_class", [MissConfig, peft.LoraConfig])
def test_exact_targets_select_these_and_no_others(config_class):
    choose = random.Random(0)
    forms = set()
    for size in [1, 2, 3, 5, len(MODULES)] * 40:
        wanted = set(choose.sample(MODULES, size))
        target = exact_targets(wanted, MODULES)
        forms.add(type(target))
        selects = config_class(target_modules=target)
        assert {name for name in MODULES if check_target_module_exists(selects, name)} == wanted
    assert forms == {list, str}


@pytest.mark.parametrize("name", ["q", "layers.0.q", "a+b.c", "layers.1"])
def test_anchored_keys_are_of_one_layer_only(name):
    key = exact_pattern(name)
    assert get_pattern_key([key], name) == key
    for other in (f"model.{name}", f"{name}.x", f"x{name}", "a.b.c"):
        assert get_pattern_key([key], other) == other
