"""What the modules of a model remember: the base before adapters, and what trains with adapters.

Each module keeps it in its `__dict__`, so copies and pickles have it too: the first `requires_grad`
flags of its parameters, which adapter trains a parameter of `also_train`, and the running
statistics that batch and instance norms had. Statistics that changed since belong to the adapter.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from disha.sharding import write
from disha.text import join

Names = Mapping[nn.Module, tuple[str, ...]]
"""Every module of a model -> its clean names."""

_FLAGS = "_disha_training"
_STATISTICS = "_disha_statistics"


class _Flag(NamedTuple):
    """What a module remembers of a parameter."""

    first: bool  # its requires_grad before disha first changed it
    adapter: str | None = None  # the adapter that it trains with
    without: bool = False  # its requires_grad without that adapter


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return the module's real `__dict__`, even if the user's class shows another."""
    attributes: dict[str, Any] = nn.Module.__dict__["__dict__"].__get__(module)
    return attributes


def set_requires_grad(module: nn.Module, name: str, flag: bool) -> None:
    """Set requires_grad of the module's own parameter `name`, and remember the first value."""
    parameter = module._parameters[name]
    if parameter is None or parameter.requires_grad == flag:
        return
    flags = attributes_of(module).setdefault(_FLAGS, {})
    flags.setdefault(name, _Flag(parameter.requires_grad))
    parameter.requires_grad = flag  # lazy parameters do not have requires_grad_()


def restore_flags(module: nn.Module) -> None:
    """Restore the first flags of the module's parameters, and forget everything."""
    for name, flag in attributes_of(module).pop(_FLAGS, {}).items():
        parameter = module._parameters.get(name)
        if parameter is not None:
            parameter.requires_grad = flag.first


def keep_flags(parameters: Iterable[tuple[nn.Module, str]], undo: ExitStack) -> None:
    """Note the flags of parameters, and what their modules remember, in `undo`."""
    kept = []
    for module, name in parameters:
        attributes, parameter = attributes_of(module), module._parameters[name]
        flag = parameter is not None and parameter.requires_grad
        kept.append((parameter, flag, attributes, dict(attributes.get(_FLAGS, {}))))
    undo.callback(_put_back, kept)


def _put_back(kept: Iterable[tuple[Tensor | None, bool, dict[str, Any], dict[str, Any]]]) -> None:
    for parameter, flag, attributes, remembered in kept:
        if parameter is not None:
            parameter.requires_grad = flag
        attributes.pop(_FLAGS, None)
        if remembered:
            attributes[_FLAGS] = remembered


def claim(module: nn.Module, adapter: str, name: str, flag_without: bool) -> None:
    """Train a parameter of the module with an adapter."""
    parameter = module._parameters[name]
    assert parameter is not None
    flags = attributes_of(module).setdefault(_FLAGS, {})
    first = flags[name].first if name in flags else parameter.requires_grad
    flags[name] = _Flag(first, adapter, flag_without)
    parameter.requires_grad = True


def release(module: nn.Module, adapter: str) -> None:
    """Stop training the module's parameters that an adapter claims, and forget the claims."""
    for name in claimed(module, adapter):
        flags = attributes_of(module)[_FLAGS]
        flag = flags[name]
        flags[name] = _Flag(flag.first)
        set_requires_grad(module, name, flag.without)


def claimed(module: nn.Module, adapter: str) -> tuple[str, ...]:
    """Return the names of the module's parameters that an adapter trains."""
    flags = attributes_of(module).get(_FLAGS, {})
    return tuple(name for name in flags if is_claimed(module, name, adapter))


def is_claimed(module: nn.Module, name: str, adapter: str | None = None) -> bool:
    """Whether an adapter, or any, trains a parameter of the module."""
    flag = attributes_of(module).get(_FLAGS, {}).get(name)
    return flag is not None and flag.adapter is not None and adapter in (None, flag.adapter)


# --- running statistics ---------------------------------------------------------------------------


def statistics(names: Names) -> dict[str, Tensor]:
    """Return the running statistics of all norms under their clean names."""
    return {
        join(name, own): buffer
        for module, (name, *_) in names.items()
        for own, buffer in _statistics_of(module).items()
    }


def remember_statistics(model: Any, modules: Iterable[nn.Module], undo: ExitStack) -> None:
    """Keep the values of the norms of a model that keep none yet."""
    for module in modules:
        own, attributes = _statistics_of(module), attributes_of(module)
        if own and _STATISTICS not in attributes:
            undo.callback(attributes.pop, _STATISTICS, None)
            attributes[_STATISTICS] = {name: value.detach().clone() for name, value in own.items()}
            if not _hooks(model):
                undo.callback(forget_statistics, [model])
                model.register_load_state_dict_pre_hook(_keep_loaded)


def _keep_loaded(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keep the statistics of a state dict without blocks: it is one of the base."""
    if any(key.endswith("_block") for key in state):
        return
    for name, module in model.named_modules():
        kept = attributes_of(module).get(_STATISTICS, {})
        for own, former in kept.items():
            kept[own] = state.get(prefix + join(name, own), former).detach().clone()


def _hooks(module: Any) -> list[int]:
    """Return the numbers of our hooks before a module loads a state dict."""
    return [n for n, one in module._load_state_dict_pre_hooks.items() if one.hook is _keep_loaded]


def changed_statistics(names: Names) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return the statistics that may not be those of the base, each with the kept value, if any."""
    found = {}
    for module, (name, *_) in names.items():
        kept = attributes_of(module).get(_STATISTICS, {})
        for own, now in _statistics_of(module).items():
            former = kept.get(own)
            if former is None or former.is_meta or not torch.equal(now, former.to(now)):
                found[join(name, own)] = now, former
    return found


def put_back_statistics(names: Names, undo: ExitStack, but: Container[str] = ()) -> None:
    """Give the norms the kept values, except for the statistics named in `but`."""
    for name, (now, former) in changed_statistics(names).items():
        if name not in but and former is not None and not former.is_meta:
            write(now, former, undo)


def forget_statistics(modules: Iterable[nn.Module]) -> None:
    """Drop the kept values: the last step of an operation, which nothing has to undo."""
    for module in modules:
        attributes_of(module).pop(_STATISTICS, None)
        for number in _hooks(module):
            del module._load_state_dict_pre_hooks[number]


def _statistics_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers in the state dict of a norm, or nothing if the module is none."""
    if module._buffers.get("running_mean") is None:
        return {}
    return {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None
        and not is_lazy(buffer)
        and name not in module._non_persistent_buffers_set
    }
