"""Importing disha changes nothing in torch; the first injection changes what one module lists."""

import inspect
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import disha
from disha import ModeError, private_torch
from disha.effective import torch_patches
from tests.conftest import Made, freshly_compiled, merged_weight, perturb
from tests.reference import METHODS

WALK = """
import json, os, sys, threading, types
import torch, torch._functorch.vmap, torch._functorch.eager_transforms, torch._dynamo
from torch.nested._internal.nested_tensor import NestedTensor

def walk():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "torch" and isinstance(module, types.ModuleType):
            for key, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__module__", "") is not None:
                    found[f"{name}.{key}"] = value
                if isinstance(value, type) and value.__module__ == name:
                    for attribute, inner in list(vars(value).items()):
                        if callable(inner) or isinstance(inner, (classmethod, staticmethod)):
                            found[f"{name}.{key}.{attribute}"] = inner
    for function in torch.overrides.get_overridable_functions()[torch]:
        found[f"listed.{function.__name__}"] = True
    return found

def changed(before, after):
    modules = {key.rpartition(".")[0] for key in before}
    return sorted(
        key for key, value in after.items()
        if key.rpartition(".")[0] in modules and before.get(key) is not value
        and not isinstance(value, types.ModuleType)
    )

before = walk()
"""
IN_PYTHON = "def apply(" in inspect.getsource(torch.autograd.Function)  # before torch 2.15
NAMES = [
    "torch._functorch.eager_transforms._wrap_for_grad",
    "torch._functorch.vmap._add_batch_dim",
    f"torch.autograd.function.{'_SingleLevelFunction' if IN_PYTHON else 'Function'}.apply",
    "torch.autograd.function.custom_function_call",
    "torch.nested._internal.nested_tensor.NestedTensor.__torch_function__",
    "torch.nn.init._no_grad_trunc_normal_",
    "torch.nn.init.orthogonal_",
    "torch.nn.modules.module.Module.load_state_dict",
    "torch.utils.checkpoint._CheckpointFrame",
]


PLANNING = (
    "import disha, disha.effective.torch_patches; disha.plan_adapters(torch.nn.Linear(4, 4), '', 2)"
)
ADAPTING = [
    "import disha; disha.inject_adapters(torch.nn.Linear(4, 4), '', 2)",
    "import disha; disha.BoneLinear(4, 4, r=2)",
    "import disha; [threading.Thread(target=disha.BatLinear, args=(4, 4), kwargs={'r': 2}).start()"
    " for _ in range(8)]; disha.BoneLinear(4, 4, r=2)",
]
EACH = """
for code in json.loads(sys.argv[1]):
    if not os.fork():
        exec(code)
        print(json.dumps(changed(before, walk())), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def changes():
    """Code -> the attributes of torch that it changes in a process of its own."""
    codes = [PLANNING, *ADAPTING]
    command = [sys.executable, "-c", WALK + EACH, json.dumps(codes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip(codes, map(json.loads, done.stdout.splitlines()), strict=True))


def test_importing_and_planning_change_nothing(changes):
    assert changes[PLANNING] == []


@pytest.mark.parametrize("code", ADAPTING)
def test_the_first_injection_changes_what_is_listed(code, changes):
    changed = [name for name in changes[code] if "listed." not in name]
    assert changed == NAMES
    assert "listed._grouped_mm" in changes[code]
    listed = private_torch.__doc__ + torch_patches.__doc__
    assert all(name.split(".")[-1] in listed for name in changed)


def test_a_second_time_nothing_changes():
    torch_patches.install()
    before = torch.autograd.function.custom_function_call
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(torch_patches.install)
    assert torch.autograd.function.custom_function_call is before


class Multiply(torch.autograd.Function):
    """A product with gradients of its own, as fused kernels have."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


def checkpointed(x, weight):
    return checkpoint(F.linear, x, weight, use_reentrant=True)


def applied(x, weight):
    return Multiply.apply(x, weight)


USES = [applied, checkpointed]
if "def apply(" in inspect.getsource(torch.autograd.Function):  # torch 2.15 has a C++ one
    USES.append(Multiply.apply)  # kept from before the first injection


class TestWhatAsksNoTensor:
    """Torch asks an effective weight about most functions, but not about these."""

    def case(self, method="bone"):
        layer = disha.inject_adapters(nn.Linear(6, 4, bias=False).double(), "", 2, method=method)
        perturb(layer)
        return layer, layer.disha["default"].block, torch.randn(3, 6).double().requires_grad_()

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("use", USES)
    def test_a_custom_function_trains_the_block(self, use, method):
        layer, block, x = self.case(method)
        output, expected = use(x, layer.weight), F.linear(x, layer.weight)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        (wanted,) = torch.autograd.grad(expected.square().sum(), block)
        torch.testing.assert_close(block.grad, wanted)

    @pytest.mark.skipif(torch.__version__ < "2.9", reason="the compiler of torch 2.8 sees W alone")
    def test_a_custom_function_in_compiled_code(self):
        layer, block, x = self.case()
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: Multiply.apply(x, layer.weight), backend="eager")
        expected = F.linear(x, layer.weight)
        torch.testing.assert_close(compiled(x), expected)
        (found,) = torch.autograd.grad(compiled(x).square().sum(), block)
        torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), block)[0])

    def test_a_custom_function_and_dropout(self):
        layer = disha.BoneLinear(6, 4, r=2, dropout=0.5)
        with pytest.raises(ModeError, match="the adapter's dropout can't act here"):
            Multiply.apply(torch.randn(3, 6), layer.weight)

    @pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
    def test_vmap_over_a_stack(self, compiles):
        weight = nn.Parameter(torch.randn(3, 6, 4))
        experts = Made(lambda self, x: torch.vmap(torch.matmul)(x, self.weight), weight=weight)
        model, x = nn.Sequential(experts).double(), torch.randn(3, 5, 6).double()
        perturb(disha.inject_adapters(model, "0", 2, layouts={"0": "expert in out"}))
        forward = freshly_compiled(model) if compiles else model
        torch.testing.assert_close(forward(x), x @ merged_weight(model[0]))
        assert disha.check_adapters(model, x).ok

    @pytest.mark.parametrize(
        "transform",
        [
            torch.func.grad,
            lambda f: torch.func.grad(lambda w, x: torch.func.grad(f)(w, x).square().sum()),
            lambda f: torch.vmap(torch.func.grad(f), in_dims=(None, 0)),
            lambda f: lambda w, x: torch.func.jvp(lambda w: f(w, x), (w,), (torch.ones(4, 6),)),
            lambda f: lambda w, x: torch.func.vjp(lambda w: f(w, x), w)[1](torch.ones(())),
        ],
    )
    def test_transforms_that_take_the_weight(self, transform):
        layer = disha.BoneLinear(6, 4, r=2, init="kaiming")
        dense, x = merged_weight(layer).detach(), torch.randn(3, 6)
        run = transform(lambda w, x: F.linear(x, w).square().sum())
        torch.testing.assert_close(run(layer.weight, x), run(dense, x))

    def test_the_gradient_of_a_weight_is_that_of_the_base(self):
        layer = disha.inject_adapters(nn.Linear(6, 4), "", 2, init="kaiming", freeze=False)
        x = torch.randn(3, 6)
        (found,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        torch.testing.assert_close(found, x.sum(0).expand(4, 6))
        frozen = disha.BoneLinear(6, 4, r=2)
        with pytest.raises(RuntimeError, match="does not require grad"):
            torch.autograd.grad(frozen(x).sum(), frozen.weight)
