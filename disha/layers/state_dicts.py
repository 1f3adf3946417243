"""What happens before `load_state_dict` of a model with adapters, or of a part of one.

Blocks do not report themselves as missing, so that a state dict of the base loads. So each state
dict is looked at before it loads:

    it has no block     it is the base's, and says what the buffers were before the first adapter
    it has some blocks  all other blocks of the same adapters are missing

A hook of the model would not see the state dicts of its parts. So the first adapter changes
`nn.Module.load_state_dict`: it registers the hook for as long as it loads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from disha.layers.blocks import Adapters
from disha.layers.containers import CHILD_NAME
from disha.layers.model_record import FormerBuffer, Places
from disha.layers.wrappers import clean_key


@functools.cache  # so that a second call does nothing
def watch_loading() -> None:
    """Look at each state dict before any model with adapters loads it."""
    load = nn.Module.load_state_dict

    @functools.wraps(load)
    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(module, Adapters) for module in self.modules()):
            return load(self, *args, **kwargs)
        hook = self.register_load_state_dict_pre_hook(_before_loading)
        try:
            return load(self, *args, **kwargs)
        finally:
            hook.remove()

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]


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
        base = {clean_key(key.removeprefix(prefix)): value for key, value in state.items()}
        _remember_buffers(model, base)


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


def _remember_buffers(model: nn.Module, base: dict[str, Tensor]) -> None:
    """Remember the buffers in a state dict of the base, in place of those at the injection."""
    modules = {clean_key(name): module for name, module in model.named_modules()}
    layers = [
        ([name.removesuffix(CHILD_NAME).removesuffix(".")], module)
        for name, module in modules.items()
        if isinstance(module, Adapters)
    ]
    places = Places(layers)
    for name, _ in model.named_buffers():
        known = places.find_all([clean_key(name)])
        values = base.get(clean_key(name))
        if known is None or values is None:
            continue
        former = known.find("buffers")
        if former is not None:
            new = FormerBuffer.of(values, is_saved=former.is_saved, claimant=former.claimant)
            known.set("buffers", new)


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
