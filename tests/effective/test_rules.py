"""The table of rules: the update counts whichever argument of an operation is adapted."""

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import disha
from disha.effective.rules import RULES
from disha.effective.weight import EffectiveWeight
from disha.private_torch import GROUPED
from tests.conftest import close, needs_grouped_products, perturb, seed_torch


class Of(tuple):
    """The shape of an argument that may be an adapted weight."""


MATRIX, STACK, SEQUENCE = Of((4, 4)), Of((4, 4, 4)), Of((4, 4, 4))
INDEX, ENDS = torch.tensor([1, 0, 1]), torch.tensor([1, 2, 3, 4], dtype=torch.int32)
ATTENTION = {
    "query": SEQUENCE,
    "key": SEQUENCE,
    "value": SEQUENCE,
    "embed_dim_to_check": 4,
    "num_heads": 2,
    "in_proj_weight": Of((12, 4)),
    "in_proj_bias": torch.linspace(-1, 1, 12),
    "bias_k": None,
    "bias_v": None,
    "add_zero_attn": False,
    "dropout_p": 0.0,
    "out_proj_weight": MATRIX,
    "out_proj_bias": torch.linspace(-1, 1, 4),
}

CALLS = {
    "mT": {"self": STACK},
    "t": {"input": MATRIX},
    "T": {"self": MATRIX},
    "transpose": {"input": MATRIX, "dim0": 0, "dim1": 1},
    "swapdims": {"input": MATRIX, "dim0": 0, "dim1": 1},
    "swapaxes": {"input": MATRIX, "axis0": 0, "axis1": 1},
    "split": {"tensor": MATRIX, "split_size_or_sections": 2},
    "chunk": {"input": MATRIX, "chunks": 2},
    "unbind": {"input": STACK},
    "index_select": {"input": STACK, "dim": 0, "index": INDEX},
    "select": {"input": STACK, "dim": 0, "index": 1},
    "to": {"self": MATRIX, "tensor": MATRIX},
    "type": {"self": MATRIX, "dtype": torch.float64},
    "type_as": {"self": MATRIX, "other": MATRIX},
    **{name: {"self": MATRIX} for name in ("float", "double", "half", "bfloat16", "contiguous")},
    "detach": {"input": MATRIX},
    "data": {"self": MATRIX},
    "linear": {"input": MATRIX, "weight": MATRIX, "bias": MATRIX},
    "matmul": {"input": MATRIX, "other": MATRIX},
    "__matmul__": {"self": STACK, "other": STACK},
    "mm": {"input": MATRIX, "mat2": MATRIX},
    "bmm": {"input": STACK, "mat2": STACK},
    "mv": {"input": MATRIX, "vec": torch.linspace(-1, 1, 4)},
    "addmm": {"input": MATRIX, "mat1": MATRIX, "mat2": MATRIX},
    GROUPED: {"input": MATRIX, "mat2": STACK, "offs": ENDS},
    "conv1d": {"input": Of((4, 4, 3)), "weight": Of((4, 4, 2))},
    "conv2d": {"input": Of((4, 4, 3, 3)), "weight": Of((4, 4, 2, 2))},
    "conv3d": {"input": Of((4, 4, 2, 2, 2)), "weight": Of((4, 4, 1, 1, 1))},
    "conv_transpose1d": {"input": Of((4, 4, 3)), "weight": Of((4, 4, 2))},
    "conv_transpose2d": {"input": Of((4, 4, 3, 3)), "weight": Of((4, 4, 2, 2))},
    "conv_transpose3d": {"input": Of((4, 4, 2, 2, 2)), "weight": Of((4, 4, 1, 1, 1))},
    "embedding": {"input": INDEX, "weight": MATRIX},
    "__getitem__": {"self": STACK, "index": INDEX},
    "embedding_bag": {
        "input": torch.arange(4).expand(4, 4),
        "weight": MATRIX,
        "offsets": None,
        "max_norm": None,
        "norm_type": 2.0,
        "scale_grad_by_freq": False,
        "mode": "sum",
        "sparse": False,
        "per_sample_weights": MATRIX,
    },
    "multi_head_attention_forward": ATTENTION,
}
"""Operation -> its arguments, in order."""

WITHOUT_NAMES = ("__getitem__", "split")
"""Operations that take no names, or other ones as a method than as a function."""

LAYOUTS = {
    2: ("out in", "in out", "index out"),
    3: ("expert out in", "expert in out", "out in *kernel", "in out *kernel"),
    4: ("out in *kernel", "in out *kernel"),
    5: ("out in *kernel", "in out *kernel"),
}
"""Number of axes -> the layouts that an adapted weight with so many can have."""

MODULES = [f"disha.effective.{name}" for name in ("attention", "products", "views")]
"""The modules whose rules have calls here. Tests of facts and of writes are beside this file."""


def forms_of(name):
    """Return the functions of this name that have a rule, each with whether it is a method."""
    forms = []
    for owner in (Tensor, torch, F):
        form = getattr(owner, name, None)
        if inspect.isgetsetdescriptor(form):
            form = form.__get__
        if callable(form) and form in RULES:
            forms.append((form, owner is Tensor))
    return forms


def module_of(rule):
    return getattr(rule, "func", rule).__module__  # the function of a partial one


def name_of(function):
    """Return the name of a function of torch; of an attribute's getter, that of the attribute."""
    owner = getattr(function, "__self__", None)
    return owner.__name__ if inspect.isgetsetdescriptor(owner) else function.__name__


def test_every_rule_has_a_call():
    """By name, because a library may put another function in the place of torch's.

    torch_geometric does so when it is imported, with `torch.select`.
    """
    own = [func for func, rule in RULES.items() if callable(func) and module_of(rule) in MODULES]
    assert set(CALLS) == set(map(name_of, own))
    assert all(forms_of(name) for name in CALLS)


def choices(name):
    """Yield argument -> layout, for the arguments that are adapted weights in one call."""
    axes = {place: len(shape) for place, shape in CALLS[name].items() if isinstance(shape, Of)}
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, count):
            for turn in range(4):
                layouts = {}
                for position, place in enumerate(chosen):
                    every = LAYOUTS[axes[place]]
                    layouts[place] = every[(turn + position) % len(every)]
                yield layouts


def arguments(name, layouts, method):
    """Return the arguments of a call with adapted weights, and with computed ones."""
    computed = {}
    for place, value in CALLS[name].items():
        computed[place] = torch.randn(value) if isinstance(value, Of) else value
    given = dict(computed)
    for place, layout in layouts.items():
        module = nn.Module()
        module.mix = nn.Parameter(given[place])
        disha.inject_adapters(module, "mix", 2, layouts={"mix": layout}, method=method)
        given[place] = perturb(module).mix
        computed[place] = given[place].clone()
    return given, computed


def run(form, given, count):
    """Call a function with the first `count` arguments by position, and the others by name."""
    result = form(*list(given.values())[:count], **dict(list(given.items())[count:]))
    results = result if isinstance(result, tuple | list) else [result]
    return [one + 0 for one in results if one is not None]


@pytest.fixture
def rules_pass_nothing_on(monkeypatch):
    """Fail if a rule gives an effective weight to torch: compiled code would compute with W."""
    dispatch = vars(EffectiveWeight)["__torch_function__"].__func__
    running = []

    def dispatch_once(cls, func, *args):
        is_fact = func in RULES and module_of(RULES[func]) == "disha.effective.facts"
        assert is_fact or not running, f"the rule of {running} gives a weight to {func}"
        running.append(func)
        try:
            return dispatch(cls, func, *args)
        finally:
            running.pop()

    monkeypatch.setattr(EffectiveWeight, "__torch_function__", classmethod(dispatch_once))


@pytest.mark.usefixtures("rules_pass_nothing_on")
@pytest.mark.parametrize("method", ["bone", "bat"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=needs_grouped_products if one == GROUPED else ()) for one in CALLS],
)
def test_each_argument_may_be_an_adapted_weight(name, method):
    tolerance = 0.02 if name in ("half", "bfloat16") else 1e-4
    seed_torch(0)
    for layouts in choices(name):
        given, computed = arguments(name, layouts, method)
        for form, is_method in forms_of(name):
            expected = run(form, computed, len(computed))
            close(run(form, given, len(given)), expected, tolerance)
            if name not in WITHOUT_NAMES:
                close(run(form, given, 1 if is_method else 0), expected, tolerance)
