"""Notice the layers that an adapter had and has no more, and the blocks that a state dict lacks.

Code of the user may put another module in the place of an adapted one, as the method
`resize_token_embeddings` of transformers does. The block goes with the old module. So a model
remembers, in its `__dict__`, the names of the weights that each adapter was injected into.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from torch import nn

from disha.layers.blocks import CHILD_NAME
from disha.layers.gradient_flags import attributes_of
from disha.model.view import ModelView, clean_key
from disha.text import join

_LAYERS = "_disha_layers"


def remember_layers(model: nn.Module, adapter: str, names: Sequence[str], undo: ExitStack) -> None:
    """Remember the names of the weights that an adapter of this model adapts."""
    _set_layers(model, {**_recall(model), adapter: tuple(names)}, undo)


def forget_layers(modules: Iterable[nn.Module], adapter: str, undo: ExitStack) -> None:
    """Forget the layers of an adapter that is removed."""
    for module in modules:
        remembered = _recall(module)
        if adapter in remembered:
            others = {name: layers for name, layers in remembered.items() if name != adapter}
            _set_layers(module, others, undo)


def find_lost_layers(view: ModelView, adapter: str) -> list[str]:
    """Return the names of the weights that the adapter was injected into and does not adapt now."""
    adapted = {model_block.name for model_block in view.blocks(adapter)}
    lost = []
    # A part of the model may have got adapters as a model itself, so all modules are asked.
    for module, names in view.names.items():
        for layer in _recall(module).get(adapter, ()):
            layer_name = join(names[0], layer)
            if layer_name not in adapted:
                lost.append(layer_name)
    return lost


def _recall(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the layers of each adapter that was injected into the module as a model."""
    return attributes_of(module).get(_LAYERS, {})


def _set_layers(module: nn.Module, layers: dict[str, tuple[str, ...]], undo: ExitStack) -> None:
    attributes = attributes_of(module)
    former = attributes.get(_LAYERS)
    if former is None:
        undo.callback(attributes.pop, _LAYERS, None)
    else:
        undo.callback(attributes.__setitem__, _LAYERS, former)
    if layers:
        attributes[_LAYERS] = layers
    else:
        attributes.pop(_LAYERS, None)


# --- in a state dict -----------------------------------------------------------------------------


def find_blocks(model: nn.Module, keys: Iterable[str]) -> set[str]:
    """Return the clean keys of blocks: those of a state dict, or of an adapter file.

    Trainer loads the file of a checkpoint as a state dict, and the keys of its blocks have no
    adapter. So a key is a block's by its end, unless the user has a parameter of that name.
    """
    of_user = {clean_key(name) for name, _ in model.named_parameters() if not _is_block(name)}
    return {clean_key(key) for key in keys if key.endswith("_block")} - of_user


def list_absent_blocks(model: nn.Module, given: set[str]) -> list[str]:
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
