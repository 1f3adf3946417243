"""Set `requires_grad` flags, remember the former ones, and let parameters train with an adapter.

What a module remembers is in its `__dict__`, so copies and pickles of the model have it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = [
    "as_now",
    "claim",
    "claimed",
    "is_claimed",
    "release",
    "restore_flags",
    "set_requires_grad",
]

_ATTRIBUTE = "_disha_training"


@dataclass
class _Memory:
    flags: dict[str, bool] = field(default_factory=dict)
    """Parameter name -> its requires_grad before disha first changed it."""
    claims: dict[str, dict[str, bool]] = field(default_factory=dict)
    """Adapter -> name of a parameter that trains with it -> its requires_grad without it."""

    def copied(self) -> _Memory:
        """Return a copy that later changes do not reach."""
        return _Memory(dict(self.flags), {key: dict(names) for key, names in self.claims.items()})


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the module's real `__dict__`, even if the user's class shows another."""
    attributes: dict[str, Any] = nn.Module.__dict__["__dict__"].__get__(module)
    return attributes


def _memory(module: nn.Module) -> _Memory:
    memory: _Memory = _attributes(module).setdefault(_ATTRIBUTE, _Memory())
    return memory


def as_now(module: nn.Module) -> Callable[[], None]:
    """Return a function that restores the module's flags and its memory as they are now."""
    memory: _Memory | None = _attributes(module).get(_ATTRIBUTE)
    before = None if memory is None else memory.copied()
    flags = [(p, p.requires_grad) for p in module._parameters.values() if p is not None]

    def undo() -> None:
        _attributes(module).pop(_ATTRIBUTE, None)
        if before is not None:
            _attributes(module)[_ATTRIBUTE] = before
        for parameter, flag in flags:
            parameter.requires_grad = flag

    return undo


def set_requires_grad(module: nn.Module, name: str, flag: bool) -> None:
    """Set requires_grad of the module's own parameter `name`, remembering what it was."""
    parameter = module._parameters[name]
    if parameter is None or parameter.requires_grad == flag:
        return
    _memory(module).flags.setdefault(name, parameter.requires_grad)
    parameter.requires_grad = flag  # lazy parameters do not have requires_grad_()


def restore_flags(module: nn.Module) -> None:
    """Restore the first flags of the module's parameters, and forget everything."""
    memory: _Memory | None = _attributes(module).pop(_ATTRIBUTE, None)
    for name, flag in memory.flags.items() if memory else ():
        parameter = module._parameters.get(name)
        if parameter is not None:
            parameter.requires_grad = flag


def claim(module: nn.Module, adapter: str, name: str, flag_without: bool) -> None:
    """Train a parameter of the module with an adapter.

    Args:
        module: the module that holds the parameter.
        adapter: the adapter.
        name: the parameter's name in the module.
        flag_without: its requires_grad after the adapter is removed.
    """
    set_requires_grad(module, name, True)
    _memory(module).claims.setdefault(adapter, {})[name] = flag_without


def release(module: nn.Module, adapter: str) -> None:
    """Stop training the module's parameters that an adapter claims, and forget the claims."""
    memory: _Memory | None = _attributes(module).get(_ATTRIBUTE)
    claims = memory.claims.pop(adapter, {}) if memory is not None else {}
    for name, flag in claims.items():
        set_requires_grad(module, name, flag)


def claimed(module: nn.Module, adapter: str) -> tuple[str, ...]:
    """Return the names of the module's parameters that an adapter trains."""
    memory: _Memory | None = _attributes(module).get(_ATTRIBUTE)
    return () if memory is None else tuple(memory.claims.get(adapter, ()))


def is_claimed(module: nn.Module, name: str) -> bool:
    """Whether any adapter trains a parameter of the module."""
    memory: _Memory | None = _attributes(module).get(_ATTRIBUTE)
    return memory is not None and any(name in names for names in memory.claims.values())
