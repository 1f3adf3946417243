"""Running statistics: the buffers that batch and instance norms update in training.

Those that changed since the first injection belong to the adapter; each norm keeps the base's.
"""

from __future__ import annotations

from collections.abc import Container
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from disha.freezing import attributes_of
from disha.model import ModelView, join
from disha.sharding import write

_ATTRIBUTE = "_disha_statistics"


def statistics(view: ModelView) -> dict[str, Tensor]:
    """Return the running statistics of all norms under their clean names."""
    return {
        join(name, own): buffer
        for module, (name, *_) in view.names.items()
        for own, buffer in _own(module).items()
    }


def remember(view: ModelView, undo: ExitStack) -> None:
    """Keep the values of the norms that keep none yet."""
    for module in view.names:
        own, attributes = _own(module), attributes_of(module)
        if own and _ATTRIBUTE not in attributes:
            undo.callback(attributes.pop, _ATTRIBUTE, None)
            attributes[_ATTRIBUTE] = {name: value.detach().clone() for name, value in own.items()}


def changed_statistics(view: ModelView) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the statistics that are no longer those of the base, each with the kept value."""
    found = {}
    for module, (name, *_) in view.names.items():
        kept = attributes_of(module).get(_ATTRIBUTE, {})
        for own, now in _own(module).items():
            former = kept.get(own)
            if former is not None and (former.is_meta or not torch.equal(now, former.to(now))):
                found[join(name, own)] = now, former
    return found


def put_back(view: ModelView, undo: ExitStack, but: Container[str] = ()) -> None:
    """Give the norms the kept values, except for the statistics named in `but`."""
    for name, (now, former) in changed_statistics(view).items():
        if name not in but and not former.is_meta:
            write(now, former, undo)


def forget(view: ModelView, undo: ExitStack) -> None:
    """Drop the kept values."""
    for module in view.names:
        attributes = attributes_of(module)
        if _ATTRIBUTE in attributes:
            undo.callback(attributes.__setitem__, _ATTRIBUTE, attributes.pop(_ATTRIBUTE))


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers in the state dict of a norm, or nothing if the module is none."""
    if module._buffers.get("running_mean") is None:
        return {}
    return {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
