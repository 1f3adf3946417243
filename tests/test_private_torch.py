"""What is private in torch stands in one module, and a new torch reclassifies no operation."""

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import disha
from disha import private_torch
from disha.effective import torch_patches
from disha.effective.rules import RULES
from disha.errors import DishaError

PACKAGE = Path(disha.__file__).parent
OPERATIONS = Path(__file__).parent / "operations.txt"
"""Operation -> the module with its rule. `python -m tests.test_private_torch` adds new ones."""

NOT_OF_TORCH = """
    _replace _asdict _fields _getframe _DummyThread _actions _option_string_actions
    _name_or_path _get_train_sampler _keys_to_ignore_on_save _hf_hook
    _z3_optimizer _hp_mapping _like _block _on_ _weight _layers _all _groups
    _use_triton _CHUNKED_LOGPROB_CHUNK_SIZE _no_split_modules _reference
    _made_by_disha _zero3_consolidated_16bit_state_dict _invalidate_trace _token
"""
"""Names of Python and of other libraries, ends of names, and an attribute of ours."""
OF_MODULES = {name for name in dir(nn.Module()) if name[0] == "_"}
OWNERS = {
    "Tensor": Tensor,
    "torch": torch,
    "F": F,
    "nn.init": nn.init,
    "torch._C._nn": torch._C._nn,
    "autograd": torch.autograd,
}


def private_names(tree):
    """Yield each name in a module, also in strings, and whether it is defined there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, isinstance(node.ctx, ast.Store)
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("torch"):
            yield from ((part, False) for part in node.module.split("."))
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((part, False) for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"[\w.: ]+", node.value):
                yield from ((part, False) for part in re.split(r"[.: ]", node.value))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, True
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, True


def private_names_of_the_package():
    """Return underscored name -> the files that have it, and those that the package defines."""
    files, defined = defaultdict(set), set()
    for path in PACKAGE.rglob("*.py"):
        for name, is_defined in private_names(ast.parse(path.read_text())):
            if re.fullmatch(r"_(?!disha)[A-Za-z]\w*", name):
                files[name].add(path.name)
                if is_defined:
                    defined.add(name)
    return files, defined


def test_one_module_has_all_private_names_of_torch():
    files, defined = private_names_of_the_package()
    of_torch = files.keys() - set(NOT_OF_TORCH.split()) - OF_MODULES - defined
    assert of_torch >= {"_grouped_mm", "_is_view", "_orig_mod"}
    elsewhere = {name: files[name] for name in of_torch if files[name] != {"private_torch.py"}}
    assert elsewhere == {}
    assert [name for name in of_torch if name not in private_torch.__doc__] == []


def names_in_the_tables_of_rules():
    """Yield the names of operations in the decorators that add a rule for them."""
    for path in (PACKAGE / "effective").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if called in ("rule", "rule_with_operation"):
                for argument in node.args:
                    if isinstance(argument, ast.Constant):
                        yield from argument.value.split()


def test_every_name_in_the_tables_of_rules_exists():
    names = list(names_in_the_tables_of_rules())
    assert len(names) > 50
    assert [name for name in names if not hasattr(Tensor, name) and not hasattr(torch, name)] == []


def test_the_private_operations_that_have_rules_exist():
    assert hasattr(torch, private_torch.GROUPED)
    assert hasattr(Tensor, private_torch.IS_VIEW)


def classified():
    """Return operation -> the module with its rule, for every operation of this torch."""
    found, named = {}, set()
    for prefix, owner in OWNERS.items():
        for name in dir(owner):
            value = getattr(owner, name)
            for end in ("", ".__get__", ".__set__"):
                func = getattr(value, end.lstrip("."), None) if end else value
                if has_rule(func):
                    named.add(func)
                    made = getattr(RULES[func], "func", RULES[func])  # of a partial function
                    found[f"{prefix}.{name}{end}"] = made.__module__.split(".")[-1]
    assert {func for func in RULES if not isinstance(func, str)} == named | {torch.__hash__}
    return found


def has_rule(func):
    try:
        return func in RULES
    except TypeError:  # it can't be hashed, such as a dict, so it has none
        return False


def kept():
    return dict(line.split() for line in OPERATIONS.read_text().splitlines())


def test_every_operation_is_classified_as_before():
    # A process of its own, because other libraries replace functions of torch in this one.
    code = "import json, tests.test_private_torch as t; print(json.dumps(t.classified()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    now, before = json.loads(run.stdout.splitlines()[-1]), kept()
    changed = {name: kind for name, kind in now.items() if before.get(name) != kind}
    assert changed == {}, "if that is meant, run `python -m tests.test_private_torch`"
    assert [name for name in before if name not in now and exists(name)] == []


def exists(operation):
    """Whether this torch has an operation, such as `Tensor.grad.__get__`."""
    owner, _, rest = operation.removesuffix(".__get__").removesuffix(".__set__").rpartition(".")
    return hasattr(OWNERS[owner], rest)


def test_a_missing_name_raises_at_use_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(torch_patches, "_CHANGES", {"torch._functorch.vmap:_gone": None})
    before = private_torch.class_with_apply().apply
    with pytest.raises(DishaError, match=r"has no torch._functorch.vmap:_gone, which disha needs"):
        torch_patches._install.__wrapped__()
    assert private_torch.class_with_apply().apply == before


if __name__ == "__main__":
    lines = [f"{name} {kind}\n" for name, kind in sorted((kept() | classified()).items())]
    OPERATIONS.write_text("".join(lines))
