"""The running statistics that batch and instance norms had before adapters.

Each norm keeps them in its `__dict__`. Statistics that changed since belong to the adapter.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from disha.layers.blocks import CHILD_NAME
from disha.layers.gradient_flags import attributes_of
from disha.model.view import clean_key
from disha.sharding.tensors import write
from disha.text import join

Names = Mapping[nn.Module, tuple[str, ...]]
"""Every module of a model -> its clean names."""

_STATISTICS = "_disha_statistics"


def statistics(names: Names) -> dict[str, Tensor]:
    """Return the running statistics of all norms under their clean names."""
    return {
        join(name, name_inside): value
        for module, (name, *_) in names.items()
        for name_inside, value in _statistics_of(module).items()
    }


def remember_statistics(model: Any, modules: Iterable[nn.Module], undo: ExitStack) -> None:
    """Keep the values of the norms of a model that keep none yet."""
    if not _hooks(model):
        undo.callback(forget_statistics, [model])
        model.register_load_state_dict_pre_hook(_before_loading)
    for module in modules:
        now = _statistics_of(module)
        attributes = attributes_of(module)
        if now and _STATISTICS not in attributes:
            undo.callback(attributes.pop, _STATISTICS, None)
            attributes[_STATISTICS] = {name: value.detach().clone() for name, value in now.items()}


def _before_loading(
    model: nn.Module, state: dict[str, Any], prefix: str, _: Any, strict: bool, missing: list[str],
    *others: Any,
) -> None:  # fmt: skip
    """Report the blocks that a state dict lacks; of one without blocks, keep the statistics."""
    given = {clean_key(key.removeprefix(prefix)) for key in state if _is_block(key)}
    if given:
        missing += [prefix + name for name in _absent_blocks(model, given)]
        return
    for name, module in model.named_modules():
        kept = attributes_of(module).get(_STATISTICS, {})
        for name_inside, former in kept.items():
            kept[name_inside] = state.get(prefix + join(name, name_inside), former).detach().clone()


def _absent_blocks(model: nn.Module, given: set[str]) -> list[str]:
    """Return the names of the other blocks of the adapters that have some of the given ones."""
    adapters = set(map(_adapter_of, given))
    return [
        name
        for name, _ in model.named_parameters()
        if _is_block(name) and _adapter_of(name) in adapters and clean_key(name) not in given
    ]


def _is_block(key: str) -> bool:
    """Whether a state-dict key is that of a block, and not of a user's own parameter."""
    return f".{CHILD_NAME}." in f".{key}" and key.endswith("_block")


def _adapter_of(key: str) -> str:
    """Return the name of an adapter from the key of one of its blocks."""
    return f".{key}".rpartition(f".{CHILD_NAME}.")[2].partition(".")[0]


def _hooks(module: Any) -> list[int]:
    """Return the numbers of our hooks before a module loads a state dict."""
    return [
        n for n, hook in module._load_state_dict_pre_hooks.items() if hook.hook is _before_loading
    ]


def changed_statistics(names: Names) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return the statistics that may not be those of the base, each with the kept value, if any."""
    changed = {}
    for module, (name, *_) in names.items():
        kept = attributes_of(module).get(_STATISTICS, {})
        for name_inside, now in _statistics_of(module).items():
            former = kept.get(name_inside)
            if former is None or former.is_meta or not torch.equal(now, former.to(now)):
                changed[join(name, name_inside)] = now, former
    return changed


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
    buffers = saved_buffers(module)
    return buffers if "running_mean" in buffers else {}


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's own buffers that a state dict has."""
    return {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None
        and not is_lazy(buffer)
        and name not in module._non_persistent_buffers_set
    }
