"""Undo: an operation changes a model completely or not at all, even if it is interrupted."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from disha.freezing import attributes_of
from disha.layers import Adapters, Block
from disha.model import ModelView
from disha.sharding import write

__all__ = ["Undo"]


class Undo:
    """A context that restores a model if its body raises.

    An exception can come at any point: Ctrl-C raises KeyboardInterrupt, and any call can raise
    MemoryError. So everything that an operation may change is noted first: classes, attributes,
    children, hooks, flags, and whether gradients are enabled. It is put back by plain assignments,
    which do not depend on how far the operation got. Nothing else is touched, because other threads
    may be in forward.

    This is a class, because an interruption can leave the body of a generator (`contextmanager`)
    waiting. The garbage collector would then undo the operation, much later.

    Parameters and their values are not noted. Change them by the methods below.

    Args:
        view: the model.
        modules: the modules that may change; by default all, those of adapters included.

    Examples:
        >>> from torch import nn
        >>> from disha.model import ModelView
        >>> from disha.undo import Undo
        >>> model = nn.Linear(2, 2)
        >>> try:
        ...     with Undo(ModelView(model)):
        ...         model.weight.requires_grad = False
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     print(model.weight.requires_grad)
        True
    """

    def __init__(self, view: ModelView, modules: Iterable[nn.Module] | None = None) -> None:
        view.reshard()
        self._view = view
        self._gradients = torch.is_grad_enabled()
        self._written: dict[int, tuple[Tensor, Tensor]] = {}
        self._data: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._replaced: dict[tuple[int, str], tuple[nn.Module, str, nn.Parameter]] = {}
        # A few lists, and no object for each module: the garbage collector would take long.
        self._modules = list(view.all_modules() if modules is None else modules)
        self._classes = [type(module) for module in self._modules]
        self._attributes = [_attributes(module) for module in self._modules]
        self._contents = {
            id(own): own.copy() for module in self._modules for own in _dicts(module) if own
        }
        self._parameters = [
            parameter
            for module in self._modules
            for parameter in module._parameters.values()
            if parameter is not None
        ]
        self._flags = [parameter.requires_grad for parameter in self._parameters]

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._restore()

    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Copy values into a parameter in place.

        Args:
            parameter: sharded or not.
            values: as for `disha.sharding.write`.
        """
        if id(parameter) not in self._written:
            self._written[id(parameter)] = (parameter, parameter.detach().clone())
        with torch.no_grad():
            write(parameter, values)

    def replace(self, module: nn.Module, name: str, new: Tensor) -> None:
        """Replace a parameter of a module by a new one, or only its data if `new` is no parameter.

        Replacing the data keeps the parameter object, and takes one copy of the weight, not two.
        """
        now = module._parameters[name]
        assert now is not None
        if isinstance(new, nn.Parameter):
            self._replaced.setdefault((id(module), name), (module, name, now))
            module._parameters[name] = new
        else:
            self._data.setdefault(id(now), (now, now.data))
            now.data = new

    def put_back(self) -> None:
        """Take back what `write` and `replace` did."""
        with torch.no_grad():
            for module, name, parameter in self._replaced.values():
                module._parameters[name] = parameter
            for parameter, data in self._data.values():
                parameter.data = data
            for written, values in self._written.values():
                write(written, values)

    def _restore(self) -> None:
        self._view.reshard()
        self.put_back()
        for module, cls, former in zip(self._modules, self._classes, self._attributes, strict=True):
            if type(module) is not cls:  # some classes can't be assigned, even to their objects
                object.__setattr__(module, "__class__", cls)
            attributes = attributes_of(module)
            for name in _attributes(module).keys() - former.keys():
                del attributes[name]
            attributes.update(former)
            for own in _dicts(module):
                _refill(own, self._contents.get(id(own), {}))
        for parameter, flag in zip(self._parameters, self._flags, strict=True):
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag
        torch.set_grad_enabled(self._gradients)


_ATTRIBUTES = (
    "training",
    "_disha_training",
    "_disha_statistics",
    "_disha_nests",
    "use_nested_tensor",
    "_flat_weights",
)
"""What an operation may change of the attributes of the model's own modules."""

_DICTS = (
    "_modules",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""In which dicts of a module it may add, replace or remove something."""


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that may change."""
    attributes = attributes_of(module)
    if isinstance(module, (Adapters, Block)):
        return attributes.copy()
    return {name: attributes[name] for name in _ATTRIBUTES if name in attributes}


def _dicts(module: nn.Module) -> list[dict[Any, Any]]:
    """Return the dicts that may change."""
    attributes = attributes_of(module)
    names = (*_DICTS, "_buffers") if isinstance(module, Block) else _DICTS
    return [own for own in map(attributes.get, names) if isinstance(own, dict)]


def _refill(own: dict[Any, Any], items: dict[Any, Any]) -> None:
    """Make a dict hold these items, in this order. A dict that does so already is left alone."""
    if list(own) != list(items) or any(own[key] is not value for key, value in items.items()):
        own.clear()
        own.update(items)
