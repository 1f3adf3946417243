"""What docs/format.md says is true: of the files, and of what reads them.

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
from disha import AdapterConfig, AdapterFileError, DishaError
from disha.files.header import FORMAT
from disha.files.tensors import DTYPES, TensorFile
from disha.fingerprint import fingerprint, same_base
from disha.functional import METHODS, PATTERNS
from disha.layers import LAYER_KINDS
from tests import reference_reader
from tests.adapter_files import base, first_layer, rewritten, trained
from tests.conftest import assert_unchanged, perturb, snapshot

PAGE = (Path(__file__).parent.parent / "docs" / "format.md").read_text()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


# --- the page ------------------------------------------------------------------------------------


def column(heading):
    """Return the names in the first columns of the tables right below a heading."""
    section = re.split(rf"^#+ {heading}$", PAGE, flags=re.MULTILINE)[1]
    section = re.split(r"^#", section, flags=re.MULTILINE)[0]
    return re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)


class TestPage:
    def test_lists_the_fields_that_are_written(self, path):
        disha.save_adapter(trained(r_out=4), path)
        header = json.loads(reference_reader.read(path.read_bytes()).text)
        assert column("Header") == list(header) == list(reference_reader.HEADER)
        assert column("Configuration") == list(header["config"]) == list(reference_reader.CONFIG)
        assert column("Layers") == list(reference_reader.LAYER)
        written = ["name", "layout", "r", "in", "out", "scale", "base"]
        assert list(first_layer(header)) == written

    def test_lists_the_fields_that_only_some_layers_have(self, path):
        model = nn.ModuleDict(
            {
                "up": nn.ConvTranspose1d(8, 8, 3, groups=2),
                "embed": nn.Embedding(8, 8, padding_idx=3),
                "linear": nn.Linear(8, 8),
            }
        )
        disha.save_adapter(
            disha.inject_adapters(model, ".", 4, rows={"linear": [(0, 2), (4, 6)]}), path
        )
        layers = json.loads(reference_reader.read(path.read_bytes()).text)["layers"]
        assert [layer["name"] for layer in layers] == ["up", "embed", "linear"]
        assert layers[0]["groups"] == 2
        assert layers[1]["padding_idx"] == 3
        assert layers[2]["rows"] == [[0, 2], [4, 6]]
        for layer in layers:
            assert list(layer) == [name for name in reference_reader.LAYER if name in layer]
            assert len(layer) == 8

    def test_gives_the_defaults_of_the_configuration(self):
        plain = AdapterConfig(r=1).to_json()
        for name, (default, _) in reference_reader.CONFIG.items():
            if default is not reference_reader.REQUIRED:
                assert plain[name] == default, name

    def test_lists_dtypes_and_layouts(self):
        assert column("Container") == list(DTYPES) == list(reference_reader.SIZES)
        layouts = [name for name in column("Update") if " " in name]
        assert tuple(dict.fromkeys(layouts)) == PATTERNS == reference_reader.LAYOUTS, (
            "a layout needs a row in the table of docs/format.md, and in tests/reference_reader.py "
            "its pattern in LAYOUTS and its matrices in `matrices`"
        )

    def test_lists_the_methods(self):
        (row,) = re.findall(r"^\| `method` \|(.*?)\|", PAGE, re.MULTILINE)
        assert re.findall(r'`"(\w+)"`', row) == list(METHODS) == list(reference_reader.METHODS), (
            "a method needs its name and a row for its update in docs/format.md, and in "
            "tests/reference_reader.py two functions and an entry of METHODS"
        )

    def test_is_about_the_format_that_is_written(self):
        assert PAGE.startswith(f"# The adapter file, format {FORMAT}\n")

    def test_example(self, tmp_path, monkeypatch, capsys):
        code, output = re.search(
            r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL
        ).groups()
        monkeypatch.chdir(tmp_path)
        exec(compile(code, "the example of docs/format.md", "exec"), {})
        assert capsys.readouterr().out == output


# --- what a file means ---------------------------------------------------------------------------


class InOut(nn.Module):
    """A linear layer that keeps its weight as (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


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
        torch.manual_seed(3)
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
        layers = len(list(disha.adapter_parameters(model)))
        assert layers == (15 if case == "bat that divides nothing" else 21)
        disha.save_adapter(model, path)

        plain = everything().to(dtype)
        parameters = {name: p.detach().double().numpy() for name, p in plain.named_parameters()}
        read = reference_reader.read(path.read_bytes())
        expected = reference_reader.merged(read, parameters)
        assert len(read.layers) == layers

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

    def test_both_take_the_same_fingerprints(self, everything, path):
        model = disha.inject_adapters(everything(), ".", 2, rows=ROWS)
        disha.save_adapter(model, path)
        parameters = {name: p.detach().numpy() for name, p in everything().named_parameters()}
        for layer in reference_reader.read(path.read_bytes()).layers:
            weight = parameters[reference_reader.place(layer, parameters)]
            part = reference_reader.adapted_part(layer, weight)
            assert layer.base == reference_reader.fingerprint(part), layer.name

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
    @pytest.mark.parametrize("shape", [(1,), (63,), (8, 8), (5, 13), (3, 7, 11), (64, 65)])
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


# --- what is refused -----------------------------------------------------------------------------

ONLY_BY_THE_MODEL = {"in", "shape beside", "rows beyond the weight"}
"""What a reader without the model can't refuse."""

SIZE = r"must be an integer from 1 to 2\^31 - 1"

BAD_HEADERS = {
    "a size that is none": (
        lambda h: first_layer(h).update({"in": 2**31}), f"'in' {SIZE}; it is 2147483648"),
    "future version": (lambda h: h.update(format=2), "format 2.*upgrade"),
    "no version": (lambda h: h.pop("format") and None, "format must be an integer"),
    "version as text": (lambda h: h.update(format="1"), "format must be an integer"),
    "not JSON": (lambda h: "{", "not valid JSON"),
    "deep JSON": (lambda h: "[" * 100_000, "not valid JSON"),
    "a list": (lambda h: "[]", "the header must be a JSON object; it is a list"),
    "no config": (lambda h: h.pop("config") and None, "lacks the field 'config'"),
    "config as list": (lambda h: h.update(config=[]), "'config' must be an object"),
    "bad config": (lambda h: h["config"].update(r=0), "r must be at least 1"),
    "unknown config": (lambda h: h["config"].update(rank=1), "unknown fields"),
    "no layers": (lambda h: h.update(layers=[]), "'layers' must be a list of 1 to 100,000"),
    "layers as text": (lambda h: h.update(layers="head"), "'layers' must be a list"),
    "entry as text": (lambda h: h.update(layers=["head"]), "must be an object; it is 'head'"),
    "unknown method": (lambda h: h["config"].update(method="lora"), "unknown method 'lora'"),
    "other method": (lambda h: h["config"].update(method="bat"), "disagree"),
    "r as float": (lambda h: first_layer(h).update(r=3.0), f"'r' {SIZE}; it is 3.0"),
    "huge r": (lambda h: first_layer(h).update(r=2**80), SIZE),
    "r beyond the layer": (lambda h: first_layer(h).update(r=30), "larger than in_features"),
    "other r": (lambda h: first_layer(h).update(r=2), r"expected a block of shape \(2, 8\)"),
    "r_out": (lambda h: h["config"].update(r_out=5), "r_out=5 does not divide out_features=8"),
    "other r_out": (lambda h: h["config"].update(r_out=4), r"a block of shape \(3, 4\)"),
    "no scale": (
        lambda h: first_layer(h).pop("scale") and None,
        r"layer 'layers\.0\.attn\.q_proj' of the header lacks the field 'scale'"),
    "huge scale": (lambda h: first_layer(h).update(scale=10**400), "'scale' must be .* finite"),
    "huge scale in config": (lambda h: h["config"].update(scale=1e300), "scale must be finite"),
    "in": (lambda h: first_layer(h).update({"in": 9}), "expected 9 -> 8, found 8 -> 8"),
    "layer twice": (lambda h: h["layers"].append(first_layer(h)), "q_proj.bone_block' 2 times"),
    "no name": (lambda h: first_layer(h).pop("name") and None, "lacks the field 'name'"),
    "other name": (lambda h: first_layer(h).update(name="x"), "disagree"),
    "layout": (lambda h: first_layer(h).update(layout="square"), "must be one of .*it is 'square'"),
    "layout as list": (lambda h: first_layer(h).update(layout=[]), "must be one of"),
    "no layout": (lambda h: first_layer(h).pop("layout") and None, "lacks the field 'layout'"),
    "layout of more axes": (
        lambda h: first_layer(h).update(layout="expert out in"), "does not fit the layout"),
    "groups": (lambda h: first_layer(h).update(groups=2), "'groups' .*, with the layout .* only"),
    "no groups": (
        lambda h: first_layer(h).update(layout="in out *kernel", groups=0), f"'groups' {SIZE}"),
    "padding": (lambda h: first_layer(h).update(padding_idx=1), "with the layout 'index out'"),
    "padding beyond": (
        lambda h: first_layer(h).update(layout="index out", padding_idx=8), "an index below 'in'"),
    "other rows": (lambda h: first_layer(h).update(rows=[[0, 3]]), "it lists 3 rows"),
    "rows as numbers": (lambda h: first_layer(h).update(rows=[0, 8]), "'rows' must be ranges"),
    "rows that overlap": (lambda h: first_layer(h).update(rows=[[0, 5], [3, 6]]), "overlap"),
    "rows out of order": (lambda h: first_layer(h).update(rows=[[4, 8], [0, 4]]), "order"),
    "huge rows": (lambda h: first_layer(h).update(rows=[[2**70, 2**70 + 8]]), "below 2"),
    "rows beyond the weight": (lambda h: first_layer(h).update(rows=[[4, 12]]), "rows"),
    "fingerprint": (lambda h: first_layer(h).update(base=3), "'base' must be text; it is 3"),
    "beside as text": (lambda h: h.update(also_train="a"), "must be a list of names"),
    "beside without tensor": (lambda h: h["also_train"].append("x"), "missing 'x'"),
    "metadata": (lambda h: h.update(metadata={"a": 1}), "must be an object of text"),
    "a field twice": (lambda h: json.dumps(h)[:-1] + ', "format": 1}', "'format' comes twice"),
    "not a number": (lambda h: json.dumps(h)[:-1] + ', "x": NaN}', "not a JSON number"),
    "half a surrogate pair": (
        lambda h: json.dumps({**h, "metadata": {"a": "\ud800"}}), "not valid JSON"),
    "a block beside": (lambda h: h["also_train"].append("head.bone_block"), "2 times"),
    "a parameter twice": (lambda h: h["also_train"].append(h["also_train"][0]), "2 times"),
    "patterns as text": (lambda h: h["config"].update(exclude="head"), "must be a JSON array"),
    "a BAT tile": (lambda h: h["config"].update(method="bat", r_out=2), "r_out=2 was given"),
    "a layout of other blocks": (
        lambda h: first_layer(h).update(layout="out in *kernel"), "does not fit"),
    "a transposed layout of other blocks": (
        lambda h: first_layer(h).update(layout="in out *kernel"), "does not fit"),
    "a layout null": (lambda h: first_layer(h).update(layout=None), "must be one of"),
    "rows null": (lambda h: first_layer(h).update(rows=None), "'rows' must be ranges"),
    "no rows": (lambda h: first_layer(h).update(rows=[]), "'rows' must be ranges"),
    "groups null": (lambda h: first_layer(h).update(groups=None), f"'groups' {SIZE}"),
    "padding null": (
        lambda h: first_layer(h).update(layout="index out", padding_idx=None), "an index below"),
    "base null": (lambda h: first_layer(h).update(base=None), "'base' must be text"),
    "a name that is a number": (lambda h: first_layer(h).update(name=3), "'name' must be text"),
    "layouts of the configuration": (
        lambda h: h["config"].update(layouts={"a": "square"}), "unknown layout"),
    "rows of the configuration": (
        lambda h: h["config"].update(rows={"a": [[3, 1]]}), "first < stop"),
    "size 0": (lambda h: first_layer(h).update(out=0), f"'out' {SIZE}; it is 0"),
    "size true": (lambda h: first_layer(h).update(r=True), f"'r' {SIZE}; it is True"),
    "r_out as text": (lambda h: h["config"].update(r_out="4"), "r_out must be an int"),
    "no metadata": (lambda h: h.pop("metadata") and None, "lacks the field 'metadata'"),
    "format 0": (lambda h: h.update(format=0), "must be an integer from 1; it is 0"),
    "format true": (lambda h: h.update(format=True), "must be an integer from 1; it is True"),
    "dropout 1": (lambda h: h["config"].update(dropout=1), "dropout must be"),
    "rank_pattern as list": (
        lambda h: h["config"].update(rank_pattern=["head", 2]), "rank_pattern must be a dict"),
    "no r": (lambda h: h["config"].pop("r") and None, "lacks the field 'r'"),
}  # fmt: skip

BAD_TENSORS = {
    "missing": (lambda t: t.pop("head.bone_block"), "disagree: missing 'head.bone_block'"),
    "extra": (lambda t: t.update(x=torch.zeros(1)), "not described 'x'"),
    "a parameter of the model": (
        lambda t: t.update({"embed.weight": torch.zeros(12, 8)}), "not described 'embed.weight'"),
    "shape": (
        lambda t: t.update({"head.bone_block": torch.zeros(3, 11)}),
        r"head: expected a block of shape \(3, 12\), found \(3, 11\)"),
    "shape beside": (
        lambda t: t.update({"layers.0.attn.norm.weight": torch.zeros(9)}),
        r"layers.0.attn.norm.weight: expected shape \(9,\), found \(8,\)"),
    "nan": (
        lambda t: t["head.bone_block"].fill_(float("nan")), "not finite.*head.bone_block"),
    "infinity beside": (
        lambda t: t["layers.0.attn.norm.weight"].fill_(float("inf")), "not finite.*norm"),
    "integers": (
        lambda t: t.update({"head.bone_block": torch.zeros(3, 12, dtype=torch.int32)}),
        "dtype 'I32'; allowed are F16, BF16, F32, F64"),
}  # fmt: skip

GOOD_HEADERS = {
    "as written": lambda h: None,
    "unknown fields": lambda h: {
        **h, "x": [1], "layers": [{"y": {}, **layer} for layer in h["layers"]]},
    "defaults left out": lambda h: h.update(config={"r": 3}),
    "the scale as an integer": lambda h: first_layer(h).update(scale=1),
    "no fingerprint": lambda h: first_layer(h).pop("base") and None,
    "escapes": lambda h: json.dumps({**h, "metadata": {"ä": "\U0001f642"}}, ensure_ascii=True),
    "in another order": lambda h: json.dumps(h, sort_keys=True, indent=2),
}  # fmt: skip


def refuses(path):
    try:
        reference_reader.read(path.read_bytes())
    except reference_reader.Refused:
        return True
    return False


class TestRefusals:
    def agree(self, path, refused, says="", by_both=True):
        """Both readers take the file, or both refuse it, ours with nothing changed."""
        assert refuses(path) == (refused and by_both)
        model = base()
        before = snapshot(model)
        if not refused:
            assert disha.load_adapter(model, path).complete
            return
        with pytest.raises(AdapterFileError, match=f"(?s)^.*{path.name}.*{says}"):
            disha.load_adapter(model, path)
        assert_unchanged(model, before)

    @pytest.mark.parametrize("name", BAD_HEADERS)
    def test_headers(self, path, name):
        disha.save_adapter(trained(), path)
        change, says = BAD_HEADERS[name]
        rewritten(path, change_header=change)
        self.agree(path, True, says, by_both=name not in ONLY_BY_THE_MODEL)
        if name not in ONLY_BY_THE_MODEL:
            with pytest.raises(AdapterFileError, match=f"(?s){says}"):
                disha.inspect_adapter(path)

    @pytest.mark.parametrize("name", BAD_TENSORS)
    def test_tensors(self, path, name):
        disha.save_adapter(trained(), path)
        change, says = BAD_TENSORS[name]
        rewritten(path, change_tensors=change)
        self.agree(path, True, says, by_both=name not in ONLY_BY_THE_MODEL)

    @pytest.mark.parametrize("name", GOOD_HEADERS)
    def test_headers_that_are_fine(self, path, name):
        disha.save_adapter(trained(), path)
        rewritten(path, change_header=GOOD_HEADERS[name])
        self.agree(path, refused=False)

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"r": 6, "in": 5}, "r=6 is larger than .*5"),
            ({"out": 9}, "r_out=2 does not divide .*9"),
        ],
    )
    @pytest.mark.parametrize("layer", ["linear", "conv", "transposed", "embedding"])
    def test_sizes_that_contradict_each_other(self, everything, path, layer, change, problem):
        disha.save_adapter(disha.inject_adapters(everything(), f"^{layer}$", 4, r_out=2), path)
        assert not refuses(path)
        rewritten(path, change_header=lambda header: first_layer(header).update(change))
        assert refuses(path)
        with pytest.raises(AdapterFileError, match=f"{layer}: .*{problem}"):
            disha.inspect_adapter(path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda entries, data: data + b"\0",
            lambda entries, data: data[:-1],
            lambda entries, data: entries["head.bone_block"].update(shape=[3, 11]),
            lambda entries, data: entries["head.bone_block"].update(dtype="F16"),
            lambda entries, data: entries["head.bone_block"].update(data_offsets=[4, 148]),
            lambda entries, data: entries.pop("head.bone_block") and None,
            lambda entries, data: entries.pop("__metadata__") and None,
        ],
    )
    def test_containers(self, path, change):
        disha.save_adapter(trained(), path)
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        entries, values = json.loads(data[8:start]), data[start:]
        changed = change(entries, values)
        text = json.dumps(entries).encode()
        values = changed if isinstance(changed, bytes) else values
        path.write_bytes(len(text).to_bytes(8, "little") + text + values)
        self.agree(path, refused=True)

    @pytest.mark.parametrize("length", [0, 7, 2**40, 2**64 - 1])
    def test_lengths_that_lie(self, path, length):
        disha.save_adapter(trained(), path)
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
        self.agree(path, refused=True)


class TestVersions:
    def test_a_later_one_is_refused_whatever_else_it_holds(self, path):
        """Its header may be anything: the advice has to come all the same."""
        disha.save_adapter(trained(), path)
        rewritten(path, change_header=lambda header: {"format": FORMAT + 1, "layers": "other"})
        for read in (disha.inspect_adapter, lambda path: disha.load_adapter(base(), path)):
            with pytest.raises(AdapterFileError, match=r"has format 2, and .* up to 1; upgrade"):
                read(path)

    def test_unknown_fields_are_overlooked_and_dropped(self, path, tokens):
        """Save in the configuration, which says how to train on."""
        model = trained()
        disha.save_adapter(model, path)
        written = path.read_bytes()
        rewritten(path, change_header=GOOD_HEADERS["unknown fields"])
        assert path.read_bytes() != written
        other = base()
        disha.load_adapter(other, path)
        assert torch.equal(other(tokens), model(tokens))
        disha.save_adapter(other, path)
        assert path.read_bytes() == written


# --- bytes ---------------------------------------------------------------------------------------


def varied():
    """A model whose file has everything whose order could change."""
    return trained(
        rank_pattern={"v_proj": 2, "head": 1, "proj": 3},
        also_train=["norm", "embed"],
        exclude=["0.attn.q_proj"],
    )


NOTES = {"zoo": "ä", "author": "\U0001f642", "note": 'with "quotes" and \n'}


def taken_apart(data):
    """Return the object at the beginning of a container, and the values behind it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


class TestBytes:
    def test_processes_and_hash_seeds_do_not_matter(self, path):
        disha.save_adapter(varied(), path, metadata=NOTES)
        script = f"""
            import disha
            from tests.test_format import NOTES, varied
            notes = dict(reversed(NOTES.items()))
            disha.save_adapter(varied(), {str(path) + ".other"!r}, metadata=notes)
        """
        for seed in ("1", "2"):
            subprocess.run(
                [sys.executable, "-c", textwrap.dedent(script)],
                env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
            )  # fmt: skip
            assert Path(f"{path}.other").read_bytes() == path.read_bytes()

    def test_the_container_is_what_safetensors_makes_of_it(self, path):
        disha.save_adapter(varied(), path, metadata=NOTES)
        ours, tensors = path.read_bytes(), safetensors.torch.load_file(path)
        metadata = taken_apart(ours)[0]["__metadata__"]
        assert list(metadata) == ["disha", "disha_checksum"]
        theirs = safetensors.torch.save(tensors, metadata)  # in which the two come in any order
        assert len(ours) == len(theirs)
        assert taken_apart(ours) == taken_apart(theirs)
        assert list(taken_apart(ours)[0]) == list(taken_apart(theirs)[0])
        assert reference_reader.read(ours).metadata == NOTES

    def test_the_header_is_written_in_one_way(self, path):
        disha.save_adapter(varied(), path, metadata=NOTES)
        text = reference_reader.read(path.read_bytes()).text
        header = json.loads(text)
        assert text == json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        assert list(header["metadata"]) == sorted(NOTES)
        assert header["also_train"] == sorted(header["also_train"])
        assert list(header["config"]["rank_pattern"]) == ["v_proj", "head", "proj"]
        assert [layer["name"] for layer in header["layers"]] == [
            *("layers.0.attn.v_proj", "layers.1.attn.q_proj", "layers.1.attn.v_proj", "head"),
        ]


def nested(layers):
    """Return a model with the given layers under the given dotted names."""
    model = nn.Module()
    for name, layer in layers.items():
        owner = model
        *parents, last = name.split(".")
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, layer)
    return model


def llama():
    """The 224 projections of a 7B Llama by their names, with widths of a hundredth."""
    sizes = {
        "self_attn": {"q_proj": (40, 40), "k_proj": (40, 40), "v_proj": (40, 40),
                      "o_proj": (40, 40)},
        "mlp": {"gate_proj": (40, 110), "up_proj": (40, 110), "down_proj": (110, 40)},
    }  # fmt: skip
    return {
        f"model.layers.{i}.{part}.{name}": nn.Linear(*size, bias=False)
        for i in range(32)
        for part, projections in sizes.items()
        for name, size in projections.items()
    }


def densenet():
    """The convolutions of DenseNet-201 but the first, by their names: hardly two are alike."""
    layers, channels = {}, 64
    for block, depth in enumerate((6, 12, 48, 32), 1):
        for i in range(1, depth + 1):
            name = f"features.denseblock{block}.denselayer{i}"
            layers[f"{name}.conv1"] = nn.Conv2d(channels, 128, 1, bias=False)
            layers[f"{name}.conv2"] = nn.Conv2d(128, 32, 3, bias=False)
            channels += 32
        if block < 4:
            layers[f"features.transition{block}.conv"] = nn.Conv2d(channels, channels // 2, 1)
            channels //= 2
    return layers


class TestSize:
    @pytest.mark.parametrize(
        ("make", "r", "count", "most"),
        [(llama, 16, 224, 290 * 224), (densenet, 64, 199, 4096 + 290 * 199)],
    )
    def test_little_beyond_the_tensors(self, path, make, r, count, most):
        """For the Llama, less than is allowed: its real widths have longer numbers."""
        layers = make()
        assert len(layers) == count
        model = nested(layers).to(torch.bfloat16)
        disha.save_adapter(disha.inject_adapters(model, ".", r), path)
        values = sum(block.nbytes for block in disha.adapter_parameters(model))
        assert values < path.stat().st_size <= values + most


# --- what is read --------------------------------------------------------------------------------


def sparse(path, sizes):
    """Write an adapter file whose values are a hole: as long as it says, on disk next to nothing.

    Args:
        path: the file.
        sizes: (in, out) of each layer, whose Bone block is of r = in.
    """
    fields = {
        "format": 1,
        "config": {"r": 1},
        "layers": [
            {"name": str(i), "layout": "out in", "r": r, "in": r, "out": out, "scale": 1.0}
            for i, (r, out) in enumerate(sizes)
        ],
        "also_train": [],
        "metadata": {},
    }
    entries, end = {"__metadata__": {"disha": json.dumps(fields)}}, 0
    for i, (r, out) in enumerate(sizes):
        begin, end = end, end + 4 * r * out
        entries[f"{i}.bone_block"] = {
            "dtype": "F32", "shape": [r, out], "data_offsets": [begin, end]}  # fmt: skip
    text = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


class TestReading:
    def test_inspecting_asks_for_no_tensor(self, path, monkeypatch):
        disha.save_adapter(trained(), path)

        def refuse(*arguments):
            raise AssertionError("a tensor was read")

        monkeypatch.setattr(TensorFile, "read", refuse)
        assert len(disha.inspect_adapter(path).layers) == 5
        with pytest.raises(AssertionError, match="a tensor was read"):
            disha.load_adapter(base(), path)

    def test_layers_that_are_left_out_are_not_read(self, path, monkeypatch):
        disha.save_adapter(trained(), path)
        read, asked = TensorFile.read, []

        def noted(file, key):
            asked.append(key)
            return read(file, key)

        monkeypatch.setattr(TensorFile, "read", noted)
        disha.load_adapter(base(), path, layers="head", also_train=False)
        assert asked == ["head.bone_block"]

    def test_memory(self, tmp_path):
        """In a process of its own, whose peak is its own.

        Inspecting takes none for the values, be they of 8 GiB. Loading takes the blocks, in the
        dtype asked for, and has the file's values mapped, which the system can take back.
        """
        huge, large = tmp_path / "huge.safetensors", tmp_path / "large.safetensors"
        sparse(huge, [(2**14, 2**17)])
        assert huge.stat().st_size > 2**33
        sparse(large, [(2**10, 2**12)] * 4)
        script = f"""
            import resource
            import torch
            from torch import nn
            import disha

            def growth(action):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                action()
                return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10

            def layer():
                linear = nn.Linear(1, 1, bias=False)
                linear.in_features, linear.out_features = 2**10, 2**12
                linear.weight = nn.Parameter(weight)
                return linear

            weight = torch.ones(2**12, 2**10)
            small = nn.Sequential(*(layer() for _ in range(4)))
            other = nn.Sequential(*(layer() for _ in range(4)))
            print(growth(lambda: disha.inspect_adapter({str(huge)!r})))
            print(growth(lambda: disha.load_adapter(small, {str(large)!r}, dtype=torch.bfloat16)))
            print(growth(lambda: disha.load_adapter(other, {str(large)!r})))
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        inspecting, narrow, same = map(float, done.stdout.split())
        assert inspecting < 8
        assert narrow < (0.5 + 1) * 64 + 24
        # The first adapter is still there, the first mapping is not.
        assert narrow + same < (0.5 + 1 + 1) * 64 + 24

    @pytest.mark.parametrize("name", ["ä 中 \U0001f642.safetensors", "-", "no suffix"])
    def test_any_name_of_a_file(self, tmp_path, tokens, name):
        model = trained()
        disha.save_adapter(model, tmp_path / name)
        other = base()
        disha.load_adapter(other, str(tmp_path / name))
        assert torch.equal(other(tokens), model(tokens))

    def test_a_file_that_may_only_be_read(self, tmp_path, tokens):
        model, folder = trained(), tmp_path / "folder"
        folder.mkdir()
        disha.save_adapter(model, folder / "a")
        (folder / "a").chmod(0o444)
        folder.chmod(0o555)
        try:
            other = base()
            disha.load_adapter(other, folder / "a")
        finally:
            folder.chmod(0o755)
        assert torch.equal(other(tokens), model(tokens))

    @pytest.mark.parametrize("action", ["save", "inspect", "load"])
    def test_a_name_that_could_not_be_read_again(self, tmp_path, action):
        path = tmp_path / os.fsdecode(b"\xff.safetensors")
        actions = {
            "save": lambda: disha.save_adapter(trained(), path),
            "inspect": lambda: disha.inspect_adapter(path),
            "load": lambda: disha.load_adapter(base(), path),
        }
        with pytest.raises(DishaError, match="can't be a file here"):
            actions[action]()
        assert not list(tmp_path.iterdir())
