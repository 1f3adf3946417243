"""What a load puts into a model, and what it refuses."""

import copy
import warnings
from contextlib import ExitStack
from dataclasses import replace

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import disha
from disha import (
    AdapterFileError,
    AdapterFileWarning,
    AdapterIOError,
    AdapterStateError,
    ArgumentError,
    ArgumentTypeError,
    DishaError,
    MergeError,
    ModeError,
)
from disha.files.contents import keep_blocks
from disha.files.loading import load_contents
from disha.files.saving import adapter_contents
from disha.functional import Layout
from disha.model.state import collect_tensors
from disha.model.view import ModelView
from tests.adapter_files import base, rewritten, trained
from tests.conftest import (
    Layered,
    Shared,
    Tied,
    assert_unchanged,
    perturb,
    refused,
    seed_torch,
    snapshot,
)


def blocks_of(model):
    return [p for name, p in model.named_parameters() if name.endswith("_block")]


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("method", "dtype"),
        [
            ("bone", torch.float32),
            ("bat", torch.bfloat16),
            ("bone", torch.float16),
            ("bat", torch.float64),
        ],
    )
    def test_equal_outputs_and_the_same_file_again(self, path, tokens, method, dtype):
        model = trained(dtype, method=method, rank_pattern={"head": 2}, scale=0.5)
        disha.save_adapter(model, path, metadata={"note": "ä"})
        assert {record.dtype for record in disha.inspect_adapter(path).tensors.values()} == {dtype}
        other = base(dtype)
        report = disha.load_adapter(other, path)
        assert report.complete
        assert torch.equal(other(tokens), model(tokens))
        again = path.with_name("again")
        disha.save_adapter(other, again, metadata={"note": "ä"})
        assert again.read_bytes() == path.read_bytes()

    def test_a_model_that_is_itself_one_linear(self, path):
        model = disha.inject_adapters(nn.Linear(4, 3), "all-linear", 2, init="kaiming")
        disha.save_adapter(model, path)
        other = nn.Linear(4, 3)
        other.load_state_dict({"weight": model.base_weight, "bias": model.bias})
        assert disha.load_adapter(other, path).matched == ("bone_block",)
        x = torch.randn(2, 4)
        assert torch.equal(other(x), model(x))

    def test_shared_modules_are_saved_once_and_found_by_either_name(self, path):
        model = disha.inject_adapters(Shared(), "second", 2, init="kaiming")
        disha.save_adapter(model, path)
        assert list(disha.inspect_adapter(path).tensors) == ["first.bone_block"]
        other = Shared()
        other.load_state_dict(model.state_dict(), strict=False)
        disha.load_adapter(other, path)
        x = torch.randn(2, 6)
        assert torch.equal(other(x), model(x))

    def test_bfloat16_blocks_on_a_float32_base_stay_bfloat16(self, path):
        disha.save_adapter(trained(dtype=torch.bfloat16), path)
        model = base()
        disha.load_adapter(model, path)
        assert {p.dtype for p in blocks_of(model)} == {torch.bfloat16}
        disha.remove_adapters(model)
        disha.load_adapter(model, path, dtype=torch.float64)
        assert {p.dtype for p in blocks_of(model)} == {torch.float64}

    @pytest.mark.parametrize("freeze", [True, False])
    def test_the_base_is_frozen_or_not(self, saved, path, freeze):
        other = base()
        disha.load_adapter(other, path, freeze=freeze)
        assert other.embed.weight.requires_grad is not freeze

    def test_under_another_name_beside_others(self, saved, path, tokens):
        other = disha.inject_adapters(base(), "q_proj", 1, adapter="first", init="kaiming")
        disha.load_adapter(other, path, adapter="second")
        assert torch.equal(other(tokens), saved(tokens))
        assert other.head.disha.active == ("second",)

    def test_without_the_parameters_beside(self, saved, path):
        other = base()
        disha.load_adapter(other, path, also_train=False)
        norm = other.layers[0]["attn"].norm.weight
        assert torch.equal(norm, torch.ones_like(norm))
        assert not norm.requires_grad
        blocks = [values for name, values in saved.named_parameters() if ".disha." in name]
        assert all(map(torch.equal, blocks, disha.adapter_parameters(other)))

    def test_a_merged_adapter_can_be_saved(self, path):
        model = trained(also_train="v_proj.bias")
        disha.save_adapter(model, path)
        plain = path.read_bytes()
        disha.merge_adapters(model)
        disha.save_adapter(model, path)
        assert path.read_bytes() == plain


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_another_default_device_changes_nothing(path, tokens, device):
    model, expected = trained(), path.with_name("expected")
    disha.save_adapter(model, expected)
    other = base()
    with torch.device(device):
        disha.save_adapter(model, path)
        disha.load_adapter(other, path)
        disha.load_adapter(other, path, replace=True)
        disha.combine_adapters(other, {"default": 1.0}, "sum", also_train=False)
        assert disha.check_adapters(other, tokens).ok
        disha.merge_adapters(other)
        disha.unmerge_adapters(other)
    assert path.read_bytes() == expected.read_bytes()
    assert torch.equal(other(tokens), model(tokens))


class TwoNames(nn.Module):
    """One linear layer under two names, in the order asked for."""

    def __init__(self, names="ab") -> None:
        super().__init__()
        seed_torch(0)
        layer = nn.Linear(6, 4)
        for name in names:
            setattr(self, name, layer)

    def forward(self, x):
        return self.a(x)


class TestOtherNames:
    @pytest.mark.parametrize("replacing", [False, True])
    def test_a_shared_layer_is_found_whatever_name_it_was_saved_under(self, path, replacing):
        model = perturb(disha.inject_adapters(TwoNames("ba"), "a", 2, also_train=r"a\.bias"))
        with torch.no_grad():
            model.a.bias.add_(1.0)
        disha.save_adapter(model, path)
        assert list(disha.inspect_adapter(path).tensors) == ["b.bone_block", "b.bias"]
        other = TwoNames("ab")
        if replacing:
            disha.inject_adapters(other, "a", 2, also_train="bias", init="kaiming")
        report = disha.load_adapter(other, path, replace=replacing)
        assert report.complete
        assert report.matched == ("a.bone_block", "a.bias")
        x = torch.randn(3, 6)
        assert torch.equal(other(x), model(x))

    def test_a_module_inside_a_shared_one_is_found_too(self, path):
        def model(*names):
            seed_torch(0)
            inner = nn.Sequential(nn.LSTM(6, 6), nn.BatchNorm1d(6))
            return nn.ModuleDict({name: nn.Sequential(inner) for name in names})

        saved = disha.inject_adapters(
            model("b", "a"), "lstm|0.0$", 2, also_train="1.bias", init="kaiming"
        )
        saved["a"][0][1](torch.randn(4, 6))  # which changes the running statistics
        disha.save_adapter(saved, path)
        other = model("a", "b")
        report = disha.load_adapter(other, path)
        assert {key.partition(".")[0] for key in report.matched} == {"a"}
        state = saved["a"].state_dict()
        for key, value in other["a"].state_dict().items():
            assert torch.equal(value, state[key]), key

    @pytest.mark.parametrize("replacing", [False, True])
    @pytest.mark.parametrize(
        ("target", "beside", "keys"),
        [("a|b", None, "a.bone_block and b.bone_block"), ("c", r"[ab]\.bias", "a.bias and b.bias")],
    )
    def test_two_of_the_file_that_are_one_in_the_model(self, path, target, beside, keys, replacing):
        model = TwoNames()
        model.b, model.c = nn.Linear(6, 4), nn.Linear(3, 2)
        disha.save_adapter(disha.inject_adapters(model, target, 2, also_train=beside), path)
        other = TwoNames()
        other.c = nn.Linear(3, 2)
        if replacing:
            disha.inject_adapters(other, target, 2, also_train=beside)
        with refused(other, AdapterFileError, f"{keys} are one parameter in the model"):
            disha.load_adapter(other, path, replace=replacing)


class TestContentsWithoutAFile:
    @pytest.mark.parametrize("replacing", [False, True])
    def test_that_contradict_themselves_are_refused_from_anywhere(self, replacing):
        contents = adapter_contents(ModelView(trained()))
        contents = replace(contents, layers=tuple(replace(one, r=2) for one in contents.layers))
        model = trained() if replacing else base()
        given = ModelView(model), "elsewhere", contents, "default"
        with refused(model, AdapterFileError, r"(?s)^elsewhere.* does not fit .*head"):
            load_contents(*given, replace=replacing, freeze=True)

    def test_they_act_at_once(self):
        model = base()
        contents = adapter_contents(ModelView(trained()))
        load_contents(ModelView(model), "elsewhere", contents, "new", freeze=True)
        assert model.head.disha.active == ("new",)

    def test_they_do_not_replace_an_adapter_unless_asked(self):
        model = trained()
        contents = adapter_contents(ModelView(model))
        with refused(model, ArgumentError, "has an adapter 'default' already"):
            load_contents(ModelView(model), "elsewhere", contents, "default", freeze=True)

    def test_an_operation_that_fails_later_takes_them_back(self):
        model = trained()
        contents = keep_blocks(adapter_contents(ModelView(model)))
        before, around = snapshot(model), ExitStack()
        load_contents(ModelView(model), "it", contents, "other", freeze=True, around=around)
        around.close()  # as the operation does
        assert_unchanged(model, before)

    def test_layers_that_the_contents_lack_are_left_alone_only_if_asked(self):
        contents = adapter_contents(ModelView(trained(also_train=None)))
        first_layer, *others = contents.layers
        model = trained(also_train=None)
        found = {layer.key: contents.tensors[layer.key] for layer in others}
        some = replace(contents, layers=tuple(others), tensors=found)
        given = ModelView(model), "elsewhere", some, "default"
        load_contents(ModelView(model), "elsewhere", contents, "other", freeze=True)
        load_contents(*given, replace=True, partial=True, freeze=True)
        first = collect_tensors(ModelView(model), "default")[first_layer.key]
        assert torch.equal(first, contents.tensors[first_layer.key])
        load_contents(*given, replace=True, freeze=True)
        assert not first.any()
        assert all(block.any() for block in collect_tensors(ModelView(model), "other").values())


class TestLayersThatDiffer:
    def test_each_layer_keeps_its_scale(self, path, tokens):
        model = trained()
        model.head.disha["default"].scale = 0.1
        disha.save_adapter(model, path)
        for replacing in (False, True):
            other = trained() if replacing else base()
            disha.load_adapter(other, path, replace=replacing)
            assert torch.equal(other(tokens), model(tokens))

    def test_different_methods_under_one_name_are_refused(self, path):
        model = nn.Sequential(disha.BoneLinear(4, 4, r=2), disha.BatLinear(4, 4, r=2))
        says = r"adapter 'default' has blocks of different methods.*; give each method its own"
        with pytest.raises(AdapterStateError, match=says):
            disha.save_adapter(model, path)
        assert not path.exists()


class TestReplace:
    def test_copies_in_place(self, saved, path, tokens):
        other = disha.inject_adapters(base(), "proj|head", 3, also_train=r"norm\.weight")
        blocks = list(disha.adapter_parameters(other))
        disha.load_adapter(other, path, replace=True)
        assert all(a is b for a, b in zip(blocks, disha.adapter_parameters(other), strict=True))
        assert torch.equal(other(tokens), saved(tokens))

    def test_takes_over_the_dropout(self, path):
        disha.save_adapter(trained(dropout=0.25), path)
        other = trained()
        disha.load_adapter(other, path, replace=True)
        assert other.head.disha["default"].config.dropout == 0.25
        assert other.head.disha["default"].dropout == 0.25

    def test_is_needed_for_a_taken_name(self, saved, path):
        other = trained()
        with refused(other, ArgumentError, r"'default' already.*replace=True"):
            disha.load_adapter(other, path)
        disha.load_adapter(other, path, "new", also_train=False, replace=True)
        assert list(other.head.disha) == ["default", "new"]

    def test_refuses_another_shape(self, saved, path):
        other = trained(r=2)
        with refused(other, AdapterFileError, r"wrong: head.bone_block has the shape \(3, 12\)"):
            disha.load_adapter(other, path, replace=True)

    @pytest.mark.parametrize("r", [1, 2, 3, 6])
    @pytest.mark.parametrize(
        ("options", "target"),
        [({}, "proj|head"), ({"r_out": 4}, "head"), ({"rank_pattern": {"head": 1}}, "proj|head")],
    )
    def test_a_smaller_r_and_fewer_layers_have_the_same_effect(
        self, path, tokens, r, options, target
    ):
        small = trained(r=r, target_regex=target, scale=0.7, **options)
        disha.save_adapter(small, path)
        tile = {"r_out": options["r_out"]} if "r_out" in options else {}
        model = trained(r=6, also_train=None, **tile)
        disha.load_adapter(model, path, replace=True, also_train=False)
        plain = base()
        disha.load_adapter(plain, path, also_train=False)
        torch.testing.assert_close(model(tokens), plain(tokens))
        disha.save_adapter(model, path)
        again = base()
        disha.load_adapter(again, path)
        assert torch.equal(again(tokens), model(tokens))

    def test_refuses_an_r_that_does_not_divide_the_models(self, path):
        disha.save_adapter(trained(r=4), path)
        says = r"(?s)layers\.0.*q_proj: r is 4 in the file and 6 in the model.*head: r is 4 in"
        with pytest.raises(AdapterFileError, match=says):
            disha.load_adapter(trained(r=6), path, replace=True)
        disha.save_adapter(trained(r=2, method="bat"), path)
        with pytest.raises(AdapterFileError, match="r is 2 in the file and 4 in the model"):
            disha.load_adapter(trained(r=4, method="bat"), path, replace=True)

    def test_refuses_a_layer_of_another_width(self, path):
        wide = disha.inject_adapters(nn.Sequential(nn.Linear(32, 16)), "0", 4)
        disha.save_adapter(wide, path)
        other = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", 4)
        with refused(
            other, AdapterFileError, r"0: in_features is 32 in the file and 8 in the model"
        ):
            disha.load_adapter(other, path, replace=True)

    def test_refuses_to_change_the_dtype(self, saved, path):
        with pytest.raises(ArgumentError, match="leave dtype out"):
            disha.load_adapter(trained(), path, replace=True, dtype=torch.float64)

    def test_without_the_parameters_beside(self, saved, path):
        other = trained()
        norm = other.layers[0]["attn"].norm.weight.detach().clone()
        disha.load_adapter(other, path, replace=True, also_train=False)
        assert torch.equal(other.layers[0]["attn"].norm.weight, norm)
        assert torch.equal(other.head.disha["default"].block, saved.head.disha["default"].block)

    def test_refuses_other_layers(self, saved, path):
        other = trained(target_regex="proj")
        with refused(other, AdapterFileError, r"unexpected: head.bone_block"):
            disha.load_adapter(other, path, replace=True)


class TestSomeLayers:
    def test_only_they_are_loaded(self, saved, path):
        names = [layer.name for layer in disha.inspect_adapter(path).layers]
        plain = base()
        report = disha.load_adapter(plain, path, layers=f"^{names[0]}$", also_train=False)
        key = f"{names[0]}.disha.default.bone_block"
        found = disha.adapter_state_dict(plain)
        assert report.matched == (f"{names[0]}.bone_block",)
        assert list(found) == [key]
        assert torch.equal(found[key], disha.adapter_state_dict(saved)[key])

    def test_replacing_leaves_the_others_alone(self, saved, path):
        names = [layer.name for layer in disha.inspect_adapter(path).layers]
        wanted = {k: v.clone() for k, v in disha.adapter_state_dict(saved).items()}
        with torch.no_grad():
            for block in disha.adapter_parameters(saved):
                block.fill_(7.0)
        disha.set_adapter_scale(saved, 0.5)
        disha.load_adapter(saved, path, layers=f"^{names[0]}$", replace=True, also_train=False)
        for key, value in disha.adapter_state_dict(saved).items():
            if not key.endswith("bone_block"):
                continue
            chosen = key.startswith(f"{names[0]}.")
            assert torch.equal(value, wanted[key] if chosen else torch.full_like(value, 7.0)), key
        scales = {row.name: row.scale for row in disha.summary(saved).layers}
        assert scales == {name: 1.0 if name == names[0] else 0.5 for name in names}

    def test_replacing_what_the_model_lacks_raises(self, saved, path):
        names = [layer.name for layer in disha.inspect_adapter(path).layers]
        model = base()
        disha.load_adapter(model, path, layers=f"^{names[0]}$")
        with pytest.raises(AdapterFileError, match="unexpected"):
            disha.load_adapter(model, path, layers=f"^{names[1]}$", replace=True)

    @pytest.mark.parametrize(
        ("layers", "match"),
        [
            ("nothing", r"which are layers\.0\.attn\.q_proj, layers\.0"),
            ("(", "layers .*valid regex"),
        ],
    )
    def test_a_regex_without_a_layer(self, saved, path, layers, match):
        model = base()
        before = [type(module) for module in model.modules()]
        with pytest.raises(ArgumentError, match=match):
            disha.load_adapter(model, path, layers=layers)
        assert [type(module) for module in model.modules()] == before


class TestLayout:
    @pytest.mark.parametrize(
        ("layer", "layout", "method"),
        [
            (nn.Linear(8, 8), Layout("out in"), "bat"),
            (nn.Conv2d(8, 8, 3), Layout("out in *kernel"), "bone"),
            (nn.ConvTranspose1d(8, 8, 3), Layout("in out *kernel"), "bat"),
            (nn.ConvTranspose1d(8, 8, 3, groups=2), Layout("in out *kernel", groups=2), "bone"),
            (nn.Embedding(8, 8), Layout("index out"), "bat"),
            (nn.Embedding(8, 8, padding_idx=1), Layout("index out", padding_idx=1), "bone"),
            (nn.Bilinear(8, 8, 3), Layout("expert out in"), "bat"),
        ],
    )
    def test_is_recorded_and_comes_back(self, path, layer, layout, method):
        base = nn.Sequential(copy.deepcopy(layer))
        model = perturb(disha.inject_adapters(copy.deepcopy(base), "0", r=4, method=method))
        disha.save_adapter(model, path)
        assert disha.inspect_adapter(path).layers[0].layout == layout
        assert disha.load_adapter(base, path).complete
        blocks = (one[0].disha["default"] for one in (base, model))
        assert torch.equal(*(block.block for block in blocks))

    def test_rows_are_recorded_and_come_back(self, path):
        base = nn.Sequential(nn.Linear(8, 8))
        model = disha.inject_adapters(copy.deepcopy(base), "0", 4, rows={"0": [(5, 7), (0, 2)]})
        perturb(model)
        disha.save_adapter(model, path)
        layer = disha.inspect_adapter(path).layers[0]
        assert (layer.outputs, layer.out_features) == (((0, 2), (5, 7)), 4)
        disha.load_adapter(base, path)
        assert torch.equal(base[0].weight + 0, model[0].weight + 0)

    def test_weights_below_a_layer_have_its_name_before_theirs(self, path):
        base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "lstm": nn.LSTM(8, 4)})
        model = perturb(disha.inject_adapters(copy.deepcopy(base), "v_proj|weight_hh", 4))
        disha.save_adapter(model, path)
        found = {layer.name: layer for layer in disha.inspect_adapter(path).layers}
        assert list(found) == ["attention.v_proj", "lstm.weight_hh_l0"]
        assert found["attention.v_proj"].outputs == ((16, 24),)
        assert found["attention.v_proj"].key == "attention.v_proj.bone_block"
        disha.load_adapter(base, path)
        for one, other in ((base["lstm"], model["lstm"]), (base["attention"], model["attention"])):
            pairs = zip(
                one.disha.blocks_by_name().values(),
                other.disha.blocks_by_name().values(),
                strict=True,
            )
            assert all(torch.equal(a.block, b.block) for a, b in pairs)


class TestFingerprint:
    def test_a_warning_points_at_the_line_that_saves_or_loads(self, path):
        model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 6)), "0", 2)
        model[0].bias.requires_grad_(True)
        with pytest.warns(UserWarning, match="also holds 1 parameter") as of_saving:
            disha.save_adapter(model, path)
        with pytest.warns(AdapterFileWarning) as of_loading:
            disha.load_adapter(nn.Sequential(nn.Linear(4, 6)), path)
        assert of_saving[0].filename == of_loading[0].filename == __file__

    @pytest.mark.parametrize("count", [3, 4])
    def test_three_layers_of_another_base_are_named(self, path, count):
        def model():
            return nn.Sequential(*(nn.Linear(4, 6) for _ in range(count)))

        disha.save_adapter(disha.inject_adapters(model(), ".", 2), path)
        names = "0, 1, 2" if count == 3 else "0, 1, 2, and 1 more"
        with pytest.warns(AdapterFileWarning, match=rf"in {count} of {count} layers \({names}\)"):
            disha.load_adapter(model(), path)

    def test_a_layer_without_a_fingerprint_hides_no_other(self):
        contents = adapter_contents(ModelView(trained()))
        first, *others = contents.layers
        contents = replace(contents, layers=(replace(first, base=None), *others))
        seed_torch(1)
        with pytest.warns(AdapterFileWarning, match="4 of 4 layers"):
            load_contents(ModelView(Layered()), "a", contents, "default", freeze=True)

    @pytest.mark.parametrize("replacing", [False, True])
    def test_a_warning_that_is_made_an_error_leaves_the_model_as_it_was(
        self, saved, path, replacing
    ):
        seed_torch(1)
        other = Layered()
        if replacing:
            disha.inject_adapters(other, "proj|head", 3, also_train=r"norm\.weight")
        warnings.simplefilter("error")  # pytest resets it
        with refused(other, AdapterFileWarning, "5 of 5 layers"):
            disha.load_adapter(other, path, replace=replacing)

    def test_a_base_with_the_adapter_merged_in_already_warns(self, saved, path):
        disha.merge_adapters(saved)
        merged = base()
        merged.load_state_dict(
            {key: value for key, value in saved.state_dict().items() if "disha" not in key}
        )
        says = f"^{path} was saved .*: load the base that it was trained on, without the adapter m"
        with pytest.warns(AdapterFileWarning, match=says):
            disha.load_adapter(merged, path)

    def test_the_base_in_another_dtype_counts_as_the_same(self, saved, path):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            with warnings.catch_warnings(action="error"):
                disha.load_adapter(base(dtype), path)

    def test_tied_head_keeps_the_embedding_out_of_the_file(self, path):
        model = disha.inject_adapters(Tied(), "head", 2)
        disha.save_adapter(model, path)
        assert list(disha.inspect_adapter(path).tensors) == ["head.bone_block"]


class TestBadFiles:
    def refused(self, path, says, model=None, kind=AdapterFileError):
        model = base() if model is None else model
        with refused(model, kind, says) as caught:
            disha.load_adapter(model, path)
        assert isinstance(caught.value, DishaError)
        assert path.name in str(caught.value)

    def test_missing(self, path):
        self.refused(path, "can't read .*No such file", kind=AdapterIOError)
        for missing, says in ((path, "No such file"), ("a\0", r"can't read .* null byte")):
            with pytest.raises(OSError, match=says):
                disha.inspect_adapter(missing)

    def test_a_folder(self, tmp_path):
        self.refused(tmp_path, r"can't read .*adapter.safetensors: No such", kind=AdapterIOError)

    def test_a_pickle_says_who_reads_it(self, path):
        torch.save({"a": torch.ones(1)}, path)
        self.refused(path, "A file of torch.save is for torch.load.*load_adapter_state_dict")

    @pytest.mark.parametrize("data", [b"", b"\0", b"not safetensors at all", b"\xff" * 64])
    def test_other_bytes(self, path, data):
        path.write_bytes(data)
        self.refused(path, "not a complete safetensors file")

    @pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
    def test_truncated(self, saved, path, part):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * part)])
        self.refused(path, "not a complete safetensors file")

    def test_without_our_header(self, path):
        safetensors.torch.save_file({"head.bone_block": torch.zeros(3, 12)}, path)
        self.refused(path, "it was not written by disha.save_adapter; name an adapter file")

    def test_an_unknown_method_of_a_layer(self, saved, path):
        rewritten(path, change_header=lambda header: header["layers"][0].update(method="magic"))
        self.refused(path, "unknown method 'magic'.*upgrade disha-torch")

    def test_for_another_model(self, saved, path):
        self.refused(
            path, "(?s)q_proj: the model has no such layer.*nearest", nn.Sequential(nn.Linear(8, 8))
        )

    def test_for_layers_of_another_kind(self, saved, path):
        model = base()
        model.head = nn.LayerNorm(12)
        self.refused(path, "head: can't be adapted: no layer kind adapts LayerNorm", model)

    def test_while_merged(self, saved, path):
        with (
            disha.adapters_disabled(saved),
            refused(saved, ModeError, "can't load an adapter inside"),
        ):
            disha.load_adapter(saved, path, adapter="b")
        disha.merge_adapters(saved)
        with refused(saved, MergeError, "can't load an adapter while"):
            disha.load_adapter(saved, path, adapter="b")

    def test_values_that_a_narrower_dtype_can_not_hold(self, saved, path):
        rewritten(path, change_tensors=lambda t: t["head.bone_block"].fill_(1e6))
        model = base()
        with refused(model, AdapterFileError, r"head.bone_block .*as torch.float16"):
            disha.load_adapter(model, path, dtype=torch.float16)

    def test_a_parameter_that_can_not_train(self, saved, path):
        model = base()
        norm = model.layers[0]["attn"].norm
        norm.weight = nn.Parameter(torch.ones(8, dtype=torch.int64), requires_grad=False)
        self.refused(path, "norm.weight: it has dtype torch.int64", model)

    def test_a_model_without_weights(self, saved, path):
        with torch.device("meta"):
            model = Layered()
        with pytest.raises(AdapterFileError, match="on the meta device; give the model"):
            disha.load_adapter(model, path)
        assert "head.bone_block" not in dict(model.named_parameters())

    @pytest.mark.parametrize("dtype", [torch.int32, "float32"])
    def test_a_dtype_that_no_block_can_have(self, saved, path, dtype):
        with pytest.raises(DishaError, match=r"dtype|trained in"):
            disha.load_adapter(base(), path, dtype=dtype)

    @pytest.mark.parametrize("odd", [None, 5, b"bytes"])
    def test_what_is_no_path(self, odd):
        for call in (
            lambda: disha.inspect_adapter(odd),
            lambda: disha.load_adapter(base(), odd),
            lambda: disha.save_adapter(trained(), odd),
        ):
            with pytest.raises(ArgumentTypeError, match="path must be"):
                call()

    def test_into_a_bad_name(self, saved, path):
        model = base()
        with refused(model, ArgumentError, "contain a dot"):
            disha.load_adapter(model, path, adapter="a.b")
