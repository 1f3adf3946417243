"""Remove adapters from a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from disha.errors import ModeError
from disha.layers.adapted import refuse_changed_class, set_state
from disha.layers.memory import Flag, ModelState
from disha.model import buffers
from disha.model.view import ModelView, all_or_nothing
from disha.text import counted, first_few

M = TypeVar("M", bound=nn.Module)


def remove_adapters(model: M, adapter: str | None = None) -> M:
    """Remove one adapter, or all; return the same model.

    A layer without adapters gets its former class and state-dict keys back. When the model has no
    adapter left, every `requires_grad` flag and the running statistics of batch norms are as they
    were before the first injection. Buffers that `also_train` named are as before the adapter that
    it trained them with; parameters that it named keep their values. No other adapter becomes
    active.

    Args:
        model: a model with adapters.
        adapter: the adapter to remove; all by default.

    Returns:
        `model` itself.

    Raises:
        ArgumentError: there is no such adapter, or something changed a layer's class after it was
            adapted (a parametrization, for example).
        TargetError: DDP or FSDP wraps the model.
        ModeError: adapters are merged (`MergeError`); or this thread is in a context of the model,
            or another one is in a context that names the adapter.

    Warns:
        UserWarning: other buffers have changed since the injection. They keep their values.

    The model is unchanged whenever this raises.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), "all-linear", r=4)
        >>> type(disha.remove_adapters(model)).__name__, model.weight.requires_grad
        ('Linear', True)
    """
    view = ModelView(model)
    view.refuse_inside("remove adapters")
    view.refuse_wrapped(
        "remove adapters",
        "remove them before wrapping (of DDP, from the module inside), or switch them off with "
        "set_active_adapters(model, [])",
    )
    if adapter is not None:
        view.require(adapter)
    removed = view.adapters if adapter is None else [adapter]
    check_removable(view, removed)
    with all_or_nothing(view) as undo:
        take_out(view, removed)
        for name in removed:
            buffers.release_buffers(view, name, undo)
        if not view.has_adapters_anywhere:
            buffers.put_back_buffers(view, undo)
            _warn_of_unsaved_buffers(view)
            for memory in view.memories:
                memory.state = ModelState()
    return model


def _warn_of_unsaved_buffers(view: ModelView) -> None:
    """Name the buffers that have changed, but whose former values nothing has kept."""
    changed = buffers.list_unsaved(view)
    if changed:
        warnings.warn(
            f"{counted(len(changed), 'buffer')} of the model changed while it had adapters, and "
            f"can't be put back: {first_few(changed, 3, ', ')}. Name them in also_train when you "
            "inject, and they are saved and put back",
            stacklevel=3,
        )


def take_out(view: ModelView, adapters: Sequence[str]) -> None:
    """Remove adapters, and give layers without any their own class back."""
    for layer in view.find_layers():
        state = layer.disha.state(type(layer)).without(adapters)
        set_state(layer, state if state.children else None)
    view.guard_encoders()
    view.forget(adapters)
    is_plain = not view.has_adapters_anywhere
    released = {}
    for parameter in view.parameters:
        flag = parameter.former
        if flag is None:
            continue
        if is_plain:
            parameter.value.requires_grad = flag.original
        elif flag.claimant in adapters:
            released[parameter] = Flag(flag.original)
            parameter.value.requires_grad = flag.without_adapter
    view.remember(released)
    if is_plain:
        for memory in view.memories:
            memory.state = ModelState(buffers=memory.state.buffers)  # which may be put back yet


def check_removable(view: ModelView, removed: Sequence[str]) -> None:
    """Raise if a class was changed, or another thread or task is in a context of an adapter."""
    view.refuse_half_of_ties("remove adapters")
    for layer, name in view.find_layers().items():
        if set(layer.disha) <= set(removed):
            refuse_changed_class(layer, name)
    for context in view.open_contexts():
        used = sorted(context.names.intersection(removed))
        if used:
            raise ModeError(
                f"can't remove adapter {used[0]!r} while another thread or task uses it, inside "
                f"{context.function}; remove it when those have ended"
            )
