"""Which children a module's forward reads the weight of, found in its source.

A forward may hand `self.qkv.weight` to a function instead of calling `self.qkv` (Swin in
torchvision, BEiT in timm, some state-space models). An adapter that acts when its layer is called
would do nothing there, without a word. What is found: every `self.<path>.weight` in `forward` and
in the methods it reaches through `self` or `super()`, except where only the weight's dtype, device
or shape is asked for. What can't be found: a layer that is put into another variable first, as a
loop does.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["ANY_CHILD", "Reads", "reads_own", "weight_reads"]

ANY_CHILD = "[]"
"""What a path has in place of a name that is computed, as in `self.layers[i].weight`."""

Reads = frozenset[tuple[str, str]]
"""Pairs of a child's path and the name of the attribute of it that is read."""

_FACTS_ONLY = frozenset(
    {"device", "dim", "dtype", "element_size", "is_cuda", "is_meta", "ndim", "numel"}
    | {"requires_grad", "requires_grad_", "shape", "size", "grad", "is_floating_point", "layout"}
    | {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"}
)
_ASKS_ONLY = frozenset({"getattr", "hasattr", "id", "isinstance", "len", "type"})
_LIKE_ANOTHER = frozenset({"expand_as", "reshape_as", "to", "type_as", "view_as"})
"""Methods of a tensor that take of another one its dtype, device or shape only."""

_CACHE: WeakKeyDictionary[type[nn.Module], Reads] = WeakKeyDictionary()
_OWN: WeakKeyDictionary[type[nn.Module], frozenset[str]] = WeakKeyDictionary()


def weight_reads(cls: type[nn.Module]) -> Reads:
    """Return the (path of a child, attribute) that a class's forward reads the values of.

    Args:
        cls: a class of modules; nothing is found where its source can't be had.

    Examples:
        >>> from torch import nn
        >>> from disha.layers.readers import weight_reads
        >>> weight_reads(nn.Linear)  # reads its own weight, and has no children
        frozenset()
    """
    if cls not in _CACHE:
        _CACHE[cls] = frozenset(
            (".".join(path[:-1]), path[-1])
            for path, parent in _reached_paths(_methods(cls))
            if len(path) > 1 and not _asks_for_facts(parent)
        )
    return _CACHE[cls]


def reads_own(cls: type[nn.Module], name: str) -> bool:
    """Return whether a class's forward reads the values of the tensor `self.<name>`.

    Args:
        cls: a class of modules; nothing is found where its source can't be had.
        name: the attribute.
    """
    if cls not in _OWN:
        _OWN[cls] = frozenset(
            path[0]
            for path, parent in _reached_paths(_methods(cls))
            if not (_asks_for_facts(parent) if len(path) == 1 else _is_fact(path[1]))
        )
    return name in _OWN[cls]


_Method = ast.FunctionDef | ast.AsyncFunctionDef


def _methods(cls: type[nn.Module]) -> list[dict[str, _Method]]:
    """Return the methods of each class that instances have them from, without those of torch.nn."""
    methods: list[dict[str, _Method]] = []
    for owner in cls.__mro__:
        if owner.__module__.partition(".")[0] in ("builtins", "disha") or _is_torchs(owner):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError, SyntaxError):  # typed in, compiled, or made on the fly
            continue
        body = tree.body[0]
        if isinstance(body, ast.ClassDef):
            methods.append({one.name: one for one in body.body if isinstance(one, _Method)})
    return methods


def _is_torchs(cls: type) -> bool:
    return cls.__module__.startswith("torch.nn.")


def _reached_paths(
    methods: list[dict[str, _Method]],
) -> Iterator[tuple[tuple[str, ...], ast.AST]]:
    """Return the paths in forward, and in the methods that it reaches through `self` or `super`."""
    reached, waiting = set[tuple[str, int]](), [("forward", 0)]  # name, the class to look from
    while waiting:
        name, start = waiting.pop()
        own = next((i for i in range(start, len(methods)) if name in methods[i]), None)
        if own is None or (name, own) in reached:
            continue
        reached.add((name, own))
        method = methods[own][name]
        waiting.extend((above, own + 1) for above in _names_from_super(method))
        for path, parent in _paths_from_self(method):
            waiting.append((path[0], 0))
            yield path, parent


def _names_from_super(method: _Method) -> Iterator[str]:
    """Return every `name` of a `super().name` in a method."""
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call):
            function = node.value.func
            if isinstance(function, ast.Name) and function.id == "super":
                yield node.attr


def _paths_from_self(method: _Method) -> Iterator[tuple[tuple[str, ...], ast.AST]]:
    """Return every longest `self.a.b[i].c` that is read in a method, with what it is a part of.

    An attribute that says something of a tensor, as in `self.a.weight.dtype`, ends the path: it is
    what the path is a part of.
    """
    arguments = [*method.args.posonlyargs, *method.args.args]
    if not arguments:
        return
    me = arguments[0].arg
    parents = {
        child: parent for parent in ast.walk(method) for child in ast.iter_child_nodes(parent)
    }
    for node in ast.walk(method):
        if not (isinstance(node, ast.Name) and node.id == me):
            continue
        path: list[str] = []
        here: ast.AST = node
        while True:
            parent = parents[here]
            if isinstance(parent, ast.Subscript) and parent.value is here and path:
                step = ANY_CHILD
            elif isinstance(parent, ast.Attribute) and isinstance(parent.ctx, ast.Load):
                step = parent.attr
            else:
                break
            if len(path) > 1 and _is_fact(step):
                break
            path.append(step)
            here = parent
        if path:
            yield from _readings(tuple(path), parents[here])


def _readings(path: tuple[str, ...], parent: ast.AST) -> Iterator[tuple[tuple[str, ...], ast.AST]]:
    """Return a path and, where it goes on into a tensor (`weight.T`), its shorter beginnings."""
    yield path, parent
    for end in range(2, len(path)):
        yield path[:end], ast.Pass()


def _is_fact(attribute: str) -> bool:
    return attribute in _FACTS_ONLY


def _asks_for_facts(parent: ast.AST) -> bool:
    """Whether what is around a path reads no values of the tensor at its end."""
    if isinstance(parent, ast.Attribute):
        return _is_fact(parent.attr)
    if isinstance(parent, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in _ASKS_ONLY
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Attribute):
        return parent.func.attr in _LIKE_ANOTHER
    return False
