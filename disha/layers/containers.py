"""Adapted modules that contain others: what they contain does not change.

The child `disha` stands among the modules of its layer, where optimizers, state dicts and engines
find its blocks. Two kinds of modules would take it for one that they run:

- Subclasses of `nn.Sequential` and the like that have a matrix of their own. Their methods run on a
  plain container that has the same modules, but not that child.
- Modules whose forward goes through `self.children()`. While it runs, they do not have that child.

Code that runs each of `_modules` in turn, or the children of another module, still meets it. It
returns its input, as `nn.Identity` does.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

CHILD_NAME = "disha"
"""Name of the child module that adapting adds to a module."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def methods_without_child(original: type[nn.Module]) -> dict[str, Any]:
    """Return the methods, by name, that the adapted class of a container has in their place."""
    methods: dict[str, Any] = {}
    for container in _CONTAINERS:
        if issubclass(original, container):
            for name, method in vars(container).items():
                if callable(method) and name not in ("__init__", "forward"):
                    methods[name] = _run_on_plain_container(getattr(original, name))
    of_torch = str(original.forward.__module__).startswith("torch.nn.")  # they go by name
    if not of_torch:
        methods["forward"] = _hide_child_in(original.forward)
        methods["named_children"] = _named_children
    return methods


def _run_on_plain_container(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(container: Any, *args: Any, **kwargs: Any) -> Any:
        adapters = container._modules.get(CHILD_NAME)
        if adapters is None:  # the container constructs itself
            return method(container, *args, **kwargs)
        former = {name: child for name, child in container._modules.items() if name != CHILD_NAME}
        plain = object.__new__(container._original_class)
        vars(plain).update(vars(container), _modules=dict(former))
        result = method(plain, *args, **kwargs)
        if list(plain._modules.items()) != list(former.items()):
            container._modules.clear()
            container._modules.update(plain._modules)
            container._modules[CHILD_NAME] = adapters
        return container if result is plain else result

    return run


_RUNNING = threading.local()
"""Its `modules` are those whose forward runs in this thread."""


def _hide_child_in(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(module._modules) == 1:  # it has no other children to go through
            return forward(module, *args, **kwargs)
        others = getattr(_RUNNING, "modules", ())
        _RUNNING.modules = (*others, module)
        try:
            return forward(module, *args, **kwargs)
        finally:
            _RUNNING.modules = others

    return run


def _named_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children, but not the adapters while the module runs."""
    is_running = any(running is module for running in getattr(_RUNNING, "modules", ()))
    for name, child in nn.Module.named_children(module):
        if not (is_running and name == CHILD_NAME):
            yield name, child
