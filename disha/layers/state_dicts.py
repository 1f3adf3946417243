"""What `load_state_dict` of a model with adapters, or of a part of one, makes of a state dict.

    it has no block     it is the base's: no block is missing, and what it says of the buffers is
                        what they were before the first adapter
    it has some blocks  all other blocks of the same adapters are missing

A hook of the model would not see the state dicts of its parts. So the first adapter changes
`nn.Module.load_state_dict`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from disha.layers.adapters import Adapters
from disha.layers.containers import CHILD_NAME
from disha.layers.memory import PLACES, FormerBuffer, place_copy
from disha.layers.wrappers import clean_key
from disha.text import join


@functools.cache  # so that a second call does nothing
def watch_loading() -> None:
    """Look at each state dict that any model with adapters loads."""
    load = nn.Module.load_state_dict

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(module, Adapters) for module in self.modules()):
            return load(self, state_dict, *args, **kwargs)
        blocks = _find_blocks(self, state_dict)
        if not blocks:
            _remember_buffers(self, state_dict)
        adapters = set(map(_adapter_of, blocks))

        def forgive(model: nn.Module, result: Any) -> None:
            result.missing_keys[:] = [
                key
                for key in result.missing_keys
                if not _is_block(key) or _adapter_of(key) in adapters
            ]

        hook = self.register_load_state_dict_post_hook(forgive)
        try:
            return load(self, state_dict, *args, **kwargs)
        finally:
            hook.remove()

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]


def _find_blocks(model: nn.Module, keys: Iterable[str]) -> set[str]:
    """Return the keys of blocks among those of a state dict, or of an adapter file.

    Trainer loads the file of a checkpoint as a state dict, and the keys of its blocks have no
    adapter. So a key is a block's by its end, unless the user has a tensor of that name.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    of_user = {clean_key(name) for name, _ in tensors if not _is_block(name)}
    return {key for key in map(clean_key, keys) if key.endswith("_block")} - of_user


def _remember_buffers(model: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Remember the buffers in a state dict of the base, in place of those at the injection."""
    modules = {module: (clean_key(name),) for name, module in model.named_modules()}
    adapted = [(module, module._modules.get(CHILD_NAME)) for module in modules]
    place_copy(modules, [layer for layer in adapted if isinstance(layer[1], Adapters)])
    loaded = {clean_key(key): values for key, values in base.items()}
    for module, (name,) in modules.items():
        place = PLACES.get(module)
        if place is None:
            continue
        known = place.memory.state.buffers
        changed = {}
        for buffer in module._buffers:
            values = loaded.get(join(name, buffer))
            for name_in_memory in place.names:
                former = known.get(join(name_in_memory, buffer))
                if values is not None and former is not None:
                    changed[join(name_in_memory, buffer)] = FormerBuffer.of(
                        values, is_saved=former.is_saved, claimant=former.claimant
                    )
        if changed:
            place.memory.state = place.memory.state.but(buffers={**known, **changed})


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
