"""Importing disha changes nothing in torch; the first injection changes what one module lists."""

import inspect
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from disha import private_torch
from disha.effective import torch_patches

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
