"""Importing disha changes nothing in torch; the first injection changes what one module lists."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

from disha import torch_patches

WALK = """
import json, sys, threading, types
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
NAMES = [
    "torch._functorch.eager_transforms._wrap_for_grad",
    "torch._functorch.vmap._add_batch_dim",
    "torch.autograd.function._SingleLevelFunction.apply",
    "torch.autograd.function.custom_function_call",
]


def changes(code):
    """Return the attributes of torch that code changes, and whether it lists more functions."""
    code = f"{WALK}\n{code}\nprint(json.dumps(changed(before, walk())))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return [n for n in found if "listed." not in n], [n for n in found if "listed." in n]


def test_importing_and_planning_change_nothing():
    code = "import disha, disha.torch_patches; disha.plan_adapters(torch.nn.Linear(4, 4), '', 2)"
    assert changes(code) == ([], [])


@pytest.mark.parametrize(
    "adapts",
    [
        "disha.inject_adapters(torch.nn.Linear(4, 4), '', 2)",
        "disha.BoneLinear(4, 4, r=2)",
        "[threading.Thread(target=disha.BatLinear, args=(4, 4), kwargs={'r': 2}).start()"
        " for _ in range(8)]",
    ],
)
def test_the_first_injection_changes_what_is_listed(adapts):
    changed, listed = changes(f"import disha; {adapts}; disha.BoneLinear(4, 4, r=2)")
    assert changed == NAMES
    assert "listed._grouped_mm" in listed
    assert all(name.split(".")[-1] in torch_patches.__doc__ for name in changed)


def test_a_second_time_nothing_changes():
    threads = [threading.Thread(target=torch_patches.install) for _ in range(8)]
    torch_patches.install()
    before = torch_patches.autograd.custom_function_call
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch_patches.autograd.custom_function_call is before
