"""Notice the layers that an adapter had and has no more.

Code of the user may put another module in the place of an adapted one, as the method
`resize_token_embeddings` of transformers does. The block goes with the old module. So a model
remembers, in its `__dict__`, the names of the weights that each adapter was injected into.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from torch import nn

from disha.layers.gradient_flags import attributes_of
from disha.model.view import ModelView
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
