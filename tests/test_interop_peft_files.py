"""PEFT's two files of an adapter, and the names in them, for MiSS and for LoRA."""

import random
import re
import warnings

import pytest
import torch
from peft import LoraConfig, MissConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

import disha
from disha import AdapterIOError, ArgumentTypeError, ConversionError, DishaError
from disha.files.reading import LARGEST_TEXT
from disha.interop import lora
from disha.interop import peft as miss
from disha.interop.peft_files import LONGEST_NAME, anchored, exact_targets
from tests.conftest import assert_unchanged, snapshot
from tests.peft_models import net, rewrite, tensors_of

FORMATS = {"miss": miss, "lora": lora}
FACTORS = {miss: "inner.miss_block", lora: "inner.lora_B.weight"}
in_both_formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


# --- folders from strangers ----------------------------------------------------------------------


def config(text):
    data = text if isinstance(text, bytes) else text.encode()
    return lambda folder, form: (folder / "adapter_config.json").write_bytes(data)


def without(name):
    return lambda folder, form: (folder / name).unlink()


def as_pickle(folder, form):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut_off(folder, form):
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-5])


def unprefixed(folder, form):
    tensors = tensors_of(folder)
    rewrite(folder, {key.removeprefix("base_model."): value for key, value in tensors.items()})


def tensor(change, key=None):
    def apply(folder, form):
        tensors, full = tensors_of(folder), f"base_model.model.{key or FACTORS[form]}"
        rewrite(folder, {**tensors, full: change(tensors.get(full))})

    return apply


def fields(**changes):
    return lambda folder, form: rewrite(folder, **changes)


REFUSED = {
    "no configuration": (without("adapter_config.json"), "can't read"),
    "no tensors": (without("adapter_model.safetensors"), "can't read"),
    "a pickle": (as_pickle, "a pickle, which can run any code"),
    "cut off": (cut_off, "not a complete safetensors file"),
    "no prefix": (unprefixed, "must be 'base_model.model.' and a name"),
    "no JSON": (config("{"), "not valid JSON"),
    "not UTF-8": (config(b"\xff\xfe{"), "not valid JSON"),
    "deep JSON": (config('{"a":' * 100_000 + "1" + "}" * 100_000), "not valid JSON"),
    "long number": (config('{"r":' + "9" * 10_000 + "}"), "not valid JSON"),
    "a field twice": (config('{"r": 4, "r": 5}'), "'r' comes twice"),
    "endless JSON": (config(" " * (LARGEST_TEXT + 1)), "larger than 16,777,216 bytes"),
    "a list": (config("[]"), "must be a JSON object; it is a list"),
    "no type": (fields(peft_type=...), "peft_type"),
    "another type": (fields(peft_type="LOHA"), "peft_type"),
    "unhashable type": (fields(peft_type=[]), "peft_type"),
    "saved is text": (fields(modules_to_save="norm"), "modules_to_save must be a list of names"),
    "saved is empty": (fields(modules_to_save=[""]), "modules_to_save must be a list of names"),
    "many are saved": (fields(modules_to_save=["a"] * 10_001), "at most 10,000 names"),
    "a dropout of one": (fields(miss_dropout=1, lora_dropout=1), "dropout"),
    "a long name": (tensor(lambda _: torch.ones(1), "a" * (LONGEST_NAME + 1)), "allowed are 1,000"),
    "infinite": (tensor(lambda t: t / 0), "not finite"),
    "not a number": (tensor(lambda t: t * float("nan"), "norm.weight"), "not finite"),
    "integers": (tensor(lambda t: t.long()), "has dtype torch.int64"),
    "eight bits": (tensor(lambda t: t.to(torch.float8_e4m3fn)), "float8"),
    "another buffer": (tensor(lambda t: t + 1, "norm.running_var"), "this buffer differs"),
}


@in_both_formats
@pytest.mark.parametrize("case", REFUSED)
def test_bad_folders_are_refused_and_change_nothing(case, form, tmp_path):
    change, reason = REFUSED[case]
    trained = disha.inject_adapters(
        net(), r"inner|layers\.0\.v", 4, also_train="^norm", init="kaiming"
    )
    form.export(trained, tmp_path)
    form.load(net(), tmp_path)
    change(tmp_path, form)
    model = net()
    before = snapshot(model)
    with pytest.raises(DishaError) as caught:
        form.load(model, tmp_path)
    assert reason in str(caught.value), str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert_unchanged(model, before)


@in_both_formats
def test_paths_that_are_no_folders(tmp_path, form):
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "file"):
        with pytest.raises(AdapterIOError, match="it is not a folder"):
            form.load(net(), tmp_path / name)
    with pytest.raises(ArgumentTypeError):
        form.load(net(), 3)
    with pytest.raises(ArgumentTypeError):
        form.load("model", tmp_path)


# --- names ---------------------------------------------------------------------------------------

MODULES = [
    *("embed", "q", "norm", "layers", "h.1.q", "a.h.2.q", "lm_head", "head", "head.q"),
    *(f"layers.{n}" for n in range(3)),
    *(f"layers.{n}.{m}.{p}" for n in range(3) for m in ("attn", "mlp") for p in ("q", "v")),
    *(f"model.layers.{n}.experts.{e}.q" for n in range(3) for e in range(2)),
    *(f"model.enc.layers.{n}.q" for n in (1, 10)),
]


@pytest.mark.parametrize("config_class", [MissConfig, LoraConfig])
def test_exact_targets_select_these_and_no_others(config_class):
    choose = random.Random(0)
    forms = set()
    for size in [1, 2, 3, 5, len(MODULES)] * 40:
        wanted = set(choose.sample(MODULES, size))
        for modules in (MODULES, None):
            target = exact_targets(wanted, modules)
            forms.add((type(target), modules is None))
            selects = config_class(target_modules=target)
            found = {name for name in MODULES if check_target_module_exists(selects, name)}
            assert found == wanted, target
    assert forms == {(list, False), (str, False), (str, True)}


def test_targets_are_as_short_as_they_can_be():
    assert exact_targets(["layers.0", "layers.1", "layers.2"], MODULES) == ["0", "1", "2"]
    assert exact_targets(["layers.0.attn.q", "embed"], MODULES) == ["embed", "layers.0.attn.q"]
    assert exact_targets(["q"], MODULES) == "q"


def test_exact_regexes_of_odd_names():
    names = ["a+b.c", "a.b", "a", "a.b.c", "all-linear", "x.(y", "äöü.[0]", "a.b\\"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pattern = re.compile(exact_targets(names))
    assert all(pattern.fullmatch(name) for name in names)
    assert not any(pattern.fullmatch(name) for name in ("a.c", "aab.c", "x", "a.", "a.b.", "b"))


def test_names_that_only_a_hostile_file_has():
    re.compile(exact_targets([".".join("a" * parts) for parts in range(1, 101)]))
    with pytest.raises(ConversionError, match=r"has 3,000 parts; names with at most 100 can be"):
        exact_targets(["b", ".".join("a" * 3000)])


def test_regexes_of_large_models_are_short():
    names = [
        f"model.layers.{n}.mlp.experts.{e}.{p}_proj"
        for n in range(48)
        for e in range(128)
        for p in ("gate", "up", "down")
    ]
    assert len(exact_targets(names)) < 1_000


@pytest.mark.parametrize("name", ["q", "layers.0.q", "a+b.c", "layers.1"])
def test_anchored_keys_are_of_one_layer_only(name):
    key = anchored(name)
    assert get_pattern_key([key], name) == key
    for other in (f"model.{name}", f"{name}.x", f"x{name}", "a.b.c"):
        assert get_pattern_key([key], other) == other
