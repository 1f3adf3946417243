"""What training changes besides parameters: the persistent buffers of a model.

The memory of the model knows what they were before the first adapter:

    buffers                           remembered         saved, once they have changed
    running statistics of norms       their values       with every adapter
    those that `also_train` matches   their values       with that adapter
    all others                        their checksums    never: a save names them
"""

from __future__ import annotations

from collections.abc import Collection, Container
from contextlib import ExitStack

from torch import Tensor

from disha.layers.memory import FormerBuffer
from disha.model.found import ModelTensor
from disha.model.view import ModelView
from disha.sharding.tensors import write


def remember_buffers(view: ModelView, adapter: str, also_train: Collection[str]) -> None:
    """Remember the buffers that are not remembered yet, and those that the adapter will save."""
    formers = {}
    for buffer in view.buffers:
        claimant = adapter if buffer.name in also_train else None
        if claimant is not None or buffer.former is None:
            is_saved = buffer.is_statistic or claimant is not None
            formers[buffer] = FormerBuffer.of(buffer.value, is_saved=is_saved, claimant=claimant)
    view.remember(formers)


def is_saved_with(buffer: ModelTensor, adapter: str | None) -> bool:
    """Whether a change is saved with an adapter; with None, whether any adapter saves it."""
    former = buffer.former
    if former is None:
        return buffer.is_statistic
    return former.is_saved and (adapter is None or former.claimant in (None, adapter))


def has_changed(buffer: ModelTensor) -> bool:
    """Whether a buffer may have changed."""
    former = buffer.former
    return former is None or former.differs_from(buffer.value)


# --- changes -------------------------------------------------------------------------------------


def list_saved(view: ModelView, adapter: str | None = None) -> dict[str, Tensor]:
    """Return the buffers that an adapter, or any, saves once they have changed, by name."""
    return {buffer.name: buffer.value for buffer in view.buffers if is_saved_with(buffer, adapter)}


def list_changed(view: ModelView, adapter: str | None = None) -> dict[str, Tensor]:
    """Return the buffers that may have changed and that an adapter, or any, saves, by name."""
    return {
        buffer.name: buffer.value
        for buffer in view.buffers
        if is_saved_with(buffer, adapter) and has_changed(buffer)
    }


def list_unsaved(view: ModelView) -> list[str]:
    """Return the names of the buffers that have changed and that no adapter saves."""
    # Tensors are compared, because modules may share a buffer that one of them has saved.
    saved = {id(buffer) for buffer in list_saved(view).values()}
    return [
        buffer.name
        for buffer in view.buffers
        if id(buffer.value) not in saved and buffer.former is not None and has_changed(buffer)
    ]


def put_back_buffers(
    view: ModelView, undo: ExitStack, adapter: str | None = None, excepted: Container[str] = ()
) -> None:
    """Put the former values back into the buffers that an adapter saves, or that any does.

    The buffers named in `excepted` keep what they have.
    """
    for buffer in view.buffers:
        if buffer.name not in excepted and is_saved_with(buffer, adapter):
            _put_back(buffer, undo)


def release_buffers(view: ModelView, adapter: str, undo: ExitStack) -> None:
    """Put the former values back into the buffers that the adapter's `also_train` names.

    Then no adapter saves them any more.
    """
    released = {}
    for buffer in view.buffers:
        if buffer.claimant == adapter:
            _put_back(buffer, undo)
            released[buffer] = FormerBuffer.of(buffer.value, is_saved=False)
    view.remember(released)


def _put_back(buffer: ModelTensor, undo: ExitStack) -> None:
    former = buffer.former
    if former is None or not isinstance(former.values, Tensor) or former.values.is_meta:
        return
    if former.differs_from(buffer.value):
        write(buffer.value, former.values, undo)
