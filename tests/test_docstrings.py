"""Every public name says what it does, takes, returns and raises, and shows it in an example.

The examples themselves run as doctests of the package (`--doctest-modules`).
"""

from __future__ import annotations

import ast
import builtins
import doctest
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import griffe
import pytest
from mkdocs.config import load_config
from mkdocstrings_handlers.python import PythonInputOptions

import disha
from disha import errors, functional

ROOMS: tuple[ModuleType, ...] = (
    disha,
    functional,
    disha.interop.peft,
    disha.interop.lora,
    disha.interop.checkpoints,
)
"""Modules whose `__all__` is public."""

PAPER = "arXiv 2409.15371"


@dataclass(frozen=True)
class Documented:
    """A public function, class, method or property, and its parsed docstring."""

    name: str
    target: Any
    owner: type | None = None

    @property
    def function(self) -> Any:
        """What is called, or None for a class."""
        if isinstance(self.target, property):
            return self.target.fget
        target = getattr(self.target, "__func__", self.target)
        return None if isinstance(target, type) else inspect.unwrap(target)

    @property
    def text(self) -> str:
        """The docstring."""
        return inspect.cleandoc(self.target.__doc__ or "")

    def sections(self, kind: str) -> list[Any]:
        """The contents of all sections of a kind, as mkdocstrings will show them."""
        parsed = griffe.Docstring(self.text).parse("google", warnings=False)
        return [section.value for section in parsed if section.kind.value == kind]

    def described(self, kind: str) -> dict[str, str]:
        """Name -> description, in the sections of a kind."""
        return {item.name: item.description for part in self.sections(kind) for item in part}

    @property
    def raises(self) -> dict[str, str]:
        """Name of an exception -> when it is raised."""
        parts = self.sections("raises")
        return {str(item.annotation): item.description for part in parts for item in part}

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters, without self and cls."""
        callee = self.target if self.function is None else self.function
        if isinstance(callee, type) and not _has_own_init(callee):
            return []
        names = list(inspect.signature(callee).parameters)
        bound = self.owner is not None and not isinstance(self.target, staticmethod)
        return names[1:] if bound else names


def _has_own_init(cls: type) -> bool:
    return "__init__" in vars(cls) and not issubclass(cls, BaseException)


def public() -> Iterator[Documented]:
    """Yield every public function, class, method and property, each once."""
    seen: set[int] = set()
    for room in ROOMS:
        for name in room.__all__:
            target = getattr(room, name)
            if not isinstance(target, (FunctionType, type)) or id(target) in seen:
                continue
            seen.add(id(target))
            yield Documented(f"{room.__name__}.{name}", target)
            if isinstance(target, type):
                yield from _members(f"{room.__name__}.{name}", target)


def _members(name: str, cls: type) -> Iterator[Documented]:
    for member, value in vars(cls).items():
        is_member = isinstance(value, (FunctionType, classmethod, staticmethod, property))
        if is_member and not member.startswith("_"):
            yield Documented(f"{name}.{member}", value, owner=cls)


PUBLIC = {item.name: item for item in public()}
TOP = [name for name, item in PUBLIC.items() if item.owner is None]
FUNCTIONS = [name for name, item in PUBLIC.items() if item.function is not None]


def test_the_walk_finds_what_is_public():
    assert {name.removeprefix("disha.") for name in TOP} >= set(disha.__all__) - {"__version__"}
    for name in ("functional.shard_sum", "interop.lora.export", "LoadReport.complete"):
        assert f"disha.{name}" in PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_summary_in_one_line(name):
    summary, *rest = PUBLIC[name].text.split("\n")
    assert summary.endswith((".", ":")), f"{name}: the first line is no sentence: {summary!r}"
    assert not rest or not rest[0], f"{name}: no empty line after the summary"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_described(name):
    described = PUBLIC[name].described("parameters")
    wanted = PUBLIC[name].parameters
    missing = [parameter for parameter in wanted if not described.get(parameter)]
    assert not missing, f"{name}: under Args, describe {', '.join(missing)}"
    assert list(described) == wanted, f"{name}: Args are {list(described)}, parameters are {wanted}"


@pytest.mark.parametrize("name", [name for name in TOP if PUBLIC[name].function is None])
def test_every_field_and_parameter_of_a_class_is_described(name):
    item = PUBLIC[name]
    described = item.described("parameters") | item.described("attributes")
    missing = [parameter for parameter in item.parameters if not described.get(parameter)]
    assert not missing, f"{name}: under Args or Attributes, describe {', '.join(missing)}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_returned_is_described(name):
    item = PUBLIC[name]
    returned = inspect.signature(item.function).return_annotation
    if returned in (None, "None") or isinstance(item.target, property):
        return
    says = item.sections("returns") or item.text.startswith(("Return ", "Iterate ", "Run "))
    assert says, f"{name} returns {returned}: say what in the summary ('Return ...') or in Returns"


@pytest.mark.parametrize("name", PUBLIC)
def test_what_it_raises_are_exceptions(name):
    for raised, when in PUBLIC[name].raises.items():
        exception = _exception(raised)
        assert exception is not None, f"{name}: {raised!r} under Raises is no exception"
        assert when, f"{name}: say when {raised} is raised"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_its_own_lines_raise_is_listed(name):
    """What other functions raise for it can't be seen here; what it raises itself can."""
    listed = tuple(map(_exception, PUBLIC[name].raises))
    for raised in _raised_by(PUBLIC[name].function) - {NotImplementedError}:
        known = any(kind is not None and issubclass(raised, kind) for kind in listed)
        assert known, f"{name} raises {raised.__name__}: list it under Raises"


@pytest.mark.parametrize("name", TOP)
def test_an_example_that_shows_a_result(name):
    parts = PUBLIC[name].sections("examples")
    assert parts, f"{name}: no section 'Examples:' (with an s: 'Example:' is not parsed)"
    examples = doctest.DocTestParser().get_examples(PUBLIC[name].text)
    assert examples, f"{name}: no line of its Examples starts with >>>"
    assert any(example.want or example.exc_msg for example in examples), (
        f"{name}: its Examples show no result, so that nothing can fail"
    )


def test_the_mathematics_names_its_source():
    sharded = [name for name in FUNCTIONS if {"block", "blocks"} & set(PUBLIC[name].parameters)]
    lacking = [
        name
        for name in sharded
        if name.startswith("disha.functional.") and "Source: " not in _with_its_class(PUBLIC[name])
    ]
    assert not lacking, f"no 'Source:' in {', '.join(lacking)}; the method's is {PAPER}"


def _with_its_class(item: Documented) -> str:
    """Return a docstring and that of the class, which says where all of its methods are from."""
    return item.text + ("" if item.owner is None else item.owner.__doc__ or "")


def test_the_whole_package_is_parsed_without_a_warning(caplog):
    """A strict build of the documentation fails on the first one."""
    package = griffe.load("disha", docstring_parser="google")
    with caplog.at_level("WARNING", logger="griffe"):
        for item in _with_docstrings(package):
            item.docstring.parse("google")
    assert not caplog.messages, "\n".join(caplog.messages)


def _with_docstrings(item: Any) -> Iterator[Any]:
    if item.docstring is not None:
        yield item
    if item.is_module or item.is_class:
        for member in item.members.values():
            if not member.is_alias:
                yield from _with_docstrings(member)


def _exception(name: str) -> type[BaseException] | None:
    found = getattr(errors, name, getattr(builtins, name, None))
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def _raised_by(function: Any) -> set[type[BaseException]]:
    """The exceptions that a function's own `raise` statements name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = node.exc.func.id if isinstance(node.exc.func, ast.Name) else ""
            raised.add(_exception(name))
    return {kind for kind in raised if kind is not None}


def test_the_site_shows_them_with_options_that_exist():
    # With pydantic installed, as it is here, an unknown one is dropped; without, no page is built.
    config = load_config(str(Path(__file__).parent.parent / "mkdocs.yml"))
    options = config.plugins["mkdocstrings"].config.handlers["python"]["options"]
    assert set(options) <= {field.name for field in fields(PythonInputOptions)}
