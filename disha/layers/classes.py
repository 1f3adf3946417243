"""Moved: a module whose class has been moved to a subclass of its own class, and moves back.

Adapting keeps the module. The very same object moves to a subclass of its own class, so that
hooks, other references, `isinstance` checks, parameter objects and state-dict keys stay as they
were. For a class that disha knows (`nn.Linear`) the subclass is one of ours. For a class derived
from it, a subclass is made on the fly, with ours behind the user's, so that what the user's class
overrides stays overridden.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from torch import nn

from disha.errors import ArgumentError

__all__ = ["Moved", "move", "move_back", "moved_class", "refuse_changed_class"]


class Moved(nn.Module):
    """Base of the classes that modules are moved to.

    Attributes:
        base_class: the class that this one derives from and stands for; None for a class that goes
            in front of whatever it is asked to.
        original_class: the class that the module had.
        layer_kind: the class of ours that it was moved to, or that was joined with its own.
        front: a class of ours before both, or None.
    """

    base_class: ClassVar[type[nn.Module] | None] = None
    original_class: ClassVar[type[nn.Module]]
    layer_kind: ClassVar[type[Moved]]
    front: ClassVar[type[Moved] | None] = None
    kind_goes_first: ClassVar[bool] = False

    @classmethod
    def facts(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Return class attributes for a class that is made of `original` and this kind."""
        return {}

    @classmethod
    def facts_before(cls, kind: type[Moved], original: type[nn.Module]) -> dict[str, Any]:
        """Return class attributes for a class that has this one in front of those two."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        if "made_on_the_fly" not in cls.__dict__:
            return reduced
        return (_new_instance, (cls.original_class, cls.layer_kind, cls.front), *reduced[2:])


M = TypeVar("M", bound=Moved)
_Key = tuple[type[nn.Module], type[Moved], type[Moved] | None]
_CLASSES: dict[_Key, type[Moved]] = {}


def moved_class(
    original: type[nn.Module], kind: type[Moved], front: type[Moved] | None = None
) -> type[Moved]:
    """Return the class that an `original` moves to by `kind`; one per combination."""
    if original is kind.base_class and front is None:
        return kind
    key = (original, kind, front)
    if key not in _CLASSES:
        _CLASSES[key] = _make_class(original, kind, front)
    return _CLASSES[key]


def _make_class(
    original: type[nn.Module], kind: type[Moved], front: type[Moved] | None
) -> type[Moved]:
    kind_first = kind.base_class is None or (front is not None and front.kind_goes_first)
    pair = (kind, original) if kind_first else (original, kind)
    namespace = {
        "__module__": kind.__module__,
        "__doc__": f"{original.__qualname__}, adapted by disha.",
        "made_on_the_fly": True,
        "original_class": original,
        "layer_kind": kind,
        "front": front,
        **kind.facts(original),
        **({} if front is None else front.facts_before(kind, original)),
    }
    bases: tuple[type, ...] = pair if front is None else (front, *pair)
    return type(f"Adapted{original.__name__}", bases, namespace)


def _new_instance(
    original: type[nn.Module], kind: type[Moved], front: type[Moved] | None
) -> nn.Module:
    cls = moved_class(original, kind, front)
    return cls.__new__(cls)


def move(module: nn.Module, kind: type[M], front: type[Moved] | None = None) -> M:
    """Move a module to the class that `kind` makes of its own. Undone by `move_back`.

    Raises:
        ArgumentError: the module's class does not allow it.
    """
    try:
        _set_class(module, moved_class(type(module), kind, front))
    except TypeError as error:
        raise ArgumentError(
            f"{type(module).__name__} can't be adapted: Python does not let its class change "
            f"({error}); leave it out with exclude="
        ) from error
    assert isinstance(module, kind)
    return module


def move_back(module: Moved) -> None:
    """Give the module its original class back."""
    _set_class(module, type(module).original_class)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    # Not by assignment: the user's class may guard its attributes.
    object.__setattr__(module, "__class__", cls)


def refuse_changed_class(module: Moved, name: str) -> None:
    """Raise if something derived another class from the one that the module was moved to.

    Raises:
        ArgumentError: giving back the original class would undo that change too.
    """
    if "original_class" not in type(module).__dict__:
        raise ArgumentError(
            f"{name or 'the model'} has become a {type(module).__name__} since it was adapted (by "
            "a parametrization or a wrapper, say), so its original class can't be given back; undo "
            "that change first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
