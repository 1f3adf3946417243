"""What trains: `requires_grad` flags changed with a memory, and parameters trained beside adapters.

The memory of a module lives in its `__dict__`, so that copies and pickles of the model carry it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

__all__ = ["claim", "claimed", "release", "restore_flags", "set_requires_grad"]

_ATTRIBUTE = "_disha_training"


@dataclass
class _Memory:
    flags: dict[str, bool] = field(default_factory=dict)
    """Parameter name -> its requires_grad before disha first changed it."""
    claims: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Adapter -> names of the module's parameters that are trained and saved with it."""


def _memory(module: nn.Module) -> _Memory:
    memory: _Memory = module.__dict__.setdefault(_ATTRIBUTE, _Memory())
    return memory


def set_requires_grad(module: nn.Module, name: str, flag: bool) -> None:
    """Set requires_grad of the module's own parameter `name`, remembering what it was."""
    parameter = module._parameters[name]
    if parameter is None or parameter.requires_grad == flag:
        return
    _memory(module).flags.setdefault(name, parameter.requires_grad)
    parameter.requires_grad_(flag)


def restore_flags(module: nn.Module) -> None:
    """Set the flags back to what they were at first, and forget everything."""
    memory: _Memory | None = module.__dict__.pop(_ATTRIBUTE, None)
    for name, flag in memory.flags.items() if memory else ():
        parameter = module._parameters.get(name)
        if parameter is not None:
            parameter.requires_grad_(flag)


def claim(module: nn.Module, adapter: str, names: tuple[str, ...]) -> None:
    """Note that parameters of the module are trained and saved with an adapter."""
    _memory(module).claims[adapter] = names


def release(module: nn.Module, adapter: str) -> None:
    """Forget what an adapter claims of the module."""
    memory: _Memory | None = module.__dict__.get(_ATTRIBUTE)
    if memory is not None:
        memory.claims.pop(adapter, None)


def claimed(module: nn.Module, adapter: str | None = None) -> tuple[str, ...]:
    """Return the names of the module's parameters that an adapter, or any, claims."""
    memory: _Memory | None = module.__dict__.get(_ATTRIBUTE)
    if memory is None:
        return ()
    claims = memory.claims
    wanted = claims.values() if adapter is None else (claims.get(adapter, ()),)
    return tuple(dict.fromkeys(name for names in wanted for name in names))
