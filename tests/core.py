"""Which tests are the core's: those that need torch, safetensors, einops and what runs tests.

`python -m tests.matrix` runs them on the oldest and the newest releases of the dependencies. A
test file is left out if it, or a file of tests that it imports, imports anything else as it is
loaded; and so are the folders and files of `LEFT_OUT`, which need more than their imports tell.
"""

import ast
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent

ALLOWED = {
    *sys.stdlib_module_names,
    *("disha", "tests", "torch", "safetensors", "einops"),
    *("pytest", "_pytest", "hypothesis", "numpy"),
}
"""NumPy for tests only, which have a reader of adapter files that is written with it."""

LEFT_OUT = (
    *("disha/cli", "disha/finetune", "disha/integrations"),
    "disha/__main__.py",
    *("benchmarks", "docs", "tests/cli", "tests/finetune", "tests/llamacpp", "tests/packaging"),
    *("tests/runtimes", "tests/serving"),
    *("tests/docs", "tests/test_types.py"),
)

EXTRAS_INSIDE = ("disha.cli", "disha.finetune")


def is_core(path: Path) -> bool:
    """Whether a file or folder, given from the root, is to be collected with `--core`."""
    if any(path.is_relative_to(other) for other in LEFT_OUT):
        return False
    if path.suffix != ".py" or path.parts[0] != "tests":
        return True
    return not foreign_imports(path)


@cache
def foreign_imports(path: Path) -> frozenset[str]:
    """Return the modules beyond the core that are imported when a file of tests is loaded."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = set()
    for name in _imported(tree):
        top = name.partition(".")[0]
        other = Path(*name.split(".")).with_suffix(".py")
        if name.startswith(EXTRAS_INSIDE) or top not in ALLOWED:
            found.add(name)
        elif top == "tests" and (ROOT / other).exists() and other != path:
            found |= foreign_imports(other)
    return frozenset(found)


def _imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
