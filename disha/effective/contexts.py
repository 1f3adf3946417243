"""Contexts: what acts for the current thread or task, instead of the active adapters.

Each public context adds a `Context` to a context variable, and writes nothing on layers. A layer
asks for the context that covers its group.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakSet, WeakValueDictionary

import torch

from disha.errors import ModeError
from disha.functional.routed import Route
from disha.private_torch import in_backward

Override: TypeAlias = Route | tuple[str, ...]
"""What acts: an adapter for each sample, or these adapters for all samples."""

_NUMBERS = itertools.count()
_LOCK = threading.RLock()


class Group:
    """Layers that every context covers together: usually all adapted layers of a model."""

    def __init__(self, lineage: tuple[Group, ...] = ()) -> None:
        self.name = f"group_{next(_NUMBERS)}"  # compiled code asks for it (`layers.compiled`)
        self.lineage = (self, *lineage)  # and the groups that its layers were in before
        self.members: WeakSet[Any] = WeakSet()  # the adapters of its layers
        self.factors: dict[tuple[str, bool], torch.Tensor] = {}  # of scales, in compiled code
        NAMED[self.name] = self

    def take(self, adapters: Any) -> None:
        """Add the adapters of a layer as a member, and remove them from their former group."""
        with _LOCK:
            former = vars(adapters).get("group", self)
            former.members.discard(adapters)
            self.members.add(adapters)
            vars(adapters)["group"] = self

    def __reduce__(self) -> str | tuple[Any, ...]:
        return "LOOSE" if self is LOOSE else (Group, ())


NAMED: WeakValueDictionary[str, Group] = WeakValueDictionary()

LOOSE = Group()
"""The group of layers that were made one by one, such as `BoneLinear(8, 16, r=4)`."""


@dataclass(eq=False)
class Context:
    """One entered context: what acts on some groups; None if all adapters are disabled."""

    groups: frozenset[Group]
    override: Override | None

    @property
    def function(self) -> str:
        """The function that makes such a context."""
        if isinstance(self.override, Route):
            return "route_adapters"
        return "adapters_disabled" if self.override is None else "adapters_active"

    @property
    def names(self) -> frozenset[str]:
        """The adapters that it names."""
        override = self.override
        return frozenset(override.adapters if isinstance(override, Route) else override or ())

    def covers(self, group: Group) -> bool:
        """Whether the layers of a group are covered."""
        return not self.groups.isdisjoint(group.lineage)


_ENTERED: ContextVar[tuple[Context, ...]] = ContextVar("disha_contexts", default=())

OPEN: set[Context] = set()
"""The contexts that are open in any thread. While there are none, layers do not look for theirs."""


@contextmanager
def entered(groups: frozenset[Group], override: Override | None) -> Iterator[None]:
    """Run the body with other adapters acting, in this thread or task and in tasks it starts."""
    context = Context(groups, override)
    OPEN.add(context)
    try:
        _ENTERED.set((*_ENTERED.get(), context))
        yield
    finally:
        OPEN.discard(context)  # it can end in another task than the one that entered it
        _ENTERED.set(_here())


def _here() -> tuple[Context, ...]:
    """Return the contexts of this thread or task, from the outermost inwards."""
    return tuple([context for context in _ENTERED.get() if context in OPEN])


def in_these_contexts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that always runs in the contexts in which it is made.

    Activation checkpointing computes layers again in backward: after a context has ended, or in a
    thread of autograd, which has none.
    """
    around = _here()

    def run(*args: Any, **kwargs: Any) -> Any:
        before = _ENTERED.set(())
        try:
            with ExitStack() as opened:  # anew, because several threads may run it at once
                for context in around:
                    opened.enter_context(entered(context.groups, context.override))
                return function(*args, **kwargs)
        finally:
            _ENTERED.reset(before)

    return run


def groups_of(layers: Iterable[Any]) -> frozenset[Group]:
    """Return groups that hold exactly these layers; a group of more is split."""
    with _LOCK:
        chosen = set(layers)
        for group in {adapters.group for adapters in chosen}:
            members = chosen.intersection(group.members)
            if len(members) < len(group.members):
                part = Group(group.lineage)
                for adapters in members:
                    part.take(adapters)
        return frozenset(adapters.group for adapters in chosen)


def current_context(group: Group) -> Context | None:
    """Return the context that decides here, if any: one that disables, else the last one."""
    if _ENTERED.get(None) is None and in_backward():
        _refuse_in_autograd_thread(group)
    around = [context for context in _here() if context.covers(group)]
    disabling = [context for context in around if context.override is None]
    if disabling:
        return disabling[0]
    return around[-1] if around else None


def _refuse_in_autograd_thread(group: Group) -> None:
    """Raise in a thread of autograd, which has no contexts, if any is open for these layers."""
    if not isinstance(threading.current_thread(), threading._DummyThread):
        return  # a thread that called `backward` itself
    for context in list(OPEN):
        if context.covers(group):
            raise ModeError(
                "a layer is computed again in backward (activation checkpointing), where a thread "
                "of autograd can't know which adapters acted in forward, because "
                f"{context.function} is open; call backward after it, and choose the adapters to "
                "train with set_active_adapters"
            )
