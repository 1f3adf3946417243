"""Adapters and base checkpoints on disk: merging without the model, and whether they belong."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from fractions import Fraction
from functools import partial

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

import disha
from disha import AdapterFileError, AdapterIOError, ArgumentError, ArgumentTypeError, MergeError
from disha.interop import checkpoints
from disha.interop.checkpoints import (
    base_shapes,
    base_weights,
    merge_into_checkpoint,
    misfits,
    open_checkpoint,
)
from tests.conftest import Layered, assert_same, perturb
from tests.language_models import SIZES, gpt2, llama
from tests.whole.test_experts import build


class Zoo(nn.Module):
    """A layer of every layout, and one with rows; no size is a multiple of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.padded = nn.Embedding(11, 8, padding_idx=4)
        self.sliced = nn.Linear(8, 10)
        self.recurrent = nn.LSTM(8, 5)
        self.experts = nn.Parameter(torch.randn(4, 8, 5))
        self.stacked = nn.Parameter(torch.randn(4, 5, 8))
        self.proj = nn.Linear(8, 10)
        self.conv = nn.Conv2d(8, 6, (3, 2), groups=2)
        self.up = nn.ConvTranspose1d(10, 4, 3, groups=2)
        self.packed = nn.MultiheadAttention(8, 2)
        self.apart = nn.MultiheadAttention(8, 2, kdim=5, vdim=7)
        self.norm = nn.LayerNorm(10)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.zeros(0, 4))


OTHERS = "padded|sliced|recurrent|experts|stacked"
DECLARED = {
    "layouts": {"experts": "expert in out", "stacked": "expert out in"},
    "rows": {"sliced": [(1, 4), (6, 9)], "experts": [(2, 5)]},
}
"""What of the zoo needs more than a target."""


def save_sharded(state, folder, count, metadata=None):
    """Write a state dict as shards with an index, tensors dealt out in turn."""
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    weight_map = {}
    for number in range(count):
        shard = f"model-{number + 1:05}-of-{count:05}.safetensors"
        held = {name: state[name].contiguous() for name in names[number::count]}
        save_file(held, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, shard))
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": metadata or {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensors_in(path):
    """Return all tensors of a checkpoint as a loader sees them: through its index."""
    if path.is_file():
        return load_file(path)
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return load_file(path / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    found = {}
    for shard in sorted(set(weight_map.values())):
        held = load_file(path / shard)
        assert {name for name in weight_map if weight_map[name] == shard} == set(held)
        found.update(held)
    return found


def base_state(model):
    state = model.state_dict().items()
    return {name: value for name, value in state if "disha" not in name.split(".")}


class Setting:
    """A base checkpoint, an adapter file, and what merging in memory makes of the two."""

    def __init__(self, folder, model, target="all-linear", r=3, shards=3, **arguments):
        self.folder = folder
        self.base = save_sharded(model.state_dict(), folder / "base", shards)
        self.adapter = folder / "adapter.safetensors"
        self.out = folder / "merged"
        perturb(disha.inject_adapters(model, target, r, **arguments))
        disha.save_adapter(model, self.adapter)
        self.model = model

    def change(self, **tensors):
        """Write other tensors into the base; None takes one away."""
        state = tensors_in(self.base) | tensors
        kept = {name: tensor for name, tensor in state.items() if tensor is not None}
        save_sharded(kept, self.base, 3)

    def merge(self, **arguments):
        return merge_into_checkpoint(self.base, self.adapter, self.out, **arguments)

    def merged_in_memory(self):
        disha.merge_adapters(self.model)
        return base_state(self.model)

    def listing(self):
        return sorted(os.listdir(self.folder))


@pytest.fixture
def setting(tmp_path):
    return Setting(tmp_path, Layered())


class TestMergingIsWhatMergingInMemoryIs:
    @pytest.mark.parametrize(
        ("dtype", "target", "arguments"),
        [
            (torch.float32, "proj|embed|conv|up|packed|apart", {}),
            (torch.bfloat16, "proj|embed|conv|up|packed|apart", {"r_out": 2}),
            (torch.float16, "proj|packed|apart", {"method": "bat"}),
            (
                torch.float32,
                "proj|packed",
                {"method": "bat", "scale": -0.7, "dtype": torch.float64},
            ),
            (torch.float64, "proj|embed|conv|up", {"scale": 0.3, "dtype": torch.bfloat16}),
            (torch.bfloat16, OTHERS, DECLARED),
            (torch.float64, OTHERS, {**DECLARED, "method": "bat", "scale": -0.7}),
            (
                torch.float16,
                OTHERS,
                {"layouts": DECLARED["layouts"], "r_out": 5, "exclude": "padded"},
            ),
        ],
    )
    def test_bit_for_bit(self, tmp_path, dtype, target, arguments):
        setting = Setting(tmp_path, Zoo().to(dtype), target, **arguments)
        report = setting.merge()
        before, merged = tensors_in(setting.base), tensors_in(setting.out)
        assert_same(merged, setting.merged_in_memory())
        changed = {name for name in merged if not torch.equal(merged[name], before[name])}
        assert len(report.layers) >= len(changed) >= 5
        assert "norm.weight" not in changed

    @pytest.mark.parametrize("method", ["bone", "bat"])
    def test_one_file_to_a_folder_and_to_a_file(self, tmp_path, method):
        setting = Setting(tmp_path, Zoo(), method=method)
        single = tmp_path / "whole.safetensors"
        save_file(tensors_in(setting.base), single)
        merge_into_checkpoint(single, setting.adapter, setting.out)
        for base in (single, setting.base):
            out = tmp_path / f"{base.stem}-merged.safetensors"
            merge_into_checkpoint(base, setting.adapter, out)
            assert out.is_file()
        expected = setting.merged_in_memory()
        assert os.listdir(setting.out) == ["model.safetensors"]
        assert_same(tensors_in(setting.out), expected)
        assert_same(load_file(tmp_path / "whole-merged.safetensors"), expected)
        assert_same(load_file(tmp_path / "base-merged.safetensors"), expected)

    def test_a_model_that_is_itself_one_linear(self, tmp_path):
        setting = Setting(tmp_path, nn.Linear(4, 3), shards=1)
        setting.merge()
        assert_same(tensors_in(setting.out), setting.merged_in_memory())

    def test_scale_in_place_of_the_adapters(self, setting):
        setting.merge(scale=Fraction(-1, 4))
        disha.set_adapter_scale(setting.model, -0.25)
        assert_same(tensors_in(setting.out), setting.merged_in_memory())

    def test_parameters_saved_beside_the_blocks(self, tmp_path):
        model = Layered().bfloat16()
        setting = Setting(tmp_path, model, "proj", also_train=r"norm|head\.weight")
        with torch.no_grad():
            model.layers[0]["attn"].norm.weight.add_(0.5)
            model.head.weight.mul_(2)
        disha.save_adapter(model, setting.adapter)
        report = setting.merge()
        assert "head.weight" in report.replaced
        assert_same(tensors_in(setting.out), setting.merged_in_memory())

    def test_parameters_beside_the_blocks_stay_the_bases_if_asked(self, tmp_path):
        model = Layered()
        setting = Setting(tmp_path, model, "proj", also_train=r"norm|head\.weight")
        with torch.no_grad():
            model.head.weight.mul_(2)
        disha.save_adapter(model, setting.adapter)
        before = tensors_in(setting.base)
        report = setting.merge(also_train=False)
        merged, expected = tensors_in(setting.out), setting.merged_in_memory()
        assert report.replaced == ()
        assert not torch.equal(expected["head.weight"], before["head.weight"])
        beside = {name for name in merged if "norm" in name or name == "head.weight"}
        assert_same(merged, expected | {name: before[name] for name in beside})


class TestWhatIsWritten:
    def test_shards_index_and_metadata_are_the_bases(self, setting):
        setting.merge()
        for shard in sorted(setting.base.glob("*.safetensors")):
            with safe_open(shard, "pt") as a, safe_open(setting.out / shard.name, "pt") as b:
                assert a.metadata() == b.metadata() == {"format": "pt"}
                assert sorted(a.keys()) == sorted(b.keys())
        name = "model.safetensors.index.json"
        first, second = (json.loads((f / name).read_text()) for f in (setting.base, setting.out))
        assert first == second

    def test_a_file_without_metadata_gets_the_format_that_loaders_ask_for(self, setting):
        single = setting.folder / "whole.safetensors"
        save_file(tensors_in(setting.base), single)
        merge_into_checkpoint(single, setting.adapter, setting.out)
        with safe_open(setting.out / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_any_dtype_is_copied_as_bytes(self, setting):
        state = tensors_in(setting.base)
        state["f8"] = torch.arange(6, dtype=torch.uint8).view(torch.float8_e4m3fn)
        if hasattr(torch, "float4_e2m1fn_x2"):  # not in the first supported releases
            state["a.f4"] = torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        if torch.complex64 in safetensors.torch._SIZE:
            state["complex"] = torch.randn(3, dtype=torch.complex64)
        state["infinite"] = torch.tensor([float("-inf"), float("nan")])
        save_sharded(state, setting.base, 2)
        setting.merge()
        found = tensors_in(setting.out)
        for name in {"f8", "a.f4", "complex"} & state.keys():
            assert found[name].dtype == state[name].dtype
            assert torch.equal(found[name].view(torch.uint8), state[name].view(torch.uint8))
        assert found["infinite"].isinf().tolist() == [True, False]

    def test_other_files_come_along_and_other_weights_do_not(self, setting):
        base = setting.base
        kept = ["config.json", "tokenizer.json", "tokenizer.model", "1_Pooling/config.json"]
        left = [
            *("pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "q.gguf"),
            *("pytorch_model.bin.index.json", ".gitattributes"),
        ]
        for name in kept + left:
            (base / name).parent.mkdir(exist_ok=True)
            (base / name).write_text(f"{{}} {name}")
        (base / ".git").mkdir()
        (base / ".git" / "config").write_text("")
        setting.merge()
        for name in kept:
            assert (setting.out / name).read_bytes() == (base / name).read_bytes()
        files = {p.relative_to(setting.out).as_posix() for p in setting.out.rglob("*.*")}
        assert files >= {*kept, "model.safetensors.index.json"}
        assert files.isdisjoint(left)

    def test_links_of_the_cache_of_hugging_face_are_followed(self, tmp_path):
        setting = Setting(tmp_path, Layered(), shards=1)
        blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        (setting.base / "config.json").write_text("{}")
        for number, path in enumerate(sorted(setting.base.iterdir())):
            path.rename(blobs / f"blob{number}")
            (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
        merge_into_checkpoint(snapshot, setting.adapter, setting.out)
        assert (setting.out / "config.json").read_text() == "{}"
        assert_same(tensors_in(setting.out), setting.merged_in_memory())


class TestNames:
    def merged_under(self, tmp_path, old, new, beside=(), **arguments):
        """Merge into a checkpoint whose names have another prefix than the adapter's model."""
        model = nn.ModuleDict({"net": Layered(), **dict(beside)})
        setting = Setting(tmp_path, model, **arguments)
        state = {
            f"{new}{name.removeprefix(old)}": value
            for name, value in tensors_in(setting.base).items()
        }
        save_sharded(state, setting.base, 2)
        setting.merge()
        expected = setting.merged_in_memory()
        moved = {f"{new}{name.removeprefix(old)}": value for name, value in expected.items()}
        assert_same(tensors_in(setting.out), moved)
        return setting

    def test_the_checkpoint_has_a_prefix_more(self, tmp_path):
        inner = Layered().named_children()  # which end as those of the net do
        setting = self.merged_under(tmp_path, "", "model.", inner, also_train="norm")
        assert misfits(setting.base, setting.adapter) == []

    def test_the_checkpoint_has_a_prefix_less(self, tmp_path):
        self.merged_under(tmp_path, "net.", "")

    def test_names_as_they_are_come_first(self, tmp_path):
        setting = Setting(tmp_path, Layered())
        state = tensors_in(setting.base)
        twin = {f"twin.{name}": torch.zeros_like(value) for name, value in state.items()}
        save_sharded(state | twin, setting.base, 2)
        setting.merge()
        assert_same(tensors_in(setting.out), setting.merged_in_memory() | twin)

    def test_two_prefixes_that_lead_to_all_are_refused(self, tmp_path):
        setting = Setting(tmp_path, Layered())
        state = tensors_in(setting.base)
        save_sharded(
            {f"{p}.{n}": v.clone() for p in "ab" for n, v in state.items()}, setting.base, 2
        )
        with pytest.raises(AdapterFileError, match=r"several prefixes; it has a\.embed"):
            setting.merge()
        assert not setting.out.exists()

    def test_what_is_missing_is_named_and_not_taken_from_another_part(self, tmp_path):
        towers = nn.ModuleDict({"text": Layered(), "image": Layered()})
        setting = Setting(tmp_path, towers, "q_proj", also_train="text.head")
        state = tensors_in(setting.base)
        one_tower = {name[5:]: value for name, value in state.items() if name.startswith("text.")}
        layer, head = "text.layers.1.attn.q_proj.weight", "text.head.weight"
        lacks = {
            "image": one_tower,
            layer: state | {layer: None} | {f"text.more.{n}": v + 0 for n, v in one_tower.items()},
            rf"{layer}; it has image\.embed": state | {layer: None, f"{layer}.query": state[layer]},
            f"{head}; .*If a weight is tied": state | {head: None, f"layers.0.{head}": state[head]},
        }
        for absent, stored in lacks.items():
            save_sharded({n: v for n, v in stored.items() if v is not None}, setting.base, 1)
            with pytest.raises(AdapterFileError, match=f"lacks {absent}"):
                setting.merge(force=True)


class TestRefused:
    def refuse(self, setting, error, match, **arguments):
        """Merge, which raises and leaves everything as it was."""
        before = setting.listing()
        with pytest.raises(error, match=match):
            setting.merge(**arguments)
        assert setting.listing() == before

    def test_other_weights_unless_forced(self, setting):
        setting.change(**{"head.weight": torch.randn(12, 8)})
        self.refuse(setting, AdapterFileError, "head.weight: has other values")
        setting.merge(force=True)
        expected = setting.model
        expected.head.weight.data = tensors_in(setting.base)["head.weight"].clone()
        assert_same(tensors_in(setting.out), setting.merged_in_memory())

    def test_merging_twice(self, setting):
        setting.merge()
        again = Setting.__new__(Setting)
        again.__dict__.update(setting.__dict__, base=setting.out, out=setting.folder / "again")
        self.refuse(again, AdapterFileError, "is not the base")

    def test_another_shape(self, setting):
        setting.change(**{"head.weight": torch.randn(12, 9)})
        self.refuse(setting, AdapterFileError, r"\(12, 9\).*\(12, 8\)", force=True)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_a_quantized_weight(self, setting, dtype):
        setting.change(**{"head.weight": torch.ones(12, 8).to(dtype)})
        self.refuse(setting, AdapterFileError, "quantised or packed there")

    def test_a_parameter_beside_the_blocks_that_is_missing_or_misshapen(self, tmp_path):
        setting = Setting(tmp_path, Layered(), "proj", also_train="norm")
        setting.change(**{"layers.1.attn.norm.bias": torch.zeros(9)})
        self.refuse(setting, AdapterFileError, r"norm\.bias: \(8,\), the checkpoint has \(9,\)")
        setting.change(**{"layers.0.attn.norm.weight": None})
        self.refuse(setting, AdapterFileError, r"lacks layers\.0\.attn\.norm\.weight")

    def test_a_merged_weight_that_is_not_finite_is_found_midway(self, tmp_path):
        setting = Setting(tmp_path, Layered().half(), "proj", shards=4)
        setting.model.layers[1]["attn"].v_proj.disha["default"].block.data.fill_(6e4)
        disha.save_adapter(setting.model, setting.adapter)
        match = r"layers\.1\.attn\.v_proj.*not be finite in torch\.float16"
        self.refuse(setting, MergeError, match, scale=2.0)

    @pytest.mark.parametrize(
        ("config", "tied"),
        [
            ({"model_type": "llama", "tie_word_embeddings": False}, False),
            ({"text_config": {"tie_word_embeddings": False}, "model_type": "llava"}, False),
            ({}, False),
            ({"model_type": "llama", "tie_word_embeddings": True}, True),
            ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),
            ({"model_type": "gpt2"}, True),
        ],
    )
    def test_an_embedding_that_may_be_tied(self, tmp_path, config, tied):
        setting = Setting(tmp_path, Layered(), "embed")
        (setting.base / "config.json").write_text(json.dumps(config))
        if tied:
            self.refuse(setting, MergeError, "tie_word_embeddings")
        setting.merge(force=tied)
        assert_same(tensors_in(setting.out), setting.merged_in_memory())

    def test_a_tied_weight_that_is_stored_twice(self, tmp_path):
        model = Layered()
        state = {**model.state_dict(), "copy.weight": model.embed.weight.detach().clone()}
        setting = Setting(tmp_path, model, "head", also_train=r"^embed\.")
        save_sharded(state, setting.base, 3)
        (setting.base / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
        self.refuse(setting, MergeError, "embed.* may be tied")

    def test_the_configuration_beside_a_single_file_counts(self, tmp_path):
        setting = Setting(tmp_path, Layered(), "embed", shards=1)
        (setting.base / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
        (file,) = setting.base.glob("*.safetensors")
        with pytest.raises(MergeError, match="may be tied"):
            merge_into_checkpoint(file, setting.adapter, tmp_path / "out.safetensors")

    def test_bad_arguments(self, setting):
        self.refuse(setting, ArgumentError, "scale", scale=float("nan"))
        self.refuse(setting, ArgumentTypeError, "scale", scale="1")
        setting.base = 3
        self.refuse(setting, ArgumentTypeError, "path must be")

    def test_a_file_that_is_no_adapter(self, setting):
        setting.adapter.write_bytes(b"nothing")
        self.refuse(setting, AdapterFileError, "safetensors")


def make_folder(name, content):
    def make(setting):
        (setting.folder / name).mkdir()
        for file, text in content.items():
            (setting.folder / name / file).write_text(text)

    return make


def make_file(name):
    return lambda setting: (setting.folder / name).write_text("mine")


def make_link(setting):
    (setting.folder / "merged").symlink_to(setting.base)


def nothing(setting):
    pass


IN_THE_WAY = {
    "the base": (nothing, "base", True, "the base is there"),
    "in the base": (nothing, "base/below", True, "the base is there"),
    "around the base": (nothing, "", True, "the base is there"),
    "a link to the base": (make_link, "merged", True, "the base is there"),
    "a folder in use": (make_folder("merged", {"a": ""}), "merged", False, "set `overwrite`"),
    "no checkpoint": (make_folder("merged", {"a": ""}), "merged", True, "is no checkpoint"),
    "a file": (make_file("x.safetensors"), "x.safetensors", False, "exists"),
}


class TestTarget:
    @pytest.mark.parametrize("case", IN_THE_WAY)
    def test_what_can_not_be_replaced(self, setting, case):
        make, where, overwrite, match = IN_THE_WAY[case]
        make(setting)
        before = {path: path.stat().st_mtime_ns for path in setting.folder.rglob("*")}
        with pytest.raises(ArgumentError, match=match):
            merge_into_checkpoint(
                setting.base, setting.adapter, setting.folder / where, overwrite=overwrite
            )
        assert {path: path.stat().st_mtime_ns for path in setting.folder.rglob("*")} == before

    def test_a_checkpoint_is_replaced_when_told(self, setting):
        setting.merge()
        (setting.out / "notes.txt").write_text("mine")
        setting.merge(scale=0.0, overwrite=True)
        assert not (setting.out / "notes.txt").exists()
        assert_same(tensors_in(setting.out), tensors_in(setting.base))
        assert setting.listing() == ["adapter.safetensors", "base", "merged"]

    def test_a_file_is_replaced_when_told(self, setting):
        setting.out = setting.folder / "out.safetensors"
        setting.out.write_text("mine")
        setting.merge(overwrite=True)
        assert_same(load_file(setting.out), setting.merged_in_memory())


class TestFailure:
    @pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
    def test_it_leaves_what_was_there(self, setting, monkeypatch, name):
        setting.out = setting.folder / name
        setting.merge()
        before = tensors_in(setting.out)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints, "save_file", full)
        with pytest.raises(AdapterIOError, match="No space left"):
            setting.merge(overwrite=True)
        assert_same(tensors_in(setting.out), before)
        assert setting.listing() == ["adapter.safetensors", "base", name]

    def test_the_next_clears_what_a_killed_one_left(self, setting):
        draft = setting.folder / ".merged.0123cdef.tmp"
        for folder in (draft, setting.folder / "merged.new"):
            folder.mkdir()
            (folder / "half").write_text("")
        setting.merge()
        assert setting.listing() == ["adapter.safetensors", "base", "merged", "merged.new"]
        assert not draft.exists()
        assert not (setting.out / "half").exists()

    def test_the_old_one_comes_back_if_the_new_one_can_not_take_its_place(
        self, setting, monkeypatch
    ):
        setting.merge()
        before = tensors_in(setting.out)

        def first_fails(real, source, target):
            if target == setting.out:
                monkeypatch.undo()
                raise OSError(5, "Input/output error")
            real(source, target)

        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, partial(first_fails, getattr(os, name)))
        with pytest.raises(AdapterIOError, match="Input/output error"):
            setting.merge(scale=0.0, overwrite=True)
        assert_same(tensors_in(setting.out), before)
        assert setting.listing() == ["adapter.safetensors", "base", "merged"]

    def test_no_folder_to_write_into(self, setting):
        setting.out = setting.folder / "a" / "b"
        with pytest.raises(AdapterIOError, match="can't save to"):
            setting.merge()


class TestReading:
    def test_one_file_goes_before_shards_as_in_transformers(self, setting):
        save_file({"only": torch.ones(2)}, setting.base / "model.safetensors")
        assert list(open_checkpoint(setting.base).files) == ["only"]

    def test_what_is_no_checkpoint(self, setting):
        for path in (setting.folder, setting.folder / "nowhere"):
            with pytest.raises(AdapterIOError, match=r"holds neither|can't read"):
                open_checkpoint(path)
        shard = next(setting.base.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-5])
        with pytest.raises(AdapterFileError, match="not a complete safetensors file"):
            setting.merge()


class TestBelonging:
    def test_all_is_well(self, tmp_path):
        setting = Setting(tmp_path, Zoo(), "proj|embed|conv|up|packed|apart", also_train="norm")
        assert misfits(setting.base, setting.adapter) == []

    def test_a_base_in_another_dtype_is_the_same_base(self, setting):
        state = {name: value.bfloat16() for name, value in tensors_in(setting.base).items()}
        save_sharded(state, setting.base, 2)
        assert misfits(setting.base, setting.adapter) == []

    def test_everything_that_is_wrong_is_listed(self, setting):
        state = tensors_in(setting.base)
        state["layers.1.attn.v_proj.weight"] += 1
        save_sharded(state, setting.base, 2)
        key = "layers.1.attn.v_proj.weight"
        values = f"{key}: has other values than the weight that the adapter was saved from"
        assert misfits(setting.base, setting.adapter) == [values]
        state["layers.0.attn.v_proj.weight"] = torch.zeros(8, 7)
        state["layers.1.attn.q_proj.weight"] = torch.zeros(8, 8, dtype=torch.int8)
        save_sharded(state, setting.base, 2)
        shape, quantized, other = misfits(setting.base, setting.adapter)
        assert shape.startswith("layers.0.attn.v_proj.weight: the weight has the shape (8, 7)")
        assert quantized.startswith("layers.1.attn.q_proj.weight: is quantised or packed there")
        assert other == values

    def test_weights_and_shapes_by_the_names_of_the_adapter(self, tmp_path):
        setting = Setting(tmp_path, Zoo(), "proj|packed", method="bat")
        state = {f"model.{name}": one for name, one in tensors_in(setting.base).items()}
        save_sharded(state, setting.base, 2)
        checkpoint, header = open_checkpoint(setting.base), disha.inspect_adapter(setting.adapter)
        weight = base_weights(checkpoint, header)
        assert torch.equal(weight("proj"), state["model.proj.weight"])
        with pytest.raises(disha.ConversionError, match="in_proj_weight is not the weight of a"):
            weight("packed.q_proj")
        shapes = base_shapes(checkpoint, ["proj.weight", "proj.bias"])
        assert shapes == {"proj.weight": (10, 8), "proj.bias": (10,)}
        state["model.proj.weight"] += 1
        save_sharded(state, setting.base, 2)
        with pytest.raises(AdapterFileError, match=r"proj\.weight: has other values"):
            base_weights(open_checkpoint(setting.base), header)("proj")


def merge_in(folder):
    merge_into_checkpoint(folder / "base", folder / "adapter.safetensors", folder / "merged")


TOWER = {**SIZES, "image_size": 8, "patch_size": 4}
ROTATED = {"rope_type": "default", "mrope_section": [1, 1, 0]}  # which of a head's pairs turn
VISION = {  # text, tower
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **TOWER}),
    "gemma3": ({"head_dim": 4}, {"vision_use_head": False, **TOWER}),
    "qwen2_vl": ({"rope_scaling": ROTATED}, {"depth": 1, "embed_dim": 16, "hidden_size": 16}),
}


class TestTransformers:
    def merged(self, tmp_path, model, save, adapt, target, dtype=torch.float32, **arguments):
        """Merge into what `save` writes, in memory into `adapt`; return both, as one class."""
        model.to(dtype)
        save.save_pretrained(tmp_path / "base", max_shard_size="3KB")
        assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
        perturb(disha.inject_adapters(adapt, target, 5, **arguments))
        disha.save_adapter(adapt, tmp_path / "adapter.safetensors")
        merge_in(tmp_path)
        loaded = type(save).from_pretrained(tmp_path / "merged", dtype=dtype)
        disha.merge_adapters(adapt)
        return loaded, save

    def assert_same_model(self, loaded, model):
        assert_same(loaded.state_dict(), base_state(model))
        tokens = torch.arange(8).view(1, 8)
        model.eval()
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])

    @pytest.mark.parametrize(
        ("name", "method", "dtype"),
        [
            ("llama", "bone", torch.bfloat16),
            ("llama", "bat", torch.float32),
            ("gpt2", "bone", torch.float32),
            ("gpt2", "bat", torch.bfloat16),
        ],
    )
    def test_from_pretrained_reads_the_merged_model(self, tmp_path, name, method, dtype):
        model = {"gpt2": gpt2, "llama": llama}[name]()
        target = "all-linear"
        self.assert_same_model(
            *self.merged(tmp_path, model, model, model, target, dtype, method=method)
        )

    def test_an_adapter_of_the_inner_model(self, tmp_path):
        model = llama()
        self.assert_same_model(*self.merged(tmp_path, model, model, model.model, "proj"))

    def test_the_checkpoint_of_the_inner_model(self, tmp_path):
        model = llama()
        self.assert_same_model(*self.merged(tmp_path, model, model.model, model, "proj"))

    @pytest.mark.parametrize("name", VISION)
    def test_text_layers_that_have_other_names_in_the_model(self, tmp_path, name):
        text, tower = VISION[name]
        config = AutoConfig.for_model(name, text_config=SIZES | text, vision_config=tower)
        model = AutoModelForImageTextToText.from_config(config)
        merged = self.merged(tmp_path, model, model, model, "all-linear", also_train="norm")
        self.assert_same_model(*merged)

    def test_a_tied_embedding(self, tmp_path):
        model = llama(tie_word_embeddings=True, pad_token_id=None)
        self.assert_same_model(*self.merged(tmp_path, model, model, model, "embed_tokens"))

    def test_a_tied_embedding_without_its_head_is_refused(self, tmp_path):
        model = llama(tie_word_embeddings=True, pad_token_id=None)
        with pytest.raises(MergeError, match="tied to an output head"):
            self.merged(tmp_path, model, model, model, "embed_tokens", exclude="lm_head")


SINGLE_EXPERTS = {"Mixtral": "bone", "Qwen3-MoE": "bat", "DeepSeek-V3": "bone", "OLMoE": "bat"}
"""Models whose checkpoints store experts one by one."""


class TestExpertsStoredOneByOne:
    """`transformers` joins them as it loads the model, so the adapter names their stacks."""

    @staticmethod
    def saved(tmp_path, name, dtype=torch.float32, **arguments):
        """A model of which the base and an adapter are saved."""
        model = build(name, "eager").to(dtype)
        model.save_pretrained(tmp_path / "base", max_shard_size="4KB")
        assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
        stored = open_checkpoint(tmp_path / "base").files
        assert any(".experts.0." in key for key in stored)
        perturb(disha.inject_adapters(model, r"experts\.\w+_proj$|o_proj", 3, **arguments))
        disha.save_adapter(model, tmp_path / "adapter.safetensors")
        return model

    @pytest.mark.parametrize(("name", "method"), SINGLE_EXPERTS.items())
    def test_merging_writes_what_transformers_writes(self, tmp_path, name, method):
        dtype = torch.bfloat16 if name == "Mixtral" else torch.float32
        model = self.saved(tmp_path, name, dtype, method=method)
        assert misfits(tmp_path / "base", tmp_path / "adapter.safetensors") == []
        merge_in(tmp_path)
        disha.merge_adapters(model)
        model.save_pretrained(tmp_path / "expected", state_dict=base_state(model))
        assert_same(tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "expected"))
        assert not torch.equal(*(
            next(value for key, value in tensors_in(tmp_path / folder).items() if ".1.w3" in key
                 or ".1.up_proj" in key)
            for folder in ("base", "merged")
        ))  # fmt: skip

    def test_a_stack_that_is_saved_beside_the_blocks(self, tmp_path):
        model = self.saved(tmp_path, "Qwen3-MoE")
        disha.remove_adapters(model)
        disha.inject_adapters(model, "o_proj", 3, also_train=r"experts\.gate_up_proj")
        with torch.no_grad():
            model.model.layers[0].mlp.experts.gate_up_proj.add_(1)
        disha.save_adapter(model, tmp_path / "adapter.safetensors")
        merge_in(tmp_path)
        before, after = tensors_in(tmp_path / "base"), tensors_in(tmp_path / "merged")
        for key, value in before.items():
            expected = value + (".experts." in key and "down" not in key)
            torch.testing.assert_close(after[key], expected, rtol=0, atol=0)

    def test_other_experts_are_another_base(self, tmp_path):
        self.saved(tmp_path, "OLMoE")
        state = tensors_in(tmp_path / "base")
        key = next(key for key in state if ".experts.3.gate_proj" in key)
        save_file(state | {key: state[key] + 1}, tmp_path / "other.safetensors")
        [wrong] = misfits(tmp_path / "other.safetensors", tmp_path / "adapter.safetensors")
        assert wrong.startswith("model.layers.0.mlp.experts.gate_up_proj: has other values")

    def test_quantized_and_missing_experts_are_named(self, tmp_path):
        self.saved(tmp_path, "Qwen3-MoE")
        path, adapter = tmp_path / "other.safetensors", tmp_path / "adapter.safetensors"
        state = {
            key: value.to(torch.float8_e4m3fn) if ".experts." in key else value
            for key, value in tensors_in(tmp_path / "base").items()
        }
        save_file(state, path)
        found = misfits(path, adapter)
        assert [one.partition(": is quantised")[0].rpartition(".")[2] for one in found] == [
            "gate_up_proj",
            "down_proj",
        ]
        del state[next(key for key in state if ".experts.0.down_proj" in key)]
        save_file(state, path)
        with pytest.raises(AdapterFileError, match=r"lacks model\.layers\.0\.mlp\.experts\.down_"):
            misfits(path, adapter)


MEMORY = """
    import sys
    from pathlib import Path
    from disha.interop.checkpoints import merge_into_checkpoint

    def peak():
        [line] = [l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l]
        return int(line.split()[1]) / 1024

    def merge(folder):
        merge_into_checkpoint(folder / "base", folder / "adapter.safetensors", folder / "merged")

    small, large = map(Path, sys.argv[1:])
    merge(small)  # what is loaded on first use is no growth
    before = peak()
    merge(large)
    print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from there")
@pytest.mark.parametrize(("method", "shards"), [("bat", 16)])
def test_memory_is_that_of_some_shards(tmp_path, method, shards):
    """128 MiB in tensors of 2 MiB, 8 MiB a shard; every second is merged."""
    for name, sizes, count in (("small", (64, 64), 2), ("large", (512, 1024), 64)):
        (tmp_path / name).mkdir()
        layers = [nn.Linear(*sizes, bias=False, device="meta") for _ in range(count)]
        model = nn.Sequential(*layers).to_empty(device="cpu")
        for layer in layers:
            layer.weight.data.fill_(0.5)
        setting = Setting(tmp_path / name, model, "[13579]$", 8, shards, method=method)
    assert sum(path.stat().st_size for path in setting.base.iterdir()) > 128 * 2**20
    code = textwrap.dedent(MEMORY)
    command = [sys.executable, "-c", code, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"{method}, {shards} shards: {float(done.stdout):.1f} MiB")  # shown by pytest -rP
    assert float(done.stdout) < 40
    assert_same(tensors_in(tmp_path / "large" / "merged"), setting.merged_in_memory())
    shutil.rmtree(tmp_path)  # pytest would keep it for a while
