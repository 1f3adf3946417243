"""The package as a whole: what it imports, which way its arrows run, what it promises to have."""

import ast
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import disha

PACKAGE = Path(disha.__file__).parent

LAYERS = [
    {"text", "version"},
    {"errors"},
    {"private_torch", "checks", "hints"},
    {"functional", "sharding"},
    {"config", "effective"},
    {"layers"},
    {"model"},
    {"files"},
    {"interop"},
    {"integrations"},
    {"finetune"},
    {"cli"},
    {"__main__"},
]
"""A subpackage may import from those above it in this list, and from itself."""


def imports_of(path):
    """Return the names of modules of the package that a file imports, and of others."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "disha"
                else {node.module}
            )
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            continue
        for name in names:
            (own if name.split(".")[0] == "disha" else others).add(name)
    return own, others


def subpackage_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"
            or path.parent != PACKAGE]  # fmt: skip


def test_every_file_has_a_subpackage():
    known = set().union(*LAYERS)
    assert {subpackage_of(path) for path in sources()} <= known


def test_arrows_run_one_way():
    level = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    wrong = []
    for path in sources():
        subpackage = subpackage_of(path)
        for name in imports_of(path)[0]:
            if name == "disha" or name.removeprefix("disha.") in disha.__all__:
                continue  # through the package root: another test says who may
            other = name.split(".")[1]
            if other != subpackage and not level[other] < level[subpackage]:
                wrong.append(f"{subpackage} imports {name}")
    assert not wrong


def test_nothing_inside_imports_the_package_root():
    for path in sources():
        if subpackage_of(path) not in ("integrations", "finetune", "cli"):
            roots = {n for n in imports_of(path)[0] if n.removeprefix("disha.") in disha.__all__}
            assert not roots | ({"disha"} & imports_of(path)[0]), path


@pytest.mark.parametrize("room", ["finetune", "cli"])
def test_the_commands_use_the_library_as_a_user_would(room):
    """Save for errors, texts and tables of messages, the version, and whole writes of files.

    What is private in torch stands in one module, also where a dry run needs it.

    `disha convert` changes files without a model, which is no public interface.
    """
    plain = ("disha", "errors", "files", "interop.checkpoints", "private_torch", "text", "version")
    outer = ("disha.cli", "disha.finetune", "disha.integrations")
    for path in {*(PACKAGE / room).rglob("*.py")} - {PACKAGE / "cli" / "convert.py"}:
        for name in imports_of(path)[0]:
            public = name.removeprefix("disha.") in (*plain, *disha.__all__)
            assert public or name.startswith(outer), (path, name)


def run_python(code, *options):
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_is_light_and_silent():
    """It brings in torch when a name needs it, nothing beyond the dependencies, and no warning."""
    code = """
import sys, json
import disha
from disha import DishaError
public = {*disha.__all__, "functional", "integrations", "interop"}
found = ["torch" in sys.modules, public == {*dir(disha)}, hasattr(disha, "inject_adapterz")]
import torch
before = set(sys.modules)
disha.inject_adapters
new = sorted({name.split(".")[0] for name in set(sys.modules) - before})
print(json.dumps([*found, new]))
"""
    *found, new = run_python(code, "-W", "error")
    assert found == [False, True, False]
    new = {name for name in new if not name.startswith("_")} - {*sys.stdlib_module_names}
    assert new <= {"disha", "safetensors", "einops", "packaging"}


@pytest.mark.parametrize(
    ("name", "missing"), [("inject_adapters", "safetensors"), ("interop", "einops")]
)
def test_a_missing_dependency_is_named(name, missing):
    code = f"""
import sys, json
sys.modules["{missing}"] = None  # as if it were not installed
import disha
try:
    disha.{name}
except ImportError as error:
    print(json.dumps(str(error)))
"""
    assert missing in run_python(code)


def test_version_is_the_distributions():
    assert disha.__version__ == importlib.metadata.version("disha-torch")
    assert re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", disha.__version__)


def test_requirements_are_ranges():
    requirements = importlib.metadata.requires("disha-torch")
    core = [r for r in requirements if "extra ==" not in r]
    assert {re.split(r"[\[<>=!~ ]", r)[0] for r in core} == {"torch", "safetensors", "einops"}
    for requirement in requirements:
        assert "==" not in requirement.split(";")[0], requirement


@pytest.mark.parametrize("name", sorted(set(disha.__all__) - {"__version__"}))
def test_public_names_are_documented_with_each_argument(name):
    item = getattr(disha, name)
    assert item.__doc__
    if inspect.isfunction(item):
        arguments = set(inspect.signature(item).parameters)
        missing = [one for one in arguments if f"\n    {one}: " not in inspect.getdoc(item)]
        assert not missing
