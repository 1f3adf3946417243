"""In float16, an update is finite wherever its exact value is, whatever the shard sums are.

Each case is a module whose base is zero, with inputs so large that the plain sums of its shards, or
s times them, are beyond 65504. Its output is compared with that of the same model in float64.
"""

import contextlib

import pytest
import torch
from torch import nn

import disha
from tests.conftest import Made, needs_grouped_products, seed_torch


def stack(run):
    return lambda: Made(run, weight=nn.Parameter(torch.zeros(3, 8, 256)))


def grouped(self, x):
    ends = torch.tensor([2, 4, 6], dtype=torch.int32)
    return torch._grouped_mm(x, self.weight.mT, offs=ends)


EXPERTS = {"layouts": {"0": "expert out in"}}
LINEAR = (lambda: nn.Linear(256, 8), (4, 256))
CASES = {
    "linear": (*LINEAR, {}),
    "tokens": (LINEAR[0], (2, 2, 256), {}),
    "one shard size of all": (*LINEAR, {"r": 1}),
    "tile": (*LINEAR, {"r_out": 4}),
    "dropout": (*LINEAR, {"dropout": 1e-9}),
    "rows": (*LINEAR, {"rows": {"0": [(1, 3), (5, 6)]}}),
    "wide block": (*LINEAR, {"dtype": torch.float32}),
    "bat": (*LINEAR, {"method": "bat"}),
    "convolution": (lambda: nn.Conv2d(256, 8, 3), (2, 256, 4, 4), {}),
    "groups": (lambda: nn.Conv2d(256, 8, 3, groups=2), (2, 256, 4, 4), {}),
    "transposed": (lambda: nn.ConvTranspose1d(256, 8, 3, groups=2), (2, 256, 4), {}),
    "tile of a convolution": (lambda: nn.Conv1d(256, 8, 3), (2, 256, 4), {"r_out": 4}),
    "experts": (stack(lambda self, x: torch.bmm(x, self.weight.mT)), (3, 2, 256), EXPERTS),
    "grouped experts": (stack(grouped), (6, 256), EXPERTS),
}


def model(make, scale, adapters=1, **options):
    seed_torch(0)
    made = nn.Sequential(make()).half()
    for parameter in made.parameters():
        parameter.data.zero_()
    names = [f"a{i}" for i in range(adapters)]
    for name in names:
        disha.inject_adapters(made, ".", **{"r": 4, **options}, scale=scale, adapter=name)
    disha.set_active_adapters(made, names)
    for block in (block for name in names for block in disha.adapter_parameters(made, name)):
        nn.init.uniform_(block, 0.5e-3 / scale, 1e-3 / scale)
    return made


def compare(made, x, context=contextlib.nullcontext, run=None):
    with torch.no_grad(), context(made):
        found = (run or made)(x)
    exact_in = torch.float32 if getattr(made[0], "run", None) is grouped else torch.float64
    made.to(exact_in)
    with torch.no_grad(), context(made):
        expected = made(x.to(exact_in))
    assert found.dtype == torch.float16
    assert 1 < expected.abs().max() < 60_000  # this is worth something
    torch.testing.assert_close(found.to(exact_in), expected, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=needs_grouped_products if "grouped" in c else ()) for c in CASES]
)
def test_outputs_are_finite(case, scale):
    make, shape, options = CASES[case]
    compare(model(make, scale, **options), torch.full(shape, 2_000.0).half())


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("case", ["linear", "tile", "convolution", "experts"])
def test_outputs_are_finite_when_compiled(case, scale):
    make, shape, options = CASES[case]
    made = model(make, scale, **options)
    torch.compiler.reset()
    run = torch.compile(made, backend="aot_eager")
    compare(made, torch.full(shape, 2_000.0).half(), run=run)


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("case", ["linear", "tile", "convolution"])
@pytest.mark.parametrize("routed", [False, True])
def test_outputs_of_several_adapters_are_finite(case, scale, routed):
    def route(made):
        names = ["a0", "a1"] * 2 if case != "convolution" else ["a1", "a0"]
        return disha.route_adapters(made, names) if routed else contextlib.nullcontext()

    make, shape, options = CASES[case]
    made = model(make, scale, adapters=2, **options)
    compare(made, torch.full(shape, 2_000.0).half(), context=route)


@pytest.mark.parametrize("scale", [1.0, 40.0])  # a larger one leaves the block few digits
def test_products_under_autocast_are_finite(scale):
    made = model(LINEAR[0], scale, dtype=torch.float32)

    def autocast(_):
        return torch.autocast("cpu", torch.float16)

    compare(made, torch.full((4, 256), 2_000.0).half(), context=autocast)


def scaled_step(method, scale):
    """Return what trains a step as trainers do without bfloat16, its blocks, and the scaler."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)).half()
    disha.inject_adapters(made, ".", r=4, method=method)
    blocks = disha.adapter_parameters(made)
    optimizer = torch.optim.AdamW(blocks, lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    x, target = torch.randn(16, 32), torch.randn(16, 8)

    def step():
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(made(x), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return step, blocks, scaler


@pytest.mark.parametrize("method", ["bone", "bat"])
def test_scaled_losses_train(method):
    step, blocks, _ = scaled_step(method, 1024.0)
    losses = [step() for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(block.isfinite().all() for block in blocks)


@pytest.mark.parametrize("method", ["bone", "bat"])
def test_a_step_whose_gradients_overflow_changes_no_block(method):
    step, blocks, scaler = scaled_step(method, 2.0**100)
    before = [block.detach().clone() for block in blocks]
    step()
    assert all(map(torch.equal, blocks, before))
    assert scaler.get_scale() == 2.0**99
