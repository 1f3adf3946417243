"""What docs/reference/format.md says is true: of the files, and of what reads them.

Files are read by `tests/reference_reader.py` as well, which was written from that page.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

import disha
from disha import AdapterFileError
from disha.config import AdapterConfig
from disha.files.contents import read_contents
from disha.files.header import FORMAT, entry_of
from disha.functional import METHODS, PATTERNS
from disha.layers.fingerprints import fingerprint, same_base
from disha.layers.kinds import LAYER_KINDS, declared_weights
from tests import reference_reader
from tests.adapter_files import base, first_layer, rewritten, trained
from tests.conftest import InOut, assert_same, needs_complex_files, perturb, refused, seed_torch
from tests.every_pair import make_complex
from tests.reference import KINDS, settings_of

PAGE = (Path(__file__).parent.parent.parent / "docs" / "reference" / "format.md").read_text()
OLD = Path(__file__).parent.parent / "old_files"
OLD_CASES = ("bone", "tile", "bat")  # all that there were; a new kind has no old file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


# --- the page ------------------------------------------------------------------------------------


class TestPage:
    def test_lists_the_fields_that_are_written(self, path):
        model = nn.ModuleDict(
            {"up": nn.ConvTranspose1d(4, 6, 2, groups=2), "pad": nn.Embedding(6, 4, padding_idx=2),
             "part": nn.Linear(4, 6), "table": nn.Embedding(6, 4), "head": nn.Linear(4, 6)}
        )  # fmt: skip
        model["head"].weight = model["table"].weight
        options = {"rows": {"part": [(0, 2)]}, "also_train": "bias", "scale": 0.5}
        options["also_train_rows"] = {"table": [1, 3]}
        disha.inject_adapters(model, ".", 2, **options)
        disha.save_adapter(model, path, metadata={"note": "x"})
        header = json.loads(reference_reader.container(path.read_bytes())[0])
        written = {name for layer in header["layers"] for name in layer}
        written |= {name for name in header if name != "layers"}
        disha.save_adapter(disha.inject_adapters(nn.Conv1d(4, 6, 2), "", 2, method="lora"), path)
        written |= set(entry_of(read_contents(path).layers[0], "lora"))
        named = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
        assert sorted(named) == sorted(written | {"layers", "needs"})

    def test_names_layouts_methods_and_the_format(self):
        assert PAGE.startswith(f"# The adapter file, format {FORMAT}\n")
        assert all(f"`{pattern}`" in PAGE for pattern in PATTERNS)
        assert all(f"`{method}`" in PAGE for method in METHODS)
        assert AdapterConfig(r=4).to_json().keys() >= {"method", "r_out"}


# --- what a file means ---------------------------------------------------------------------------


class Experts(nn.Module):
    """Two stacks of matrices, one of each layout."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 5))


class Everything(nn.Module):
    """A layer of each layout, in sizes that r = 2 and r = 4 do not divide; never called."""

    def __init__(self):
        super().__init__()
        seed_torch(3)
        self.linear = nn.Linear(5, 6)
        self.in_out = InOut(5, 6)
        self.conv = nn.Conv2d(10, 8, (2, 3), groups=2)
        self.plain_conv = nn.Conv1d(5, 6, 2)
        self.transposed = nn.ConvTranspose1d(10, 8, 3, groups=2)
        self.whole_transposed = nn.ConvTranspose3d(5, 4, 1)
        self.embedding = nn.Embedding(9, 4)
        self.padded = nn.Embedding(9, 4, padding_idx=5)
        self.sliced = nn.Linear(5, 6)
        self.experts = Experts()
        self.recurrent = nn.LSTM(5, 4)
        self.packed = nn.MultiheadAttention(6, 2)
        self.apart = nn.MultiheadAttention(4, 2, kdim=5, vdim=7)
        self.norm = nn.LayerNorm(4)


@pytest.fixture
def everything(monkeypatch):
    """Return a function that makes an `Everything`, whose layers can be adapted."""
    for cls in (InOut, Experts):
        monkeypatch.setitem(LAYER_KINDS, cls, None)
    disha.register_layer_kind(InOut, {"weight": "in out"})
    disha.register_layer_kind(Experts, {"up": "expert in out", "down": "expert out in"})
    return Everything


def patterns_of(model):
    """The layout of each weight of a model that can be adapted."""
    slots = [slot for module in model.modules() for slot in declared_weights(module)]
    return [slot.layout.pattern for slot in slots]


def test_every_layout_is_in_everything(everything):
    assert {*patterns_of(everything())} == {*PATTERNS}, "add a layer for each layout to Everything"


ROWS = {"sliced": [(0, 1), (3, 6)], "experts.up": [(2, 6)], "in_out": [(0, 4)]}
CASES = {
    **{name: {"target_regex": ".", "r": 4, "method": name} for name in METHODS},
    "bone": {"target_regex": ".", "r": 2},
    "tile": {"target_regex": ".", "r": 4, "r_out": 2},
    "bat that divides nothing": {"target_regex": "all-linear", "r": 3, "method": "bat"},
}


class TestMeaning:
    @pytest.mark.parametrize(
        ("dtype", "within"),
        [(torch.float64, 1e-13), (torch.float32, 3e-7), (torch.bfloat16, 2**-8),
         (torch.float16, 2**-11)],
    )  # fmt: skip
    @pytest.mark.parametrize("case", CASES)
    def test_both_readers_merge_the_same(self, everything, path, case, dtype, within):
        model = disha.inject_adapters(
            everything().to(dtype),
            **CASES[case],
            scale=0.5,
            also_train="norm|packed.out_proj",
            rows=ROWS,
        )
        perturb(model)
        with torch.no_grad():
            model.norm.weight.add_(0.25)
            model.packed.out_proj.weight.mul_(2)
        disha.save_adapter(model, path)

        plain = everything().to(dtype)
        parameters = {name: p.detach().double().numpy() for name, p in plain.named_parameters()}
        read = reference_reader.read(path.read_bytes())
        expected = reference_reader.merged(read, parameters)
        patterns = patterns_of(plain)
        if CASES[case]["target_regex"] == "all-linear":
            patterns = [one for one in patterns if "index" not in one and "*kernel" not in one]
        assert sorted(layer.layout for layer in read.layers) == sorted(patterns)

        disha.load_adapter(plain, path)
        disha.merge_adapters(plain)
        found = plain.state_dict()
        for name, value in expected.items():
            numpy.testing.assert_allclose(
                found[name].double().numpy(), value, rtol=within, atol=within, err_msg=name
            )
        changed = {name for name in parameters if not numpy.array_equal(
            parameters[name], expected[name])}  # fmt: skip
        assert {"in_out.weight", "packed.in_proj_weight", "apart.k_proj_weight"} <= changed

    @needs_complex_files
    @pytest.mark.parametrize("kind", KINDS)
    def test_both_readers_merge_complex_weights_the_same(self, path, kind):
        def build():
            seed_torch(3)
            model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4))
            make_complex(model, torch.complex64)
            return model

        model = disha.inject_adapters(build(), ".", 4, **settings_of(kind, 2), scale=0.5)
        perturb(model)
        disha.save_adapter(model, path)
        plain = build()
        parameters = {name: p.detach().numpy() for name, p in plain.named_parameters()}
        read = reference_reader.read(path.read_bytes())
        for layer in read.layers:
            assert layer.base == reference_reader.fingerprint(parameters[f"{layer.name}.weight"])
        expected = reference_reader.merged(read, parameters)
        disha.load_adapter(plain, path)
        disha.merge_adapters(plain)
        found = plain.state_dict()
        for name, value in expected.items():
            assert value.imag.any()
            numpy.testing.assert_allclose(found[name].numpy(), value, rtol=1e-6, atol=1e-6)

    def test_both_take_the_same_fingerprints(self, everything, path):
        model = disha.inject_adapters(everything(), ".", 2, rows=ROWS)
        disha.save_adapter(model, path)
        parameters = {name: p.detach().numpy() for name, p in everything().named_parameters()}
        for layer in reference_reader.read(path.read_bytes()).layers:
            weight = parameters[reference_reader.place(layer, parameters)]
            part = reference_reader.adapted_part(layer, weight)
            assert layer.base == reference_reader.fingerprint(part), layer.name

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
    @pytest.mark.parametrize("shape", [(1,), (2,), (63,), (8, 8), (5, 13), (3, 7, 11), (64, 65)])
    def test_fingerprint_of_any_weight(self, shape, dtype):
        # From below the least half to beyond the largest, where rounding differs most.
        exponents = torch.randint(-30, 20, shape).double()
        weight = (torch.randn(shape, dtype=torch.float64) * 2.0**exponents).to(dtype)
        weight.nan_to_num_(posinf=1.0, neginf=-1.0)
        mark = fingerprint(weight)
        assert mark == reference_reader.fingerprint(weight.numpy())
        narrow = fingerprint(weight.to(torch.bfloat16))
        assert reference_reader.same_base(mark, narrow) == same_base(mark, narrow) is True

    def test_fingerprint_of_ties(self):
        """Values between two that are left after each rounding, up and down, and both signs."""
        steps = torch.tensor([2**-8, 3 * 2**-8, 2**-11, 3 * 2**-11, 2**-24, 2**-8 + 2**-40])
        weight = torch.cat([1 + steps.double(), -1 - steps.double()])
        for one in (weight, weight.float()):
            assert fingerprint(one) == reference_reader.fingerprint(one.numpy())


# --- files of before -----------------------------------------------------------------------------


def exact(model):
    """Give all parameters small multiples of 1/8, so that sums of products have no rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.arange(parameter.numel()) % 7 - 3).view_as(parameter) / 8)
    return model


class TestOldFiles:
    """Made by the version that had a reader and a writer of its own, and wrote a checksum."""

    @pytest.mark.parametrize("case", OLD_CASES)
    def test_load_with_equal_weights(self, everything, case):
        model = exact(everything())
        report = disha.load_adapter(model, OLD / f"{case}.safetensors")
        assert report.complete
        disha.merge_adapters(model)
        expected = safetensors.torch.load_file(OLD / f"{case}_merged.safetensors")
        assert_same({name: model.state_dict()[name] for name in expected}, expected)

    @pytest.mark.parametrize("case", OLD_CASES)
    def test_say_the_same(self, case):
        found = disha.inspect_adapter(OLD / f"{case}.safetensors")
        assert len(found.layers) == 21
        assert found.also_train == ("norm.bias", "norm.weight")
        assert dict(found.metadata) == {"made": "before"}


# --- files of later versions ---------------------------------------------------------------------


def with_news(header):
    """What a made-up 1.1 may write: fields and a way to fill blocks that 1.0 does not know."""
    header.update(license="MIT")
    header["config"].update(init="orthogonal", warmup=[1, 2])
    for layer in header["layers"]:
        layer["importance"] = 0.5


class TestLaterFiles:
    def test_what_is_usual_is_not_written(self, path):
        disha.save_adapter(disha.inject_adapters(nn.Linear(4, 6), "", 2), path)
        text = reference_reader.container(path.read_bytes())[0]
        assert '": ' not in text
        assert ', "' not in text
        header = json.loads(text)
        (layer,) = header["layers"]
        assert header.keys() == {"format", "config", "layers"}
        assert header["config"] == {"r": 2, "target": ""}
        assert layer.keys() == {"name", "layout", "r", "in", "out", "base"}

    def test_what_is_new_and_harmless_is_overlooked(self, path, tokens):
        model = trained()
        disha.save_adapter(model, path)
        rewritten(path, change_header=with_news)
        other = base()
        disha.load_adapter(other, path)
        assert torch.equal(other(tokens), model(tokens))
        assert reference_reader.read(path.read_bytes()).layers
        disha.save_adapter(other, path)  # by 1.0: what was new is gone
        assert "orthogonal" not in reference_reader.container(path.read_bytes())[0]


# --- what is refused -----------------------------------------------------------------------------

BAD_HEADERS = {
    "future version": (lambda h: h.update(format=2), "format 2.*upgrade"),
    "what 1.0 lacks": (lambda h: h.update(needs=["turns"]), r"needs \['turns'\].*; upgrade disha"),
    "no version": (lambda h: h.pop("format") and None, "lacks the field 'format'"),
    "version as text": (lambda h: h.update(format="1"), "format must be an int"),
    "not JSON": (lambda h: "{", "is not of format 1"),
    "deep JSON": (lambda h: "[" * 100_000, "is not of format 1"),
    "a list": (lambda h: "[]", "not of format 1"),
    "no config": (lambda h: h.update(config=None), "not of format 1: 'NoneType' object has no"),
    "other method": (
        lambda h: h["config"].update(method="other"),
        "register the method first.*or upgrade",
    ),
    "no layers": (lambda h: h.update(layers=[]), "tensors:\nthere is no layer\n"),
    "layers as text": (lambda h: h.update(layers="x"), "not of format 1"),
    "entry as text": (lambda h: h.update(layers=["x"]), "not of format 1"),
    "size 0": (lambda h: first_layer(h).update(r=0), "r must be at least 1"),
    "size as float": (lambda h: first_layer(h).update(r=2.0), "r must be an int"),
    "huge r": (lambda h: first_layer(h).update(r=10**30), "larger than in_features"),
    "no sizes": (lambda h: first_layer(h).pop("out") and None, "lacks the field 'out'"),
    "huge scale": (lambda h: first_layer(h).update(scale=1e39), "scale must be finite"),
    "layer twice": (
        lambda h: h["layers"].append(first_layer(h)), "q_proj.bone_block' is listed 2 times"),
    "groups": (lambda h: first_layer(h).update(groups=0), "groups must be at least 1"),
    "a tile": (lambda h: h["config"].update(r_out=5), "r_out=5 does not divide out_features=12"),
    "fewer rows": (
        lambda h: first_layer(h).update(rows=[[0, 1]]), "it lists 1 row, but its output has 8"),
    "other name": (lambda h: first_layer(h).update(name="x"), "'x.bone_block' is missing"),
    "no name": (lambda h: first_layer(h).update(name=5), "name must be a text, got 5"),
    "layout": (lambda h: first_layer(h).update(layout="in"), "unknown layout 'in'.*upgrade"),
    "rows": (lambda h: first_layer(h).update(rows=[[3, 1]]), "first < stop"),
    "beside without tensor": (lambda h: h["also_train"].append("x"), "'x' is missing"),
    "padding beyond": (
        lambda h: first_layer(h).update(padding_idx=99), "padding_idx=99, but the table has 8"),
    "metadata as a list": (lambda h: h.update(metadata=["a"]), "not of format 1"),
    "out": (lambda h: first_layer(h).update(out=5), "expected a block of shape"),
}  # fmt: skip

BAD_TENSORS = {
    "missing": (lambda t: t.pop("head.bone_block"), "'head.bone_block' is missing"),
    "extra": (lambda t: t.update(x=torch.ones(1)), "'x' is not listed"),
    "nan": (lambda t: t["head.bone_block"].fill_(float("nan")), "head.bone_block .*not finite"),
    "integers": (
        lambda t: t.update({"head.bone_block": t["head.bone_block"].int()}),
        "'head.bone_block' has dtype torch.int32"),
    "eight bits": (
        lambda t: t.update({"head.bone_block": t["head.bone_block"].to(torch.float8_e5m2)}),
        "dtype torch.float8_e5m2"),
    "a shape beside": (
        lambda t: t.update({"final_norm.weight": torch.ones(5)}), "final_norm.weight"),
}  # fmt: skip


class TestRefusals:
    def refused(self, path, says, **changes):
        disha.save_adapter(trained(), path)
        rewritten(path, **changes)
        model = base()
        with refused(model, AdapterFileError, says) as caught:
            disha.load_adapter(model, path)
        assert path.name in str(caught.value)
        assert len(str(caught.value)) < 2000

    @pytest.mark.parametrize("name", BAD_HEADERS)
    def test_headers(self, path, name):
        change, says = BAD_HEADERS[name]
        self.refused(path, says, change_header=change)

    @pytest.mark.parametrize("name", BAD_TENSORS)
    def test_tensors(self, path, name):
        change, says = BAD_TENSORS[name]
        self.refused(path, says, change_tensors=change)

    def test_a_dtype_that_torch_lacks(self, path):
        header = {"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"abc")
        with pytest.raises(AdapterFileError, match=r"F6_E2M3.*get it again"):
            disha.inspect_adapter(path)

    def test_names_that_move_the_cursor_are_shown_escaped(self, path):
        disha.save_adapter(trained(), path, metadata={"note": "\x1b[2J"})
        assert "\x1b" not in str(disha.inspect_adapter(path))
        self.refused(
            path, r"\\x1b\[2J", change_header=lambda h: first_layer(h).update(name="\x1b[2J")
        )

    @pytest.mark.parametrize("key", ["embed.disha", "head.disha.other.bone_block"])
    def test_blocks_of_another_adapter_can_not_be_listed(self, path, key):
        block = {key: torch.ones(3, 12)}
        listed = {"change_header": lambda header: header["also_train"].append(key)}
        self.refused(path, key, **listed, change_tensors=lambda tensors: tensors.update(block))

    def test_regexes_of_a_file_are_never_run(self, path, tokens):
        model = trained()
        disha.save_adapter(model, path)
        rewritten(path, change_header=lambda header: header["config"].update(target="(a+)+$("))
        assert disha.load_adapter(base(), path).complete


# --- bytes ---------------------------------------------------------------------------------------


def varied():
    """A model whose file has everything whose order could change."""
    return trained(
        rank_pattern={"v_proj": 2, "head": 1, "proj": 3},
        also_train=["norm", "embed"],
        exclude=["0.attn.q_proj"],
    )


NOTES = {"zoo": "ä", "author": "\U0001f642", "note": 'with "quotes" and \n', "odd": "\ud800"}


def test_processes_and_hash_seeds_do_not_matter(path):
    disha.save_adapter(varied(), path, metadata=NOTES)
    assert dict(disha.inspect_adapter(path).metadata) == NOTES
    script = f"""
        import disha
        from tests.files.test_format import NOTES, varied
        notes = dict(reversed(NOTES.items()))
        disha.save_adapter(varied(), {str(path) + ".other"!r}, metadata=notes)
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONHASHSEED": "1"}, check=True,
    )  # fmt: skip
    assert Path(f"{path}.other").read_bytes() == path.read_bytes()
