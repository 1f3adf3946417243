"""What the help says of each flag: its text as one paragraph, and its default where it has one."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise
from typing import Annotated, Any, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

__all__ = ["registry"]

registry = ConstructorRegistry()
"""Describes dataclasses of flags to the parser."""


@registry.struct_rule
def _described(info: StructTypeInfo) -> StructConstructorSpec | None:
    if not (isinstance(info.type, type) and dataclasses.is_dataclass(info.type)):
        return None
    texts = {n: text for kind in reversed(info.type.__mro__) for n, text in _texts(kind).items()}
    types = get_type_hints(info.type, include_extras=True)
    fields = tuple(
        _field(field.name, types[field.name], _default(field, info.default), texts)
        for field in dataclasses.fields(info.type)
    )
    return StructConstructorSpec(instantiate=info.type, fields=fields)


def _field(name: str, kind: Any, default: Any, texts: dict[str, str]) -> StructFieldSpec:
    if default is None or default == () or isinstance(default, bool):
        # What is simply not given needs no word.
        kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
    return StructFieldSpec(name=name, type=kind, default=default, helptext=texts.get(name))


def _texts(kind: type) -> dict[str, str]:
    """The docstrings below a dataclass's fields, by the fields' names."""
    if not dataclasses.is_dataclass(kind):
        return {}
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    (definition,) = tree.body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(str(ast.literal_eval(text.value)).split())
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _default(field: dataclasses.Field[Any], given: object) -> Any:
    if dataclasses.is_dataclass(given):
        return getattr(given, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING_NONPROP
