"""The `requires_grad` flags that parameters had before injection, and who trains them now.

A module remembers those of its parameters in its `__dict__`, so copies and pickles have them too.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import nn

_FLAGS = "_disha_training"


class _Flag(NamedTuple):
    """What a module remembers of one of its parameters."""

    original: bool  # its requires_grad before disha first changed it
    adapter: str | None = None  # the adapter that it trains with, if `also_train` named it
    without_adapter: bool = False  # its requires_grad when that adapter is removed


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return the module's real `__dict__`, even if its class has an attribute of that name."""
    return nn.Module.__dict__["__dict__"].__get__(module)


def set_requires_grad(module: nn.Module, name: str, flag: bool) -> None:
    """Set requires_grad of a module's parameter, and remember what it was at first."""
    parameter = module._parameters[name]
    if parameter is None or parameter.requires_grad == flag:
        return
    flags = attributes_of(module).setdefault(_FLAGS, {})
    flags.setdefault(name, _Flag(parameter.requires_grad))
    parameter.requires_grad = flag  # lazy parameters do not have requires_grad_()


def restore_flags(module: nn.Module) -> None:
    """Give the module's parameters their original flags back, and forget everything."""
    for name, flag in attributes_of(module).pop(_FLAGS, {}).items():
        # Copied to a plain dict, because a lookup in ZeRO-3's own may gather the parameter.
        parameter = dict(module._parameters).get(name)
        if parameter is not None:
            parameter.requires_grad = flag.original


def keep_flags(parameters: Iterable[tuple[Any, Any, str]], undo: ExitStack) -> None:
    """Let `undo` put back the flags of parameters, and what their modules remember."""
    kept = []
    for _, module, name in parameters:
        parameter = module._parameters[name]
        attributes = attributes_of(module)
        remembered = dict(attributes.get(_FLAGS, {}))
        kept.append((parameter, parameter.requires_grad, attributes, remembered))

    def put_back() -> None:
        for parameter, flag, attributes, remembered in kept:
            parameter.requires_grad = flag
            if remembered:
                attributes[_FLAGS] = remembered
            else:
                attributes.pop(_FLAGS, None)

    undo.callback(put_back)  # one callback for all parameters, because each takes time and memory


def claim_parameter(module: nn.Module, adapter: str, name: str, flag_without: bool) -> None:
    """Train a parameter of the module together with an adapter.

    When the adapter is removed, the parameter gets `flag_without` as its requires_grad.
    """
    parameter: Any = module._parameters[name]
    flags = attributes_of(module).setdefault(_FLAGS, {})
    original = flags[name].original if name in flags else parameter.requires_grad
    flags[name] = _Flag(original, adapter, flag_without)
    parameter.requires_grad = True


def release_parameters(module: nn.Module, adapter: str) -> None:
    """Let the parameters of the module that train with an adapter no longer do so.

    They get the flags that they have without it.
    """
    flags = attributes_of(module).get(_FLAGS, {})
    for name, flag in list(flags.items()):
        if flag.adapter == adapter:
            flags[name] = _Flag(flag.original)
            set_requires_grad(module, name, flag.without_adapter)


def is_claimed(module: nn.Module, name: str, adapter: str | None = None) -> bool:
    """Whether a parameter of the module trains with an adapter, by default with any."""
    flag = attributes_of(module).get(_FLAGS, {}).get(name)
    return flag is not None and flag.adapter is not None and adapter in (None, flag.adapter)
