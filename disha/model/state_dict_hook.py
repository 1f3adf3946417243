"""What happens before `load_state_dict` of a model with adapters.

Blocks do not report themselves as missing, so that a state dict of the base loads. So a hook of the
model looks at each state dict first:

    it has no block     it is the base's, and says what the buffers were before the first adapter
    it has some blocks  all other blocks of the same adapters are missing
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn

from disha.layers.blocks import CHILD_NAME
from disha.model.buffers import remember_from_base
from disha.model.view import clean_key


def add_hook(model: Any, undo: ExitStack) -> None:
    """Let a model look at each state dict before it loads it, unless it does already."""
    if not _find_hooks(model):
        handle = model.register_load_state_dict_pre_hook(_before_loading)
        undo.callback(handle.remove)


def remove_hooks(modules: Iterable[nn.Module], undo: ExitStack) -> None:
    """Take the hook away from modules. A part of a model may have got one as a model itself."""
    for module in modules:
        hooks: Any = module._load_state_dict_pre_hooks
        for number in _find_hooks(module):
            undo.callback(hooks.__setitem__, number, hooks[number])
            del hooks[number]


def _find_hooks(module: Any) -> list[int]:
    """Return the keys under which a module has `_before_loading` among its hooks."""
    return [
        number
        for number, hook in module._load_state_dict_pre_hooks.items()
        if hook.hook is _before_loading
    ]


def _before_loading(
    model: nn.Module,
    state: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing: list[str],
    *others: Any,
) -> None:
    given = _find_blocks(model, [key.removeprefix(prefix) for key in state])
    if given:
        missing += [prefix + name for name in _list_absent_blocks(model, given)]
    else:
        remember_from_base(model, state, prefix)


def _find_blocks(model: nn.Module, keys: Iterable[str]) -> set[str]:
    """Return the clean keys of blocks: those of a state dict, or of an adapter file.

    Trainer loads the file of a checkpoint as a state dict, and the keys of its blocks have no
    adapter. So a key is a block's by its end, unless the user has a tensor of that name.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    of_user = {clean_key(name) for name, _ in tensors if not _is_block(name)}
    return {clean_key(key) for key in keys if key.endswith("_block")} - of_user


def _list_absent_blocks(model: nn.Module, given: set[str]) -> list[str]:
    """Return the names of the other blocks of the adapters that have some of the given ones."""
    adapters = set(map(_adapter_of, given))
    return [
        name
        for name, _ in model.named_parameters()
        if _is_block(name) and _adapter_of(name) in adapters and clean_key(name) not in given
    ]


def _is_block(key: str) -> bool:
    """Whether a key of a state dict is that of a block, and not of a user's own parameter."""
    return key.endswith("_block") and f".{CHILD_NAME}." in f".{key}"


def _adapter_of(key: str) -> str:
    """Return the name of an adapter from the key of one of its blocks.

    Such a key is `<layer>.disha.<adapter>.<block>`. One of an adapter file has no adapter, and the
    result is empty.
    """
    _, _, below = f".{key}".rpartition(f".{CHILD_NAME}.")
    return below.partition(".")[0]
