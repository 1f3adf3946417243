"""Adapters and base checkpoints on disk: merging without the model, and comparing."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import disha
from disha import (
    AdapterFileError,
    AdapterIOError,
    ArgumentError,
    ArgumentTypeError,
    DishaError,
    MergeError,
)
from disha.files.json_files import read_json
from disha.files.reading import LARGEST_TEXT
from disha.functional import PATTERNS
from disha.interop.checkpoints import (
    MergedCheckpoint,
    merge_into_checkpoint,
    open_checkpoint,
    verify_against,
)
from disha.interop.checkpoints import reading as reading_module
from disha.interop.checkpoints.stacks import Stack
from tests.conftest import Layered, Tied, perturb
from tests.test_experts import build

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


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


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


class Setting:
    """A base checkpoint, an adapter file, and what merging in memory makes of the two."""

    def __init__(self, folder, model, target="all-linear", r=3, shards=3, **arguments):
        self.folder = folder
        self.base = save_sharded(model.state_dict(), folder / "base", shards)
        self.adapter = folder / "adapter.safetensors"
        self.out = folder / "merged"
        disha.inject_adapters(model, target, r, **arguments)
        perturb(model)
        disha.save_adapter(model, self.adapter)
        self.model = model

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
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("target", "arguments"),
        [
            ("proj|embed|conv|up|packed|apart", {}),
            ("proj|embed|conv|up|packed|apart", {"r_out": 2}),
            ("proj|packed|apart", {"method": "bat"}),
            ("proj|packed|apart", {"method": "bat", "scale": -0.7, "dtype": torch.float64}),
            ("proj|embed|conv|up", {"scale": 0.3, "dtype": torch.bfloat16}),
            (OTHERS, DECLARED),
            (OTHERS, {**DECLARED, "method": "bat", "scale": -0.7}),
            (OTHERS, {"layouts": DECLARED["layouts"], "r_out": 5, "exclude": "padded"}),
        ],
    )
    def test_bit_for_bit(self, tmp_path, dtype, target, arguments):
        setting = Setting(tmp_path, Zoo().to(dtype), target, **arguments)
        report = setting.merge()
        before, merged = tensors_in(setting.base), tensors_in(setting.out)
        assert_same_bits(merged, setting.merged_in_memory())
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
        assert_same_bits(tensors_in(setting.out), expected)
        assert_same_bits(load_file(tmp_path / "whole-merged.safetensors"), expected)
        assert_same_bits(load_file(tmp_path / "base-merged.safetensors"), expected)

    def test_a_model_that_is_itself_one_linear(self, tmp_path):
        setting = Setting(tmp_path, nn.Linear(4, 3), shards=1)
        setting.merge()
        assert_same_bits(tensors_in(setting.out), setting.merged_in_memory())

    def test_scale_in_place_of_the_adapters(self, setting):
        setting.merge(scale=-0.25)
        disha.set_adapter_scale(setting.model, -0.25)
        assert_same_bits(tensors_in(setting.out), setting.merged_in_memory())

    def test_parameters_saved_beside_the_blocks(self, tmp_path):
        model = Layered().bfloat16()
        setting = Setting(tmp_path, model, "proj", also_train=r"norm|head\.weight")
        with torch.no_grad():
            model.layers[0]["attn"].norm.weight.add_(0.5)
            model.head.weight.mul_(2)
        disha.save_adapter(model, setting.adapter)
        report = setting.merge()
        assert "head.weight" in report.replaced
        assert_same_bits(tensors_in(setting.out), setting.merged_in_memory())

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
        assert_same_bits(merged, expected | {name: before[name] for name in beside})

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_another_dtype_rounds_once(self, tmp_path, dtype):
        setting = Setting(tmp_path, Zoo(), "proj|packed", method="bat")
        setting.merge(dtype=dtype)
        expected = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in setting.merged_in_memory().items()
        }
        assert_same_bits(tensors_in(setting.out), expected)

    def test_from_16_bits_to_32_nothing_is_rounded(self, tmp_path):
        setting = Setting(tmp_path, nn.Linear(4, 3).bfloat16(), shards=1)
        weight = tensors_in(setting.base)["weight"].float()
        block = load_file(setting.adapter)["bone_block"].float()
        setting.merge(dtype=torch.float32)
        expected = weight + block[torch.arange(4) % 3].T
        assert torch.equal(tensors_in(setting.out)["weight"], expected)


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
        setting.merge(dtype=torch.bfloat16)
        found = tensors_in(setting.out)
        for name in {"f8", "a.f4", "complex"} & state.keys():
            assert found[name].dtype == state[name].dtype
            assert torch.equal(found[name].view(torch.uint8), state[name].view(torch.uint8))
        assert found["infinite"].isinf().tolist() == [True, False]

    def test_every_tensor_starts_at_a_multiple_of_its_size(self, setting):
        state = tensors_in(setting.base)
        state |= {"odd": torch.ones(3, dtype=torch.uint8), "wide": torch.ones(3, dtype=torch.int64)}
        save_sharded(state, setting.base, 1)
        setting.merge(dtype=torch.bfloat16)
        [shard] = setting.out.glob("*.safetensors")
        data = shard.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        sizes = {"I64": 8, "BF16": 2, "U8": 1}
        assert length % 8 == 0
        assert len(header) == len(state) + 1
        for name, fields in header.items():
            if name != "__metadata__":
                assert fields["data_offsets"][0] % sizes[fields["dtype"]] == 0, name

    def test_the_same_bytes_again(self, setting):
        setting.merge()
        first = {path.name: path.read_bytes() for path in setting.out.iterdir()}
        setting.merge(overwrite=True)
        assert {path.name: path.read_bytes() for path in setting.out.iterdir()} == first

    def test_other_files_come_along_and_other_weights_do_not(self, setting):
        base = setting.base
        kept = ["config.json", "tokenizer.json", "tokenizer.model", "1_Pooling/config.json"]
        left = [
            *("pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "q.GGUF"),
            *("pytorch_model.bin.index.json", ".gitattributes"),
        ]
        for name in kept + left:
            (base / name).parent.mkdir(exist_ok=True)
            (base / name).write_text(f"{{}} {name}")
        (base / ".git").mkdir()
        (base / ".git" / "config").write_text("")
        secret = setting.folder / "secret"
        secret.write_text("s")
        (base / "stolen.txt").symlink_to(secret)
        (base / "all").symlink_to(setting.folder)
        (base / "vocab.txt").symlink_to("tokenizer.json")
        report = setting.merge()
        for name in [*kept, "vocab.txt"]:
            assert (setting.out / name).read_bytes() == (base / name).read_bytes()
            assert name in report.files
        assert set(report.left_out) == {*left, ".git/", "stolen.txt", "all/"}
        written = {p.relative_to(setting.out).as_posix() for p in setting.out.rglob("*")}
        assert written == {*report.files, "1_Pooling", "onnx"} - {"onnx"}
        assert "stolen.txt" in str(report)

    def test_links_of_the_cache_of_hugging_face_are_followed(self, tmp_path):
        setting = Setting(tmp_path, Layered(), shards=1)
        blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        (setting.base / "config.json").write_text("{}")
        for number, path in enumerate(sorted(setting.base.iterdir())):
            path.rename(blobs / f"blob{number}")
            (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
        report = merge_into_checkpoint(snapshot, setting.adapter, setting.out)
        assert report.left_out == ()
        assert (setting.out / "config.json").read_text() == "{}"
        assert_same_bits(tensors_in(setting.out), setting.merged_in_memory())

    def test_another_dtype_is_told_to_loaders(self, setting):
        config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "x": 1}, "y": None}
        config["quantization_config"] = {"dtype": "float32"}
        (setting.base / "config.json").write_text(json.dumps(config))
        metadata = {"total_size": 1, "dtype": "float32", "total_parameters": 7}
        save_sharded(tensors_in(setting.base), setting.base, 2, metadata)
        report = setting.merge(dtype=torch.bfloat16)
        written = json.loads((setting.out / "config.json").read_text())
        assert written == {
            "torch_dtype": "bfloat16",
            "text_config": {"dtype": "bfloat16", "x": 1},
            "y": None,
            "quantization_config": {"dtype": "float32"},
        }
        index = json.loads((setting.out / "model.safetensors.index.json").read_text())
        size = sum(tensor.nbytes for tensor in tensors_in(setting.out).values())
        assert report.nbytes == size
        assert index["metadata"] == {
            "total_size": size,
            "dtype": "bfloat16",
            "total_parameters": 7,
        }

    def test_permissions_are_those_of_new_folders_and_files(self, setting):
        setting.merge()
        plain = setting.folder / "plain"
        plain.mkdir()
        assert setting.out.stat().st_mode == plain.stat().st_mode
        (plain / "file").touch()
        expected = (plain / "file").stat().st_mode
        assert {path.stat().st_mode for path in setting.out.iterdir()} == {expected}

    def test_progress_ends_with_all(self, setting):
        steps = []
        report = setting.merge(progress=lambda done, total: steps.append((done, total)))
        assert len(steps) == len(tensors_in(setting.base))
        assert steps[-1] == (report.nbytes, report.nbytes)
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)

    def test_the_report_is_fit_to_be_printed(self, tmp_path):
        report = MergedCheckpoint(tmp_path / "\x1b", ("a",), (), ("b",), ("c\x1b[2J",), 4)
        assert "\x1b" not in str(report)
        assert "not copied: c" in str(report)


class TestNames:
    def merged_under(self, tmp_path, old, new, **arguments):
        """Merge into a checkpoint whose names have another prefix than the adapter's model."""
        setting = Setting(tmp_path, nn.ModuleDict({"net": Layered()}), **arguments)
        state = {
            f"{new}{name.removeprefix(old)}": value
            for name, value in tensors_in(setting.base).items()
        }
        save_sharded(state, setting.base, 2)
        setting.merge()
        expected = setting.merged_in_memory()
        found = tensors_in(setting.out)
        assert_same_bits(
            found, {f"{new}{name.removeprefix(old)}": value for name, value in expected.items()}
        )
        return setting

    def test_the_checkpoint_has_a_prefix_more(self, tmp_path):
        setting = self.merged_under(tmp_path, "", "model.", also_train="norm")
        assert verify_against(setting.base, setting.adapter).ok

    def test_the_checkpoint_has_a_prefix_less(self, tmp_path):
        self.merged_under(tmp_path, "net.", "")

    def test_names_as_they_are_come_first(self, tmp_path):
        setting = Setting(tmp_path, Layered())
        state = tensors_in(setting.base)
        twin = {f"twin.{name}": torch.zeros_like(value) for name, value in state.items()}
        save_sharded(state | twin, setting.base, 2)
        setting.merge()
        assert_same_bits(tensors_in(setting.out), setting.merged_in_memory() | twin)

    def test_two_prefixes_that_lead_to_all_are_refused(self, tmp_path):
        setting = Setting(tmp_path, Layered())
        state = tensors_in(setting.base)
        save_sharded(
            {f"{p}.{n}": v.clone() for p in "ab" for n, v in state.items()}, setting.base, 2
        )
        with pytest.raises(AdapterFileError, match=r"unclear.*'a'.*'b'"):
            setting.merge()
        assert not setting.out.exists()

    def test_a_missing_layer_is_named_with_what_is_near(self, setting):
        state = tensors_in(setting.base)
        state["layers.1.attn.query.weight"] = state.pop("layers.1.attn.q_proj.weight")
        save_sharded(state, setting.base, 2)
        message = r"1 missing[\s\S]*layers\.1\.attn\.q_proj: missing[\s\S]*names: layers\.1\.attn\."
        with pytest.raises(AdapterFileError, match=message):
            setting.merge()

    def test_the_nearest_names_are_looked_up_for_a_few_only(self, tmp_path):
        setting = Setting(tmp_path, nn.Sequential(*map(nn.Linear, [3] * 9, [3] * 9)))
        save_sharded({"transformer.wte": torch.zeros(1)}, setting.base, 1)
        remarks = [one.remark for one in verify_against(setting.base, setting.adapter).missing]
        assert ["similar names" in remark for remark in remarks] == [True] * 5 + [False] * 4

    def test_a_tied_head_that_is_stored_once_says_what_to_do(self, tmp_path):
        setting = Setting(tmp_path, Layered(), "head")
        state = tensors_in(setting.base)
        del state["head.weight"]
        save_sharded(state, setting.base, 2)
        with pytest.raises(AdapterFileError, match=r"tied[\s\S]*untie=True"):
            setting.merge()

    def test_projections_that_are_layers_of_their_own_are_no_packed_ones(self, tmp_path):
        model = Layered()
        setting = Setting(tmp_path, model, "q_proj")
        state = tensors_in(setting.base)
        state["layers.0.attn.in_proj_weight"] = torch.zeros(24, 8)
        save_sharded(state, setting.base, 2)
        setting.merge()
        assert not tensors_in(setting.out)["layers.0.attn.in_proj_weight"].any()


class TestRefused:
    def refuse(self, setting, error, match, **arguments):
        """Merge, which raises and leaves everything as it was."""
        before = setting.listing()
        with pytest.raises(error, match=match):
            setting.merge(**arguments)
        assert setting.listing() == before

    def change(self, setting, **tensors):
        save_sharded(tensors_in(setting.base) | tensors, setting.base, 3)

    def test_other_weights_unless_forced(self, setting):
        self.change(setting, **{"head.weight": torch.randn(12, 8)})
        self.refuse(setting, AdapterFileError, r"0 unfit, 1 from another base[\s\S]*force")
        setting.merge(force=True)
        expected = setting.model
        expected.head.weight.data = tensors_in(setting.base)["head.weight"].clone()
        assert_same_bits(tensors_in(setting.out), setting.merged_in_memory())

    def test_merging_twice(self, setting):
        setting.merge()
        again = Setting.__new__(Setting)
        again.__dict__.update(setting.__dict__, base=setting.out, out=setting.folder / "again")
        self.refuse(again, AdapterFileError, "without any merged adapter")

    def test_another_shape(self, setting):
        self.change(setting, **{"head.weight": torch.randn(12, 9)})
        self.refuse(setting, AdapterFileError, r"\(12, 9\).*\(12, 8\)", force=True)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_a_quantised_weight(self, setting, dtype):
        self.change(setting, **{"head.weight": torch.ones(12, 8).to(dtype)})
        self.refuse(setting, AdapterFileError, "quantised or packed; give the original checkpoint")

    def test_a_quantised_weight_under_other_names(self, setting):
        state = tensors_in(setting.base)
        del state["head.weight"]
        save_sharded(state | {"head.qweight": torch.zeros(3)}, setting.base, 3)
        self.refuse(setting, AdapterFileError, "similar names: head.qweight")

    def test_a_parameter_beside_the_blocks_that_is_missing_or_misshapen(self, tmp_path):
        setting = Setting(tmp_path, Layered(), "proj", also_train="norm")
        state = tensors_in(setting.base)
        del state["layers.0.attn.norm.weight"]
        state["layers.1.attn.norm.bias"] = torch.zeros(9)
        save_sharded(state, setting.base, 2)
        match = r"1 missing, 1 unfit[\s\S]*norm\.weight: missing[\s\S]*\(9,\) there and \(8,\)"
        self.refuse(setting, AdapterFileError, match)

    def test_values_that_are_not_finite_in_the_adapter(self, setting):
        tensors = load_file(setting.adapter)
        with safe_open(setting.adapter, "pt") as file:
            metadata = {"disha": file.metadata()["disha"]}  # a checksum would be wrong
        tensors["head.bone_block"][0, 0] = float("nan")
        save_file(tensors, setting.adapter, metadata)
        self.refuse(setting, AdapterFileError, "head: not finite")

    def test_a_merged_weight_that_is_not_finite_is_found_midway(self, tmp_path):
        setting = Setting(tmp_path, Layered().half(), "proj", shards=4)
        written = []
        match = r"layers\.1\.attn\.v_proj.*not finite in torch\.float16"
        with torch.no_grad():
            setting.model.layers[1]["attn"].v_proj.disha["default"].block.fill_(6e4)
        disha.save_adapter(setting.model, setting.adapter)
        arguments = {"scale": 2.0, "progress": lambda done, total: written.append(done)}
        self.refuse(setting, MergeError, match, **arguments)
        assert written  # so something had been, and is gone

    def test_a_dtype_that_is_too_narrow_for_another_tensor(self, setting):
        self.change(setting, other=torch.tensor([1e5]))
        self.refuse(setting, MergeError, r"other.*float16", dtype=torch.float16)

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
            self.refuse(setting, MergeError, "tie_word_embeddings to false")
        setting.merge(force=tied)
        assert_same_bits(tensors_in(setting.out), setting.merged_in_memory())

    @pytest.mark.parametrize("what", ["saved with the blocks", "adapted"])
    def test_an_embedding_that_is_stored_twice(self, tmp_path, what):
        if what == "adapted":
            model, says = Layered(), r"head\.weight and embed\.weight"
            model.head.weight.data = model.embed.weight.data.clone()
            setting = Setting(tmp_path, model, "head")
        else:
            says = r"embed\.weight and head\.weight"
            setting = Setting(tmp_path, Tied(), "q_proj", also_train="embed")
        config = {"model_type": "llama", "vocab_size": 12}
        (setting.base / "config.json").write_text(json.dumps(config))
        self.refuse(setting, MergeError, f"{says} hold the same values")
        setting.merge(force=True)
        for change in ({"tie_word_embeddings": False}, {"vocab_size": 7}):
            (setting.base / "config.json").write_text(json.dumps(config | change))
            setting.merge(overwrite=True)

    def test_the_configuration_beside_a_single_file_counts(self, tmp_path):
        setting = Setting(tmp_path, Layered(), "embed", shards=1)
        (setting.base / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
        (file,) = setting.base.glob("*.safetensors")
        with pytest.raises(MergeError, match="may be tied"):
            merge_into_checkpoint(file, setting.adapter, tmp_path / "out.safetensors")

    def test_bad_arguments(self, setting):
        self.refuse(setting, ArgumentError, "scale", scale=float("nan"))
        self.refuse(setting, ArgumentTypeError, "scale", scale="1")
        self.refuse(setting, ArgumentError, "float16", dtype=torch.int8)
        self.refuse(setting, ArgumentTypeError, "dtype", dtype="float16")
        setting.base = 3
        self.refuse(setting, ArgumentTypeError, "path must be")

    def test_a_file_that_is_no_adapter(self, setting):
        setting.adapter.write_bytes(b"nothing")
        self.refuse(setting, AdapterFileError, "not a complete safetensors file")


class TestCraftedAdapters:
    """Headers that lie, over a checkpoint that is what it says."""

    def crafted(self, setting, **changes):
        with safe_open(setting.adapter, "pt") as file:
            header = json.loads(file.metadata()["disha"])
        [layer] = header["layers"]
        for field, value in changes.items():
            (header["config"] if field in ("method", "r_out") else layer)[field] = value
        tensors = load_file(setting.adapter)
        save_file(tensors, setting.adapter, {"disha": json.dumps(header)})

    @pytest.mark.parametrize(
        "changes",
        [
            {"r": 4},
            {"r": 2**31 - 1},
            {"r_out": 5},
            {"r_out": 4},
            {"in": 9},
            {"out": 2**31 - 1},
            {"layout": "in out", "in": 8, "out": 7},
            {"layout": "out in *kernel"},
            {"layout": "in out *kernel"},
            {"layout": "index out"},
            {"layout": "expert out in"},
            {"rows": [[4, 16]]},
            {"method": "bone", "r": 1},
        ],
    )
    @pytest.mark.parametrize("method", ["bone", "bat"])
    def test_a_header_that_lies_is_refused(self, tmp_path, changes, method):
        setting = Setting(tmp_path, Layered(), "head", method=method)
        self.crafted(setting, **changes)
        with pytest.raises(DishaError):
            setting.merge(force=True)
        assert not setting.out.exists()

    def test_a_block_without_dimensions(self, tmp_path):
        for layout in PATTERNS:
            setting = Setting(tmp_path, Layered(), "head")
            self.crafted(setting, layout=layout)
            with safe_open(setting.adapter, "pt") as file:
                metadata = file.metadata()
            save_file({"head.bone_block": torch.tensor(1.0)}, setting.adapter, metadata)
            with pytest.raises(DishaError):
                setting.merge(force=True)

    def test_a_packed_projection_of_a_tensor_without_dimensions(self, tmp_path):
        setting = Setting(tmp_path, Zoo(), "packed.q_proj")
        save_sharded({"packed.in_proj_weight": torch.tensor(1.0)}, tmp_path / "zero", 1)
        setting.base = tmp_path / "zero"
        with pytest.raises(AdapterFileError, match=r"the weight has the shape \(\)"):
            setting.merge()

    def test_a_name_of_many_dots_takes_no_time(self, tmp_path):
        setting = Setting(tmp_path, nn.Linear(4, 3), shards=1)
        tensors = tensors_in(setting.base)
        save_sharded(tensors | {"." * 2_000_000: torch.zeros(1)}, setting.base, 1)
        setting.merge()


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
    "the base": (nothing, "base", True, "which is an input"),
    "in the base": (nothing, "base/below", True, "it is inside the base"),
    "a file in the base": (nothing, "base/x.safetensors", True, "it is inside the base"),
    "around the base": (nothing, "", True, "it is or contains"),
    "a shard": (nothing, "base/model-00001-of-00003.safetensors", True, "which is an input"),
    "the adapter": (nothing, "adapter.safetensors", True, "which is an input"),
    "a link to the base": (make_link, "merged", True, "which is an input"),
    "a folder in use": (make_folder("merged", {"a": ""}), "merged", False, "set `overwrite`"),
    "no checkpoint": (make_folder("merged", {"a": ""}), "merged", True, "holds no checkpoint"),
    "a file for a folder": (make_file("merged"), "merged", True, "it is a file"),
    "a folder for a file": (make_folder("x.safetensors", {}), "x.safetensors", True, "is a folder"),
    "a file": (make_file("x.safetensors"), "x.safetensors", False, "it exists"),
    "no parent": (nothing, "a/b", True, "create the folder"),
}


class TestTarget:
    @pytest.mark.parametrize("case", IN_THE_WAY)
    def test_what_can_not_be_replaced(self, setting, case):
        make, where, overwrite, match = IN_THE_WAY[case]
        make(setting)
        before = {path: path.stat().st_mtime_ns for path in setting.folder.rglob("*")}
        with pytest.raises(AdapterIOError if case == "no parent" else ArgumentError, match=match):
            merge_into_checkpoint(
                setting.base, setting.adapter, setting.folder / where, overwrite=overwrite
            )
        assert {path: path.stat().st_mtime_ns for path in setting.folder.rglob("*")} == before

    def test_a_checkpoint_is_replaced_when_told(self, setting):
        setting.merge()
        (setting.out / "notes.txt").write_text("mine")
        setting.merge(scale=0.0, overwrite=True)
        assert not (setting.out / "notes.txt").exists()
        assert_same_bits(tensors_in(setting.out), tensors_in(setting.base))
        assert setting.listing() == ["adapter.safetensors", "base", "merged"]

    def test_an_empty_folder_is_taken(self, setting):
        setting.out.mkdir()
        setting.merge()
        assert (setting.out / "model.safetensors.index.json").exists()

    def test_a_file_is_replaced_when_told(self, setting):
        setting.out = setting.folder / "out.safetensors"
        setting.out.write_text("mine")
        setting.merge(overwrite=True)
        assert_same_bits(load_file(setting.out), setting.merged_in_memory())


KILLED = """
    import os, signal, sys
    from disha.interop.checkpoints import merge_into_checkpoint

    def progress(done, total):
        if done > total / 2:
            {action}

    merge_into_checkpoint(*sys.argv[1:], overwrite=True, progress=progress)
"""


class TestFailure:
    def run(self, setting, action):
        code = textwrap.dedent(KILLED.format(action=action))
        command = [sys.executable, "-c", code, setting.base, setting.adapter, setting.out]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_killed_midway_it_leaves_no_half_folder_and_the_next_clears_up(self, setting):
        done = self.run(setting, "os.kill(os.getpid(), signal.SIGKILL)")
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not setting.out.exists()
        assert len(setting.listing()) == 3  # what the next one clears
        setting.merge()
        assert setting.listing() == ["adapter.safetensors", "base", "merged"]
        first = tensors_in(setting.out)
        self.run(setting, "os.kill(os.getpid(), signal.SIGKILL)")
        assert_same_bits(tensors_in(setting.out), first)

    @pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
    def test_an_interruption_leaves_nothing(self, setting, name):
        def progress(done, total):
            raise KeyboardInterrupt

        setting.out = setting.folder / name
        with pytest.raises(KeyboardInterrupt):
            setting.merge(progress=progress)
        assert setting.listing() == ["adapter.safetensors", "base"]

    def test_a_base_that_shrinks_meanwhile(self, setting):
        def progress(done, total):
            for shard in setting.base.glob("*.safetensors"):
                os.truncate(shard, 10)

        with pytest.raises(DishaError):
            setting.merge(progress=progress)
        assert setting.listing() == ["adapter.safetensors", "base"]


def as_pipe(shard):
    shard.unlink()
    os.mkfifo(shard)


def cut_off(shard):
    shard.write_bytes(shard.read_bytes()[:-1])


def with_another(shard):
    save_file(load_file(shard) | {"more": torch.zeros(1)}, shard)


def with_one_of_the_next(shard):
    later = max(shard.parent.glob("*.safetensors"))
    save_file(load_file(shard) | dict([next(iter(load_file(later).items()))]), shard)


class TestHostileCheckpoints:
    def refuse(self, setting, error, match):
        for action in (
            lambda: open_checkpoint(setting.base),
            lambda: verify_against(setting.base, setting.adapter),
            setting.merge,
        ):
            with pytest.raises(error, match=match):
                action()
        assert not setting.out.exists()

    def index(self, setting, change):
        path = setting.base / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content)))

    @pytest.mark.parametrize(
        "shard",
        [
            *("../adapter.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "x.bin"),
            *("x\0.safetensors", "..\\adapter.safetensors", 3, None, ["x"]),
        ],
    )
    def test_a_shard_outside_of_the_folder_or_no_name_at_all(self, setting, shard):
        self.index(
            setting, lambda index: {"weight_map": {**index["weight_map"], "head.weight": shard}}
        )
        self.refuse(setting, AdapterFileError, "names of .safetensors files in the same folder")

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            (lambda shard: shard.unlink(), AdapterIOError, "No such file"),
            (as_pipe, AdapterIOError, "not a regular file"),
            (cut_off, AdapterFileError, "not a complete safetensors file"),
            (with_another, AdapterFileError, "'more', which does not exist"),
            (with_one_of_the_next, AdapterFileError, "get the folder again"),
        ],
    )
    def test_a_bad_shard(self, setting, change, error, match):
        change(min(setting.base.glob("*.safetensors")))
        self.refuse(setting, error, match)

    @pytest.mark.parametrize("length", [300, 5_000])
    def test_a_name_that_is_too_long_for_a_file(self, setting, length):
        name = "x" * length + ".safetensors"
        self.index(setting, lambda index: {"weight_map": dict.fromkeys(index["weight_map"], name)})
        self.refuse(setting, AdapterIOError, "File name too long")

    def test_a_tensor_that_no_shard_has(self, setting):
        def change(index):
            shard = next(iter(index["weight_map"].values()))
            return {"weight_map": {**index["weight_map"], "ghost": shard}}

        self.index(setting, change)
        self.refuse(setting, AdapterFileError, "'ghost' is not in")

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("", "not valid JSON"),
            ("{", "not valid JSON"),
            ("[" * 200_000, "not valid JSON"),
            (b"\xff\xfe\xfa", "not valid JSON"),
            ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' comes twice"),
            ('{"weight_map": {}, "weight_map": {"a": "x.safetensors"}}', "comes twice"),
            ("[]", "must be a JSON object; it is a list"),
            ("{}", "weight_map"),
            ('{"weight_map": []}', "weight_map"),
            ('{"weight_map": {"a": "\\ud800.safetensors"}}', "half of a surrogate pair"),
            ('{"weight_map": {}}', "weight_map"),
            ('{"weight_map": ' + "9" * 10_000 + "}", "not valid JSON"),
        ],
    )
    def test_a_bad_index(self, setting, text, match):
        path = setting.base / "model.safetensors.index.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        self.refuse(setting, AdapterFileError, match)

    def test_an_index_that_is_too_large(self, setting, monkeypatch):
        monkeypatch.setattr(reading_module, "LARGEST_INDEX", 100)
        self.refuse(setting, AdapterFileError, "larger than 100 bytes")

    def test_a_header_that_only_the_library_reads(self, tmp_path):
        text = b'{"a":["F32",[1],[0,4]]}'
        path = tmp_path / "base.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        assert load_file(path)["a"].tolist() == [0.0]
        with pytest.raises(AdapterFileError, match="not a complete safetensors file"):
            open_checkpoint(path)

    def test_a_configuration_that_is_too_large(self, tmp_path):
        setting = Setting(tmp_path, Layered(), "embed")
        (setting.base / "config.json").write_bytes(b" " * (LARGEST_TEXT + 1))
        with pytest.raises(AdapterFileError, match="larger than 16,777,216 bytes"):
            setting.merge()
        assert setting.listing() == ["adapter.safetensors", "base"]

    def test_a_configuration_that_is_no_file(self, tmp_path):
        os.mkfifo(tmp_path / "config.json")
        with pytest.raises(AdapterIOError, match="not a regular file"):
            read_json(tmp_path / "config.json")

    def test_a_bad_configuration(self, tmp_path):
        setting = Setting(tmp_path, Layered(), "embed")
        (setting.base / "config.json").write_text("[" * 200_000)
        with pytest.raises(AdapterFileError, match="not valid JSON"):
            setting.merge()
        with pytest.raises(AdapterFileError, match="not valid JSON"):
            setting.merge(force=True, dtype=torch.bfloat16)
        assert setting.listing() == ["adapter.safetensors", "base"]

    def test_metadata_of_an_index_that_is_no_object(self, setting):
        self.index(setting, lambda index: {**index, "metadata": 3})
        setting.merge()
        index = json.loads((setting.out / "model.safetensors.index.json").read_text())
        assert set(index["metadata"]) == {"total_size"}

    def test_pickles_are_never_opened(self, setting):
        for path in setting.base.iterdir():
            path.unlink()
        (setting.base / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80")
        self.refuse(setting, AdapterFileError, "pickle.*save_pretrained")
        setting.base = setting.base / "pytorch_model-00001-of-00002.bin"
        self.refuse(setting, AdapterFileError, "pickle")

    def test_nothing_there(self, setting):
        for path in setting.base.iterdir():
            path.unlink()
        self.refuse(setting, AdapterIOError, "holds neither")
        setting.base = setting.folder / "nowhere"
        self.refuse(setting, AdapterIOError, "No such file")
        setting.base = f"a\0{setting.base}"
        self.refuse(setting, AdapterIOError, "can't be a file here")


class TestReading:
    def test_tensors_are_described_without_being_read(self, setting):
        state = tensors_in(setting.base)
        checkpoint = open_checkpoint(str(setting.base))
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in state.values())
        assert {name: stored.shape for name, stored in checkpoint.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in state.items()
        }
        assert {stored.dtype for stored in checkpoint.tensors.values()} == {"F32"}
        assert_same_bits({name: checkpoint.tensor(name) for name in state}, state)

    def test_one_file_goes_before_shards_as_in_transformers(self, setting):
        save_file({"only": torch.ones(2)}, setting.base / "model.safetensors")
        assert list(open_checkpoint(setting.base).tensors) == ["only"]


class TestVerifying:
    def test_all_is_well(self, tmp_path):
        setting = Setting(tmp_path, Zoo(), "proj|embed|conv|up|packed|apart", also_train="norm")
        report = verify_against(setting.base, setting.adapter)
        assert report.ok
        assert len(report.layers) == 12
        assert {one.state for one in report.layers} == {"same base"}
        assert {one.state for one in report.also_train} == {"fits"}
        assert str(report).endswith(
            "12 of 12 layers fit, 12 of them with the same fingerprint; "
            "2 of 2 further parameters fit"
        )

    def test_parameters_beside_the_blocks_are_left_out_if_asked(self, tmp_path):
        setting = Setting(tmp_path, Layered(), "proj", also_train="norm")
        state = tensors_in(setting.base)
        del state["layers.0.attn.norm.weight"]
        save_sharded(state, setting.base, 2)
        assert not verify_against(setting.base, setting.adapter).ok
        report = verify_against(setting.base, setting.adapter, also_train=False)
        assert report.ok
        assert report.also_train == ()

    def test_a_base_in_another_dtype_is_the_same_base(self, setting):
        state = {name: value.bfloat16() for name, value in tensors_in(setting.base).items()}
        save_sharded(state, setting.base, 2)
        assert {one.state for one in verify_against(setting.base, setting.adapter).layers} == {
            "same base"
        }

    def test_a_layer_without_a_fingerprint_fits(self, setting):
        with safe_open(setting.adapter, "pt") as file:
            header = json.loads(file.metadata()["disha"])
        for layer in header["layers"]:
            del layer["base"]
        save_file(load_file(setting.adapter), setting.adapter, {"disha": json.dumps(header)})
        report = verify_against(setting.base, setting.adapter)
        assert report.ok
        assert {one.state for one in report.layers} == {"fits"}

    def test_everything_that_is_wrong_is_listed(self, setting):
        state = tensors_in(setting.base)
        del state["layers.0.attn.q_proj.weight"]
        state["layers.0.attn.v_proj.weight"] = torch.zeros(8, 7)
        state["layers.1.attn.q_proj.weight"] = torch.zeros(8, 8, dtype=torch.int8)
        state["layers.1.attn.v_proj.weight"] += 1
        save_sharded(state, setting.base, 2)
        report = verify_against(setting.base, setting.adapter)
        assert not report.ok
        assert [one.name for one in report.missing] == ["layers.0.attn.q_proj"]
        assert [one.name for one in report.misfits] == [
            "layers.0.attn.v_proj",
            "layers.1.attn.q_proj",
        ]
        assert [one.name for one in report.other_base] == ["layers.1.attn.v_proj"]
        assert "1 of 5 layers fit" in str(report)
        assert "layers.0.attn.v_proj" in str(report)
        assert not setting.out.exists()


class TestTransformers:
    def tiny(self, name, **more):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        if name == "gpt2":
            config = transformers.GPT2Config(
                n_embd=12, n_layer=2, n_head=2, vocab_size=40, n_positions=16, **more
            )
            return transformers.GPT2LMHeadModel(config)
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=40,
            **more,
        )
        return transformers.LlamaForCausalLM(config)

    def merged(self, tmp_path, model, save, adapt, target, dtype=torch.float32, **arguments):
        """Merge into what `save` writes, in memory into `adapt`; return both, as one class."""
        model.to(dtype)
        save.save_pretrained(tmp_path / "base", max_shard_size="3KB")
        assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
        disha.inject_adapters(adapt, target, 5, **arguments)
        perturb(adapt)
        disha.save_adapter(adapt, tmp_path / "adapter.safetensors")
        merge_into_checkpoint(
            tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "merged"
        )
        loaded = type(save).from_pretrained(tmp_path / "merged", dtype=dtype)
        disha.merge_adapters(adapt)
        return loaded, save

    def assert_same_model(self, loaded, model):
        assert_same_bits(loaded.state_dict(), base_state(model))
        tokens = torch.arange(8).view(1, 8)
        model.eval()
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("method", ["bone", "bat"])
    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_from_pretrained_reads_the_merged_model(self, tmp_path, name, method, dtype):
        model = self.tiny(name)
        target = "all-linear"
        self.assert_same_model(
            *self.merged(tmp_path, model, model, model, target, dtype, method=method)
        )

    def test_an_adapter_of_the_inner_model(self, tmp_path):
        model = self.tiny("llama")
        self.assert_same_model(*self.merged(tmp_path, model, model, model.model, "proj"))

    def test_the_checkpoint_of_the_inner_model(self, tmp_path):
        model = self.tiny("llama")
        self.assert_same_model(*self.merged(tmp_path, model, model.model, model, "proj"))

    def test_another_dtype_is_what_from_pretrained_loads(self, tmp_path):
        model = self.tiny("llama").bfloat16()
        self.merged(tmp_path, model, model, model, "proj", torch.bfloat16)
        merge_into_checkpoint(
            tmp_path / "base",
            tmp_path / "adapter.safetensors",
            tmp_path / "wide",
            dtype=torch.float32,
        )
        assert type(model).from_pretrained(tmp_path / "wide").dtype == torch.float32

    def test_a_tied_head_is_refused(self, tmp_path):
        model = self.tiny("llama", tie_word_embeddings=True)
        with pytest.raises(AdapterFileError, match=r"lm_head\.weight[\s\S]*tied"):
            self.merged(tmp_path, model, model, model, "lm_head")

    def test_a_tied_embedding_is_refused(self, tmp_path):
        model = self.tiny("llama", tie_word_embeddings=True, pad_token_id=None)
        with pytest.raises(MergeError, match="tied to an output head"):
            self.merged(tmp_path, model, model, model, "embed_tokens")


SINGLE_EXPERTS = ("Mixtral", "Qwen3-MoE", "DeepSeek-V3", "OLMoE")
"""Models whose checkpoints store experts one by one."""


class TestExpertsStoredOneByOne:
    """`transformers` joins them as it loads the model, so the adapter names their stacks."""

    @staticmethod
    def saved(tmp_path, name, dtype=torch.float32, **arguments):
        """A model of which the base and an adapter are saved."""
        model = build(name, "eager").to(dtype)
        model.save_pretrained(tmp_path / "base", max_shard_size="4KB")
        assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
        stored = open_checkpoint(tmp_path / "base").tensors
        assert any(".experts.0." in key for key in stored)
        disha.inject_adapters(model, r"experts\.\w+_proj$|o_proj", 3, **arguments)
        perturb(model)
        disha.save_adapter(model, tmp_path / "adapter.safetensors")
        return model

    @pytest.mark.parametrize("method", ["bone", "bat"])
    @pytest.mark.parametrize("name", SINGLE_EXPERTS)
    def test_merging_writes_what_transformers_writes(self, tmp_path, name, method):
        dtype = torch.bfloat16 if name == "Mixtral" else torch.float32
        model = self.saved(tmp_path, name, dtype, method=method)
        report = verify_against(tmp_path / "base", tmp_path / "adapter.safetensors")
        assert {one.state for one in report.layers} == {"same base"}
        merge_into_checkpoint(
            tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "merged"
        )
        disha.merge_adapters(model)
        model.save_pretrained(tmp_path / "expected", state_dict=base_state(model))
        assert_same_bits(tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "expected"))
        assert not torch.equal(*(
            next(value for key, value in tensors_in(tmp_path / folder).items() if ".1.w3" in key
                 or ".1.up_proj" in key)
            for folder in ("base", "merged")
        ))  # fmt: skip

    @pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
    def test_each_matrix_is_computed_once(self, tmp_path, monkeypatch, name):
        self.saved(tmp_path, name)
        arguments = (tmp_path / "base", tmp_path / "adapter.safetensors")
        merge_into_checkpoint(*arguments, tmp_path / "merged")  # gate and up in different shards
        computed, matrix = [], Stack.matrix

        def counted(stack, checkpoint, expert):
            computed.append(stack.names[expert])
            return matrix(stack, checkpoint, expert)

        monkeypatch.setattr(Stack, "matrix", counted)
        merge_into_checkpoint(*arguments, tmp_path / "merged.safetensors")
        assert computed
        assert len(set(computed)) == len(computed)
        same = tensors_in(tmp_path / "merged")
        assert_same_bits(tensors_in(tmp_path / "merged.safetensors"), same)

    def test_a_stack_that_is_stored_as_a_whole_too(self, tmp_path):
        self.saved(tmp_path, "Qwen3-MoE")
        state, stack = tensors_in(tmp_path / "base"), "model.layers.0.mlp.experts.down_proj"
        single = [key for key in state if key.startswith("model.layers.0.") and ".down_p" in key]
        assert all(".experts." in key for key in single)
        state[stack] = torch.stack([state[key] for key in sorted(single)])
        save_file(state, tmp_path / "other.safetensors")
        out = tmp_path / "merged.safetensors"
        merge_into_checkpoint(tmp_path / "other.safetensors", tmp_path / "adapter.safetensors", out)
        after = tensors_in(out)
        assert not torch.equal(after[stack], state[stack])
        assert all(torch.equal(after[key], state[key]) for key in single)

    def test_a_stack_that_is_saved_beside_the_blocks(self, tmp_path):
        model = self.saved(tmp_path, "Qwen3-MoE")
        disha.remove_adapters(model)
        disha.inject_adapters(model, "o_proj", 3, also_train=r"experts\.gate_up_proj")
        with torch.no_grad():
            model.model.layers[0].mlp.experts.gate_up_proj.add_(1)
        disha.save_adapter(model, tmp_path / "adapter.safetensors")
        merge_into_checkpoint(
            tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "merged"
        )
        before, after = tensors_in(tmp_path / "base"), tensors_in(tmp_path / "merged")
        for key, value in before.items():
            expected = value + (".experts." in key and "down" not in key)
            torch.testing.assert_close(after[key], expected, rtol=0, atol=0)

    def test_other_experts_are_another_base(self, tmp_path):
        self.saved(tmp_path, "OLMoE")
        state = tensors_in(tmp_path / "base")
        key = next(key for key in state if ".experts.3.gate_proj" in key)
        save_file(state | {key: state[key] + 1}, tmp_path / "other.safetensors")
        report = verify_against(tmp_path / "other.safetensors", tmp_path / "adapter.safetensors")
        assert [one.name for one in report.other_base] == [
            "model.layers.0.mlp.experts.gate_up_proj"
        ]

    @pytest.mark.parametrize(
        "change",
        [
            lambda state, key: state.pop(key),
            lambda state, key: state.update({key: state[key][:-1].clone()}),
            lambda state, key: state.update({key: state[key].half()}),
            lambda state, key: state.update({key: state[key].flatten().clone()}),
            lambda state, key: state.update({key.replace(".0.", ".99999."): state.pop(key)}),
        ],
        ids=["missing", "rows", "dtype", "dimensions", "number"],
    )
    def test_experts_that_do_not_go_together_are_no_stack(self, tmp_path, change):
        self.saved(tmp_path, "Qwen3-MoE")
        state = tensors_in(tmp_path / "base")
        change(state, next(key for key in state if ".experts.0.down_proj" in key))
        save_file(state, tmp_path / "other.safetensors")
        report = verify_against(tmp_path / "other.safetensors", tmp_path / "adapter.safetensors")
        assert [one.name for one in report.missing] == ["model.layers.0.mlp.experts.down_proj"]

    def test_quantised_experts_are_named(self, tmp_path):
        self.saved(tmp_path, "Qwen3-MoE")
        state = {
            key: value.to(torch.float8_e4m3fn) if ".experts." in key else value
            for key, value in tensors_in(tmp_path / "base").items()
        }
        save_file(state, tmp_path / "other.safetensors")
        report = verify_against(tmp_path / "other.safetensors", tmp_path / "adapter.safetensors")
        assert [one.name.rpartition(".")[2] for one in report.misfits] == [
            "gate_up_proj",
            "down_proj",
        ]
        assert all("quantised or packed" in one.remark for one in report.misfits)


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
@pytest.mark.parametrize(("method", "shards"), [("bat", 8), ("bone", 1)])
def test_memory_stays_below_a_shard(tmp_path, method, shards):
    """128 MiB in tensors of 2 MiB, 16 MiB a shard or all in one file; every second is merged."""
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
    assert float(done.stdout) < 16
    assert_same_bits(tensors_in(tmp_path / "large" / "merged"), setting.merged_in_memory())
    shutil.rmtree(tmp_path)  # pytest would keep it for a while
