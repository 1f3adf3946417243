"""Set `requires_grad` flags, remember the former ones, and let parameters train with an adapter.

A module keeps what it remembers in its `__dict__`, so copies and pickles of the model have it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import nn

__all__ = [
    "attributes_of",
    "claim",
    "claimed",
    "is_claimed",
    "keep_flags",
    "release",
    "restore_flags",
    "set_requires_grad",
]

_ATTRIBUTE = "_disha_training"


class _Memory(NamedTuple):
    """What a module remembers. It is replaced and never changed, so it can be put back.

    Attributes:
        flags: parameter name -> its requires_grad before disha first changed it.
        claims: adapter -> name of a parameter that trains with it -> its requires_grad without it.
    """

    flags: Mapping[str, bool] = {}
    claims: Mapping[str, Mapping[str, bool]] = {}


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return the module's real `__dict__`, even if the user's class shows another."""
    attributes: dict[str, Any] = nn.Module.__dict__["__dict__"].__get__(module)
    return attributes


def _memory(module: nn.Module) -> _Memory:
    memory: _Memory = attributes_of(module).get(_ATTRIBUTE, _NOTHING)
    return memory


_NOTHING = _Memory()


def set_requires_grad(module: nn.Module, name: str, flag: bool) -> None:
    """Set requires_grad of the module's own parameter `name`, and remember the first value."""
    parameter = module._parameters[name]
    if parameter is None or parameter.requires_grad == flag:
        return
    flags, claims = _memory(module)
    if name not in flags:
        flags = {**flags, name: parameter.requires_grad}
        attributes_of(module)[_ATTRIBUTE] = _Memory(flags, claims)
    parameter.requires_grad = flag  # lazy parameters do not have requires_grad_()


def restore_flags(module: nn.Module) -> None:
    """Restore the first flags of the module's parameters, and forget everything."""
    memory: _Memory = attributes_of(module).pop(_ATTRIBUTE, _NOTHING)
    for name, flag in memory.flags.items():
        parameter = module._parameters.get(name)
        if parameter is not None:
            parameter.requires_grad = flag


def keep_flags(parameters: Iterable[tuple[nn.Module, str]], undo: ExitStack) -> None:
    """Note the flags of parameters, and what their modules remember, in `undo`."""
    kept = [
        (attributes_of(module), module._parameters[name], _memory(module))
        for module, name in parameters
    ]
    flags = [parameter is not None and parameter.requires_grad for _, parameter, _ in kept]

    def put_back() -> None:
        for (attributes, parameter, memory), flag in zip(kept, flags, strict=True):
            if parameter is not None and parameter.requires_grad != flag:
                parameter.requires_grad = flag
            attributes.pop(_ATTRIBUTE, None)
            if memory is not _NOTHING:
                attributes[_ATTRIBUTE] = memory

    undo.callback(put_back)


def claim(module: nn.Module, adapter: str, name: str, flag_without: bool) -> None:
    """Train a parameter of the module with an adapter."""
    set_requires_grad(module, name, True)
    flags, claims = _memory(module)
    own = {**claims.get(adapter, {}), name: flag_without}
    attributes_of(module)[_ATTRIBUTE] = _Memory(flags, {**claims, adapter: own})


def release(module: nn.Module, adapter: str) -> None:
    """Stop training the module's parameters that an adapter claims, and forget the claims."""
    flags, claims = _memory(module)
    if adapter in claims:
        others = {own: names for own, names in claims.items() if own != adapter}
        attributes_of(module)[_ATTRIBUTE] = _Memory(flags, others)
        for name, flag in claims[adapter].items():
            set_requires_grad(module, name, flag)


def claimed(module: nn.Module, adapter: str) -> tuple[str, ...]:
    """Return the names of the module's parameters that an adapter trains."""
    return tuple(_memory(module).claims.get(adapter, ()))


def is_claimed(module: nn.Module, name: str, adapter: str | None = None) -> bool:
    """Whether an adapter, or any, trains a parameter of the module."""
    claims = _memory(module).claims
    return any(name in claims[own] for own in claims if adapter in (None, own))
