"""What training changes besides parameters: the persistent buffers of a model.

Each module remembers in its `__dict__` what its buffers were before the first adapter:

    buffers                           remembered       saved, once they have changed
    running statistics of norms       their values     with every adapter
    those that `also_train` matches   their values     with that adapter
    all others                        some values      never: a save names them
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn

from disha.layers.gradient_flags import attributes_of
from disha.model.fingerprints import sample
from disha.model.view import ModelBuffer, ModelView
from disha.sharding.tensors import local_part, write
from disha.text import join

_BUFFERS = "_disha_buffers"


class _Remembered(NamedTuple):
    """What a module remembers of a buffer."""

    former: Tensor  # its values before the first adapter; a sample of them if it is not saved
    is_saved: bool  # whether adapters save a change of it
    claimant: str | None = None  # the adapter whose `also_train` names it, if one does

    def is_saved_with(self, adapter: str | None) -> bool:
        """Whether a change is saved with an adapter; with None, whether any adapter saves it."""
        if not self.is_saved:
            return False
        if adapter is None or self.claimant is None:
            return True
        return self.claimant == adapter

    def differs_from(self, now: Tensor) -> bool:
        """Whether a buffer may have changed."""
        if self.former.is_meta or now.is_meta:
            return self.is_saved  # unknown; a buffer that adapters save is saved to be safe
        current = _read(now, is_whole=self.is_saved)
        former = self.former.to(current)
        if current.shape != former.shape:
            return True
        # NaN differs from itself, so places that have NaN in both are left out.
        differs = (current != former) & ~(current.isnan() & former.isnan())
        return bool(differs.any())


def _read(buffer: Tensor, *, is_whole: bool) -> Tensor:
    """Return the values of a buffer, or a sample of them."""
    values = local_part(buffer.detach())  # all of them: a DTensor among buffers is replicated
    return values if is_whole else sample(values)


def _recall(buffer: ModelBuffer) -> _Remembered | None:
    return attributes_of(buffer.module).get(_BUFFERS, {}).get(buffer.attribute)


def claimant_of(buffer: ModelBuffer) -> str | None:
    """Return the adapter whose `also_train` has named the buffer, if there is one."""
    remembered = _recall(buffer)
    return None if remembered is None else remembered.claimant


# --- remembering ---------------------------------------------------------------------------------


def remember_buffers(
    view: ModelView, adapter: str, also_train: Collection[str], undo: ExitStack
) -> None:
    """Remember the buffers that are not remembered yet, and those that the adapter will save."""
    for buffer in view.buffers:
        if buffer.name in also_train:
            _remember(buffer, undo, is_saved=True, claimant=adapter)
        elif _recall(buffer) is None:
            _remember(buffer, undo, is_saved=buffer.is_statistic)


def _remember(
    buffer: ModelBuffer, undo: ExitStack, *, is_saved: bool, claimant: str | None = None
) -> None:
    """Remember what a buffer is now."""
    values = _read(buffer.value, is_whole=is_saved).clone()
    remembered = _Remembered(values, is_saved, claimant)
    attributes = attributes_of(buffer.module)
    former = attributes.get(_BUFFERS)
    if former is None:
        undo.callback(attributes.pop, _BUFFERS, None)
    else:
        undo.callback(attributes.__setitem__, _BUFFERS, former)
    attributes[_BUFFERS] = {**(former or {}), buffer.attribute: remembered}


def remember_from_base(model: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Remember the buffers in a state dict of the base, in place of those at the injection."""
    for name, module in model.named_modules():
        remembered = attributes_of(module).get(_BUFFERS, {})
        for attribute, buffer in list(remembered.items()):
            values = state.get(prefix + join(name, attribute))
            if values is not None:
                former = _read(values, is_whole=buffer.is_saved).clone()
                remembered[attribute] = buffer._replace(former=former)


def forget_buffers(modules: Iterable[nn.Module], undo: ExitStack) -> None:
    """Forget what the buffers of modules were."""
    for module in modules:
        attributes = attributes_of(module)
        if _BUFFERS in attributes:
            undo.callback(attributes.__setitem__, _BUFFERS, attributes[_BUFFERS])
            del attributes[_BUFFERS]


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
        if id(buffer.value) not in saved and _recall(buffer) is not None and _has_changed(buffer)
    ]


def _is_saved(buffer: ModelBuffer, adapter: str | None = None) -> bool:
    remembered = _recall(buffer)
    if remembered is None:  # it came after the adapters
        return buffer.is_statistic
    return remembered.is_saved_with(adapter)


def _has_changed(buffer: ModelBuffer) -> bool:
    remembered = _recall(buffer)
    return remembered is None or remembered.differs_from(buffer.value)


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
            _remember(buffer, undo, is_saved=False)


def _put_back(buffer: ModelBuffer, undo: ExitStack) -> None:
    remembered = _recall(buffer)
    if remembered is not None and not remembered.former.is_meta:
        write(buffer.value, remembered.former, undo)
