"""Compiled models: nothing that changes at run time compiles again, and outputs are the eager ones.

Graphs are counted by a backend that runs them as they are.
"""

import re
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch import config as functorch_config
from torch._inductor import config, cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code

import disha
from tests.conftest import close, freshly_compiled, needs_grouped_products, perturb, seed_torch
from tests.layers.test_weight_property import Reader
from tests.reference import BONE_KINDS, METHODS


class Mixed(nn.Module):
    """A layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 6)
        self.reader = Reader()
        self.head = nn.Linear(4, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.conv(x.mT).mT
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.head(self.reader(self.up(x)))


CASES = {
    "bone": {"target_regex": ".", "r": 2},
    "tile": {"target_regex": "all-linear", "r": 2, "r_out": 1},
    "bat": {"target_regex": "all-linear", "r": 2, "method": "bat"},
}


@pytest.fixture
def tokens():
    return torch.randint(11, (3, 5))


def compiled(case, *, train=False):
    seed_torch(0)
    model = Mixed().double().train(train)
    for adapter in ("a", "b"):
        disha.inject_adapters(model, adapter=adapter, **CASES[case])
    perturb(model)
    counter = CompileCounter()
    return model, freshly_compiled(model, counter), counter


def steps(model, folder):
    """Change what acts, in every way that keeps shapes; after each, the model has to be run."""
    disha.set_adapter_scale(model, 0.3, "b")
    yield "scaled"
    disha.set_active_adapters(model, "a")
    yield "switched"
    with disha.adapters_disabled(model):
        yield "disabled"
    yield "enabled again"
    disha.save_adapter(model, folder / "b", "b")
    disha.load_adapter(model, folder / "b", "a", replace=True)
    yield "swapped"
    disha.set_adapter_scale(model, 0.0, "a")
    yield "scaled to nothing"


@pytest.mark.parametrize("case", BONE_KINDS)
def test_swapping_in_an_adapter_of_smaller_r_or_fewer_layers_compiles_nothing(
    case, tokens, tmp_path
):
    model, graph, counter = compiled(case)
    for number, target in enumerate((CASES[case]["target_regex"], "head", "up")):
        small = Mixed().double().eval()
        small.load_state_dict(model.state_dict(), strict=False)
        perturb(disha.inject_adapters(small, **{**CASES[case], "r": 1, "target_regex": target}))
        disha.save_adapter(small, tmp_path / str(number))
        disha.load_adapter(model, tmp_path / str(number), "b", replace=True)
        disha.set_active_adapters(model, "b")
        close(graph(tokens), small(tokens))
    assert counter.frame_count == 1


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_no_change_compiles_again(case, grad, tokens, tmp_path):
    model, graph, counter = compiled(case)
    outputs = []
    with torch.set_grad_enabled(grad):
        close(graph(tokens), model(tokens))
        assert counter.frame_count == 1
        for step in steps(model, tmp_path):
            output = graph(tokens)
            assert counter.frame_count == 1, step
            close(output, model(tokens))
            outputs.append(output.detach())
    assert not torch.allclose(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[3])
    close(outputs[2], outputs[5])
    assert not torch.allclose(outputs[2], outputs[1])


@pytest.mark.parametrize("case", CASES)
def test_a_block_that_is_not_finite_can_be_disabled(case, tokens):
    model, graph, _ = compiled(case)
    graph(tokens)
    with torch.no_grad():
        for block in disha.adapter_parameters(model, "b"):
            block.view(-1)[0] = float("nan")
    with disha.adapters_disabled(model):
        close(graph(tokens), model(tokens))
    assert graph(tokens).isnan().any()


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_eager_ones(case, tokens):
    model, graph, counter = compiled(case, train=True)
    blocks = list(disha.adapter_parameters(model, "b"))
    cotangent = torch.randn_like(model(tokens))
    expected = torch.autograd.grad((model(tokens) * cotangent).sum(), blocks)
    close(torch.autograd.grad((graph(tokens) * cotangent).sum(), blocks), expected)
    assert counter.frame_count == 1


# --- the code that inductor generates -----------------------------------------------------------


def generated(model, x):
    """Count the calls in the C++ code of a training step: fused loops, and products.

    The loops are written but not compiled, which takes seconds; so the step computes nothing.
    """
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=True)
    with (
        functorch_config.patch(enable_autograd_cache=False),
        config.patch(fx_graph_cache=False),
        mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=mock.Mock()),
        mock.patch.object(cpu_vec_isa, "pick_vec_isa", return_value=cpu_vec_isa.invalid_vec_isa),
    ):
        _, codes = run_and_get_code(lambda: graph(x).sum().backward())
    calls = {"loops": r"^ +cpp_fused_\w+\(", "products": r"^ +extern_kernels\.\w+\("}
    text = "\n".join(codes)
    return Counter({name: len(re.findall(call, text, re.M)) for name, call in calls.items()})


def test_bone_adds_the_fewest_kernels_to_a_linear_layer():
    x = torch.randn(6, 256, requires_grad=True)
    layer = nn.Sequential(nn.Linear(256, 24)).requires_grad_(False)
    frozen = generated(layer, x)
    disha.inject_adapters(layer, "0", r=16)
    # Forward: the sum of the shards times s, and the product with D that adds into W x.
    # Backward: dS and dD, and the gradient of the input from dS, which dY W adds to.
    assert generated(layer, x) - frozen == {"loops": 2, "products": 3}


def test_bat_multiplies_in_the_dtype_of_the_weight():
    """In float32, the products of a 16-bit weight with its block take several times as long."""
    layer = nn.Sequential(nn.Linear(8, 8, bias=False, dtype=torch.bfloat16))
    perturb(disha.inject_adapters(layer, "0", r=2, method="bat", dtype=torch.float32))
    dtypes = []

    def note(graph, inputs):
        products = ("mm", "bmm", "addmm", "baddbmm")
        for node in graph.graph.nodes:
            if node.op == "call_function" and node.name.split("_")[0] in products:
                dtypes.append(node.meta["val"].dtype)
        return graph

    x = torch.randn(6, 8, dtype=torch.bfloat16)
    torch._dynamo.reset()
    output = torch.compile(layer, backend=aot_autograd(fw_compiler=note))(x)
    output.sum().backward()
    assert dtypes.count(torch.bfloat16) == len(dtypes) >= 4
    disha.merge_adapters(layer)
    exact = F.linear(x.double(), layer[0].weight.double())
    torch.testing.assert_close(output.double(), exact, rtol=2e-2, atol=2e-2)


class Private(nn.Module):
    """Weights that only private functions of torch read."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 16, 16))
        self.normed = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("ends", torch.tensor([3, 8], dtype=torch.int32))

    def forward(self, x):
        length = torch.ones(16, 1, dtype=x.dtype)
        x = F.grouped_mm(x, self.up, offs=self.ends) @ torch._weight_norm(self.normed, length, 0)
        return torch._grouped_mm(x, self.up, offs=self.ends)


@needs_grouped_products
@pytest.mark.parametrize("method", METHODS)
def test_private_functions_of_torch_see_the_update(method):
    """The compiler passes only public functions on by itself; the rest would see W alone."""
    layouts = {"up": "expert in out", "normed": "out in"}
    model = Private().bfloat16()
    perturb(disha.inject_adapters(model, "up|normed", r=4, method=method, layouts=layouts))
    blocks, x = list(disha.adapter_parameters(model)), torch.randn(8, 16, dtype=torch.bfloat16)
    found, expected = freshly_compiled(model)(x), model(x)
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=0.3)
    for one, other in zip(
        *(torch.autograd.grad(y.float().square().sum(), blocks) for y in (found, expected)),
        strict=True,
    ):
        assert (one - other).norm() < 0.05 * other.norm()
