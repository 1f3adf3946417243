"""Names as PEFT matches them: our regexes against `re`, our targets against PEFT's own function."""

import itertools
import random
import re
import time
import warnings

import pytest
from peft import MissConfig
from peft.tuners.tuners_utils import check_target_module_exists

from disha.interop.patterns import LONGEST, MOST_SETS, Pattern, PatternError
from disha.interop.targets import Targets, exact_regex, exact_targets

ATOMS = ["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "^", "$", r"\b", r"\Z", "-", "{", "}"]
ATOMS += ["a{", "[]a]", r"[\]b]", r"\x61", "(?#a)", "(?=a)", "(?!b)", ""]
GROUPS = ["(", "(?:", "(?P<n{}>", "(?=", "(?!"]
REPEATS = ["*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "{,}", "*?", "+?", "??", "{2}?"]


def some_regex(choose, depth):
    """Return a random regex; it need not be valid."""
    if depth == 0:
        return choose.choice(ATOMS)
    inner = some_regex(choose, depth - 1)
    form = choose.random()
    if form < 0.35:
        return inner + some_regex(choose, depth - 1)
    if form < 0.5:
        return f"{inner}|{some_regex(choose, depth - 1)}"
    if form < 0.65:
        return choose.choice(GROUPS).format(choose.randrange(10**9)) + inner + ")"
    if form < 0.9:
        return f"(?:{inner}){choose.choice(REPEATS)}"
    return inner


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_patterns_match_what_re_matches():
    choose, compared, matched = random.Random(0), 0, 0
    while compared < 8_000:
        text = some_regex(choose, choose.randrange(1, 5))
        try:
            expected = re.compile(text)
        except re.error:
            continue
        pattern = Pattern(text)
        for _ in range(4):
            name = "".join(choose.choice("ab.1-{\n") for _ in range(choose.randrange(6)))
            assert pattern.fullmatch(name) == bool(expected.fullmatch(name)), (text, name)
            compared += 1
            matched += bool(expected.fullmatch(name))
    assert matched > 500


@pytest.mark.parametrize(
    "text",
    ["(a)\\1", "(?P<n>a)(?P=n)", "(?<=a)b", "(?<!a)b", "(?i)a", "(?i:a)", r"\07", r"\N{BULLET}"],
)
def test_what_is_not_matched_is_refused(text):
    re.compile(text)
    with pytest.raises(PatternError, match="bounded time"):
        Pattern(text)


@pytest.mark.parametrize(
    "text",
    [
        "(",
        "[a",
        "a**",
        "a{99999999999999999999}",
        "(" * 5000 + ")" * 5000,
        "a" * LONGEST * 2,
        r"[\x00-\uffff]" * (MOST_SETS + 1),
        "(?i)" + "a" * 1000,
    ],
)
def test_what_is_no_regex_is_refused(text):
    with pytest.raises(PatternError):
        Pattern(text)


@pytest.mark.parametrize(
    "text", ["(a*)*b", "(a|aa)+b", "(((a*)*)*)*b", ".*" * 30 + "b", "(.*?,){20}P"]
)
def test_no_pattern_runs_for_ever(text):
    """`re` takes longer than anybody waits for the first of these."""
    start = time.process_time()
    for length in (100, 3000):
        try:
            assert not Pattern(text).fullmatch("a" * length)
        except PatternError as error:
            assert "too long" in str(error)  # noqa: PT017 - either is allowed
    assert time.process_time() - start < 20


MODULES = [
    *("embed", "q", "norm", "layers", "h.1.q", "a.h.2.q", "lm_head", "head", "head.q"),
    *(f"layers.{n}" for n in range(3)),
    *(f"layers.{n}.{m}.{p}" for n in range(3) for m in ("attn", "mlp") for p in ("q", "v")),
    *(f"model.layers.{n}.experts.{e}.q" for n in range(3) for e in range(2)),
    *(f"model.enc.layers.{n}.q" for n in (1, 10)),
]
TARGETS = [
    ["q"],
    ["attn.q", "v"],
    ["layers.1.mlp.q"],
    r".*\.q",
    r"layers\.[02]\.(attn|mlp)\.q",
    "q",
]
EXCLUDED = [None, ["v", "layers.2.attn.q"], r".*mlp.*", []]
SAVED = [None, ["head"], ["layers.1", "norm"], ["model.layers"]]
NUMBERS = [
    *((None, None), (1, None), ([0, 2], None)),
    *(([], "layers"), (1, "layers"), ([10, 2], ["h", "enc.layers"])),
]


def as_tuple(value):
    return () if value is None else (value,) if isinstance(value, (int, str)) else tuple(value)


def test_targets_are_those_of_peft():
    selected = 0
    for target, exclude, saved, (numbers, pattern) in itertools.product(
        TARGETS, EXCLUDED, SAVED, NUMBERS
    ):
        if isinstance(target, str) and (numbers is not None or pattern is not None):
            continue
        config = MissConfig(
            target_modules=target,
            exclude_modules=exclude,
            modules_to_save=saved,
            layers_to_transform=numbers,
            layers_pattern=pattern,
        )
        ours = Targets(target, exclude, as_tuple(saved), as_tuple(numbers), as_tuple(pattern))
        for name in MODULES:
            expected = bool(check_target_module_exists(config, name))
            assert ours.selects(name) == expected, (config, name)
            selected += expected
    assert selected > 500


def test_exact_targets_select_these_and_no_others():
    choose = random.Random(0)
    forms = set()
    for size in [1, 2, 3, 5, len(MODULES)] * 40:
        wanted = set(choose.sample(MODULES, size))
        target = exact_targets(wanted, ["", *MODULES])
        forms.add(type(target))
        for one in (target, exact_regex(wanted)):
            config = MissConfig(target_modules=one)
            found = {name for name in MODULES if check_target_module_exists(config, name)}
            assert found == wanted, one
            assert {name for name in MODULES if Targets(one).selects(name)} == wanted
    assert forms == {list, str}


def test_exact_regexes_of_odd_names():
    names = ["a+b.c", "a.b", "a", "a.b.c", "all-linear", "x.(y", "äöü.[0]", "a.b\\"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pattern = re.compile(exact_regex(names))
    assert all(pattern.fullmatch(name) for name in names)
    assert not any(pattern.fullmatch(name) for name in ("a.c", "aab.c", "x", "a.", "a.b.", "b"))


def test_regexes_of_large_models_are_short():
    names = [
        f"model.layers.{n}.mlp.experts.{e}.{p}_proj"
        for n in range(48)
        for e in range(128)
        for p in ("gate", "up", "down")
    ]
    assert len(exact_regex(names)) < 1_000
