"""What training changes besides parameters: the persistent buffers of a model.

The record of the model remembers what they were before the first adapter:

    buffers                           remembered         saved, once they have changed
    running statistics of norms       their values       with every adapter
    those that `also_train` matches   their values       with that adapter
    all others                        their checksums    never: a save names them
"""

from __future__ import annotations

from collections.abc import Collection, Container
from contextlib import ExitStack

from torch import Tensor

from disha.layers.model_record import remember_buffer
from disha.model.view import ModelBuffer, ModelView
from disha.sharding.tensors import write


def claimant_of(buffer: ModelBuffer) -> str | None:
    """Return the adapter whose `also_train` has named the buffer, if there is one."""
    former = buffer.former
    return None if former is None else former.claimant


def remember_buffers(view: ModelView, adapter: str, also_train: Collection[str]) -> None:
    """Remember the buffers that are not remembered yet, and those that the adapter will save."""
    for buffer in view.buffers:
        if buffer.name in also_train:
            _remember(buffer, is_saved=True, claimant=adapter)
        elif buffer.former is None:
            _remember(buffer, is_saved=buffer.is_statistic)


def _remember(buffer: ModelBuffer, *, is_saved: bool, claimant: str | None = None) -> None:
    """Remember what a buffer is now."""
    place = buffer.place
    assert place is not None  # the record covers the whole model
    former = remember_buffer(buffer.value, is_saved=is_saved, claimant=claimant)
    place.record.set_buffer(place.names, former)


# --- changes -------------------------------------------------------------------------------------


def list_saved(view: ModelView, adapter: str | None = None) -> dict[str, Tensor]:
    """Return the buffers that an adapter, or any, saves once they have changed, by name."""
    return {buffer.name: buffer.value for buffer in view.buffers if _is_saved(buffer, adapter)}


def list_changed(view: ModelView, adapter: str | None = None) -> dict[str, Tensor]:
    """Return the buffers that may have changed and that an adapter, or any, saves, by name."""
    return {
        buffer.name: buffer.value
        for buffer in view.buffers
        if _is_saved(buffer, adapter) and _has_changed(buffer)
    }


def list_unsaved(view: ModelView) -> list[str]:
    """Return the names of the buffers that have changed and that no adapter saves."""
    # Tensors are compared, because modules may share a buffer that one of them has saved.
    saved = {id(buffer.value) for buffer in view.buffers if _is_saved(buffer)}
    return [
        buffer.name
        for buffer in view.buffers
        if id(buffer.value) not in saved and buffer.former is not None and _has_changed(buffer)
    ]


def _is_saved(buffer: ModelBuffer, adapter: str | None = None) -> bool:
    former = buffer.former
    if former is None:  # it came after the adapters
        return buffer.is_statistic
    return former.is_saved_with(adapter)


def _has_changed(buffer: ModelBuffer) -> bool:
    former = buffer.former
    return former is None or former.differs_from(buffer.value)


def put_back_buffers(
    view: ModelView, undo: ExitStack, adapter: str | None = None, excepted: Container[str] = ()
) -> None:
    """Put the former values back into the buffers that an adapter saves, or that any does.

    The buffers named in `excepted` keep what they have.
    """
    for buffer in view.buffers:
        if buffer.name not in excepted and _is_saved(buffer, adapter) and _has_changed(buffer):
            _put_back(buffer, undo)


def release_buffers(view: ModelView, adapter: str, undo: ExitStack) -> None:
    """Put the former values back into the buffers that the adapter's `also_train` names.

    Then no adapter saves them any more.
    """
    for buffer in view.buffers:
        if claimant_of(buffer) == adapter:
            if _has_changed(buffer):
                _put_back(buffer, undo)
            _remember(buffer, is_saved=False)


def _put_back(buffer: ModelBuffer, undo: ExitStack) -> None:
    former = buffer.former
    if former is None or not isinstance(former.values, Tensor) or former.values.is_meta:
        return
    write(buffer.value, former.values, undo)
