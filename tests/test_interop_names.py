"""Names as PEFT matches them: what is written for some layers, against PEFT's own function."""

import random
import re
import warnings

import pytest
from peft import LoraConfig, MissConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from disha.interop.peft_files import anchored, exact_targets

MODULES = [
    *("embed", "q", "norm", "layers", "h.1.q", "a.h.2.q", "lm_head", "head", "head.q"),
    *(f"layers.{n}" for n in range(3)),
    *(f"layers.{n}.{m}.{p}" for n in range(3) for m in ("attn", "mlp") for p in ("q", "v")),
    *(f"model.layers.{n}.experts.{e}.q" for n in range(3) for e in range(2)),
    *(f"model.enc.layers.{n}.q" for n in (1, 10)),
]


@pytest.mark.parametrize("config", [MissConfig, LoraConfig])
def test_exact_targets_select_these_and_no_others(config):
    choose = random.Random(0)
    forms = set()
    for size in [1, 2, 3, 5, len(MODULES)] * 40:
        wanted = set(choose.sample(MODULES, size))
        for modules in (MODULES, None):
            target = exact_targets(wanted, modules)
            forms.add((type(target), modules is None))
            selects = config(target_modules=target)
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
