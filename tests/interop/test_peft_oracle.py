"""BoneLinear, BatLinear and injected layers against the real MiSS layers of PEFT, on equal blocks.

Where PEFT (0.21) does something else than this library, and which test shows it:

- BAT refuses sizes that r does not divide; here they are zero-padded
  (`test_peft_refuses_ragged_bat_that_we_pad`);
- several active BAT adapters act one after the other, each on what the one before made of the
  weight, so their order matters; here each starts from the original weight
  (`test_peft_chains_bat_adapters_and_we_add_them`);
- BAT ignores `miss_dropout`; here it drops the adapter's input
  (`test_peft_ignores_dropout_for_bat`);
- scaling is not supported: `scale_layer` warns and leaves the scale at 1. There is nothing to
  compare with;
- `get_delta_weight` of BAT returns dW, `get_delta_weight_miss` the merged weight, written into its
  argument where r does not divide: hence the clones;
- with a float32 block over bfloat16, Bone is added in float32 before rounding, here the update is
  rounded first (the base's output is kept as the plain layer gives it), so only float64 and float32
  are compared.
"""

import pytest
import torch
from peft import MissConfig
from peft.tuners.miss.layer import MissLinear
from torch import nn

import disha
from disha import BatLinear, BoneLinear
from tests.conftest import close

INIT_WEIGHTS = {"bone": True, "tile": "mini", "bat": "bat"}
# method, in, out, r, r_out
CASES = (
    ("bone", 8, 12, 4, None),
    ("bone", 10, 9, 4, None),
    ("bone", 7, 2, 5, None),
    ("bone", 5, 6, 5, None),
    ("bone", 5, 6, 1, None),
    ("tile", 8, 12, 4, 3),
    ("tile", 10, 9, 4, 3),
    ("tile", 7, 4, 5, 4),
    ("bat", 8, 12, 4, None),
    ("bat", 9, 6, 3, None),
    ("bat", 4, 4, 4, None),
    ("bat", 3, 5, 1, None),
)
LEADS = ((), (5,), (2, 3), (0,))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def injected(linear, method, r, r_out):
    return disha.inject_adapters(
        linear, "all-linear", r, method="bat" if method == "bat" else "bone", r_out=r_out
    )


def from_linear(linear, method, r, r_out):
    if method == "bat":
        return BatLinear.from_linear(linear, r=r)
    return BoneLinear.from_linear(linear, r=r, r_out=r_out)


def copy_of(linear):
    twin = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    twin.to(linear.weight.dtype).load_state_dict(linear.state_dict())
    return twin


def miss_layer(linear, method, r, r_out, adapter="default", dropout=0.0):
    config = MissConfig(
        r=r, mini_r=r_out or 1, init_weights=INIT_WEIGHTS[method], miss_dropout=dropout
    )
    return MissLinear(copy_of(linear), adapter, config=config, r=r).to(linear.weight.dtype)


def add_miss_adapter(layer, method, r, adapter):
    config = MissConfig(r=r, init_weights=INIT_WEIGHTS[method])
    layer.update_layer(adapter, r, config=config)
    layer.set_adapter([*layer.active_adapters, adapter])


def fill(block, peft_block):
    """Put the same random values into both; their shapes must be the same."""
    assert block.shape == peft_block.shape
    with torch.no_grad():
        block.normal_()
        peft_block.copy_(block)


def pair(case, make=injected, dtype=torch.float64, bias=True):
    method, in_features, out_features, r, r_out = case
    linear = nn.Linear(in_features, out_features, bias, dtype=dtype)
    theirs = miss_layer(linear, method, r, r_out)
    ours = make(linear, method, r, r_out)
    fill(ours.disha["default"].block, theirs.miss_block["default"])
    return ours, theirs


COVER = [
    (case, make, dtype, lead, bias)
    for place, case in enumerate(CASES)
    for turn, (make, dtype, bias) in enumerate(
        [(injected, torch.float64, True), (from_linear, torch.float32, False)]
    )
    for lead in (LEADS[(place + turn) % 4], LEADS[(place + turn + 2) % 4])
]
"""Each case in both dtypes, made in both ways, and each pair of a dtype and a leading shape."""


@pytest.mark.parametrize(
    ("case", "make", "dtype", "lead", "bias"),
    COVER,
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_forward_and_gradients_equal_peft(case, make, dtype, lead, bias):
    ours, theirs = pair(case, make, dtype, bias)
    x = torch.randn(*lead, ours.in_features, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(*lead, ours.out_features, dtype=dtype)
    results = []
    for layer, block in (
        (ours, ours.disha["default"].block),
        (theirs, theirs.miss_block["default"]),
    ):
        y = layer(x)
        results.append((y, *torch.autograd.grad(y, (x, block), cotangent)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("make", "dtype"), [(from_linear, torch.float64), (injected, torch.float32)]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merged_weight_equals_peft(case, make, dtype):
    ours, theirs = pair(case, make, dtype)
    weight = ours.base_weight.detach().clone()
    if case[0] == "bat":
        expected = weight + theirs.get_delta_weight("default", weight.clone())
    else:
        expected = theirs.get_delta_weight_miss("default", weight.clone())
    disha.merge_adapters(ours)
    close(ours.weight.detach(), expected.detach(), TOLERANCE[dtype])

    theirs.merge()
    x = torch.randn(3, ours.in_features, dtype=dtype)
    close(ours(x), theirs(x), TOLERANCE[dtype])


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "bat"], ids=str)
def test_two_bone_adapters_equal_peft(case):
    ours, theirs = pair(case)
    method, _, _, r, r_out = case
    disha.inject_adapters(ours, "all-linear", 2 if r > 2 else r, r_out=r_out, adapter="other")
    disha.set_active_adapters(ours, ["default", "other"])
    config = MissConfig(r=2 if r > 2 else r, mini_r=r_out or 1, init_weights=INIT_WEIGHTS[method])
    theirs.update_layer("other", config.r, config=config)
    theirs.set_adapter(["default", "other"])
    fill(ours.disha["other"].block, theirs.miss_block["other"])
    x = torch.randn(3, ours.in_features, dtype=torch.float64)
    close(ours(x), theirs(x), 1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "bone"], ids=str)
def test_dropout_draws_on_the_same_elements_as_peft(case):
    # PEFT pads before it drops, so the same random numbers fall on the same elements only in the
    # sizes that r divides; in the others the rest is equal in distribution.
    _, in_features, out_features, r, _ = case
    x = torch.randn(3, in_features, dtype=torch.float64)
    linear = nn.Linear(in_features, out_features, dtype=torch.float64)
    theirs = miss_layer(linear, "bone", r, None, dropout=0.5)
    ours = disha.inject_adapters(linear, "all-linear", r, dropout=0.5)
    fill(ours.disha["default"].block, theirs.miss_block["default"])
    close(ours.eval()(x), theirs.eval()(x), 1e-10)
    if in_features % r == 0:
        torch.manual_seed(1)
        dropped = ours.train()(x)
        torch.manual_seed(1)
        close(dropped, theirs.train()(x), 1e-10)


@pytest.mark.parametrize("sizes", [(10, 8), (8, 10), (10, 10)], ids=str)
def test_peft_refuses_ragged_bat_that_we_pad(sizes):
    linear = nn.Linear(*sizes)
    with pytest.raises(ValueError, match="fully divisible"):
        miss_layer(linear, "bat", 4, None)
    assert BatLinear.from_linear(linear, r=4)(torch.randn(2, sizes[0])).shape == (2, sizes[1])


def test_peft_chains_bat_adapters_and_we_add_them():
    ours, theirs = pair(("bat", 8, 8, 4, None))
    disha.inject_adapters(ours, "all-linear", 2, method="bat", adapter="other")
    disha.set_active_adapters(ours, ["default", "other"])
    add_miss_adapter(theirs, "bat", 2, "other")
    fill(ours.disha["other"].block, theirs.miss_block["other"])

    x, weight = torch.randn(3, 8, dtype=torch.float64), ours.base_weight.detach()
    deltas = {name: theirs.get_delta_weight(name, weight) for name in ("default", "other")}
    added = nn.functional.linear(x, weight + deltas["default"] + deltas["other"], ours.bias)
    first = weight + deltas["default"]
    chained = nn.functional.linear(x, first + theirs.get_delta_weight("other", first), ours.bias)
    close(ours(x), added, 1e-10)
    close(theirs(x), chained, 1e-10)
    assert not torch.allclose(added, chained)


def test_peft_ignores_dropout_for_bat():
    linear = nn.Linear(8, 8)
    theirs = miss_layer(linear, "bat", 4, None, dropout=0.5)
    ours = BatLinear.from_linear(linear, r=4, dropout=0.5)
    fill(ours.disha["default"].block, theirs.miss_block["default"])
    x = torch.randn(64, 8)
    assert torch.equal(theirs.train()(x), theirs.eval()(x))
    assert not torch.allclose(ours.train()(x), ours.eval()(x))
