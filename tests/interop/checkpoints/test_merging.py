"""Merging an adapter file into a base checkpoint without the model."""

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

import disha
from disha import AdapterFileError, AdapterIOError, ArgumentError, ArgumentTypeError, MergeError
from disha.files import disk
from disha.interop.checkpoints import merge_into_checkpoint, merging
from tests.base_checkpoints import Setting, Zoo, base_state, save_sharded, tensors_in
from tests.conftest import Layered, assert_same
from tests.reference import METHODS

OTHERS = "padded|sliced|recurrent|experts|stacked"


DECLARED = {
    "layouts": {"experts": "expert in out", "stacked": "expert out in"},
    "rows": {"sliced": [(1, 4), (6, 9)], "experts": [(2, 5)]},
}
"""What of the zoo needs more than a target."""


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

    @pytest.mark.parametrize("method", METHODS)
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

    @pytest.mark.parametrize(
        ("prefix", "head"), [("", "head."), ("model.", "head."), ("", "output.projection.")]
    )
    def test_all_stored_copies_of_a_tied_weight(self, tmp_path, prefix, head):
        model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
        model["head"].weight = model["embed"].weight
        setting = Setting(tmp_path, model, ["embed", "head"])

        def as_stored(state):
            return {f"{prefix}{name.replace('head.', head)}": state[name] for name in state}

        state = as_stored(base_state(model))
        save_sharded({name: state[name].clone() for name in state}, setting.base, 2)
        (setting.base / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
        setting.merge()
        assert_same(tensors_in(setting.out), as_stored(setting.merged_in_memory()))


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

    def test_shards_in_folders(self, setting):
        index = setting.base / "model.safetensors.index.json"
        fields = json.loads(index.read_text())
        for number, shard in enumerate(sorted(setting.base.glob("*.safetensors"))):
            moved = f"{number}/weights.safetensors"
            (setting.base / str(number)).mkdir()
            shard.rename(setting.base / moved)
            for name, file in fields["weight_map"].items():
                if file == shard.name:
                    fields["weight_map"][name] = moved
        index.write_text(json.dumps(fields))
        setting.merge()
        assert_same(tensors_in(setting.out), setting.merged_in_memory())

    def test_a_file_without_metadata_gets_the_format_that_loaders_ask_for(self, setting):
        single = setting.folder / "whole.safetensors"
        save_file(tensors_in(setting.base), single)
        merge_into_checkpoint(single, setting.adapter, setting.out)
        with safe_open(setting.out / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_any_dtype_is_copied_as_bytes(self, setting):
        state = tensors_in(setting.base)
        state["f8"] = torch.arange(6, dtype=torch.uint8).view(torch.float8_e4m3fn)
        # Neither torch nor safetensors has it in the first supported releases.
        float4 = getattr(torch, "float4_e2m1fn_x2", None)
        if float4 in safetensors.torch._SIZE:
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
        kept = [
            *("config.json", "tokenizer.json", "tokenizer.model", "1_Pooling/config.json"),
            *("2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/config.json"),
            "3_Dense/pytorch_model.bin",
        ]
        left = [
            *("pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "q.gguf"),
            *("pytorch_model.bin.index.json", ".gitattributes", "flax_model.msgpack"),
            *("rust_model.ot", "original/consolidated.00.pth", "onnx/config.json"),
        ]
        kept.append(left.pop())
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


def move_adapter(setting):
    """Put the adapter into a folder that is a checkpoint."""
    (setting.folder / "merged").mkdir()
    (setting.folder / "merged" / "model.safetensors").touch()
    setting.adapter = setting.adapter.rename(setting.folder / "merged" / "adapter.safetensors")


def nothing(setting):
    pass


IN_THE_WAY = {
    "the base": (nothing, "base", True, "the base is there"),
    "in the base": (nothing, "base/below", True, "the base is there"),
    "around the base": (nothing, "", True, "the base is there"),
    "a link to the base": (make_link, "merged", True, "the base is there"),
    "the adapter": (nothing, "adapter.safetensors", True, "the adapter is there"),
    "around the adapter": (move_adapter, "merged", True, "the adapter is there"),
    "a folder in use": (make_folder("merged", {"a": ""}), "merged", False, "set `overwrite`"),
    "no checkpoint": (make_folder("merged", {"a": ""}), "merged", True, "is not a checkpoint"),
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

        monkeypatch.setattr(merging, "save_file", full)
        with pytest.raises(AdapterIOError, match="No space left"):
            setting.merge(overwrite=True)
        assert_same(tensors_in(setting.out), before)
        assert setting.listing() == ["adapter.safetensors", "base", name]

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

        monkeypatch.setattr(disk, "_exchange", lambda *_: False)  # as a system that can't
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, partial(first_fails, getattr(os, name)))
        with pytest.raises(AdapterIOError, match="Input/output error"):
            setting.merge(scale=0.0, overwrite=True)
        assert_same(tensors_in(setting.out), before)
        assert setting.listing() == ["adapter.safetensors", "base", "merged"]

    def test_a_damaged_shard_of_which_nothing_is_adapted(self, setting):
        shard = setting.base / "model-00004-of-00004.safetensors"
        save_file({"other": torch.ones(4)}, shard)
        index = setting.base / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["other"] = shard.name
        index.write_text(json.dumps(content))
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(AdapterFileError, match=f"{shard} is not a complete safetensors file"):
            setting.merge()
        assert setting.listing() == ["adapter.safetensors", "base"]

    def test_no_folder_to_write_into(self, setting):
        setting.out = setting.folder / "a" / "b"
        with pytest.raises(AdapterIOError, match="can't save to"):
            setting.merge()


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
