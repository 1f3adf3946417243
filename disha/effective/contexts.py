"""Contexts: which adapters act in a thread or task, instead of the active ones.

`adapters_active`, `adapters_disabled` and `route_adapters` each add a `Context` to a context
variable, and write nothing on layers. A layer asks for the context that covers its group.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from inspect import CO_GENERATOR, isgeneratorfunction
from types import FrameType
from typing import Any, TypeAlias, TypeVar
from weakref import WeakSet, WeakValueDictionary

import torch

from disha.errors import ModeError
from disha.functional.routed import Route
from disha.private_torch import in_backward

Override: TypeAlias = Route | tuple[str, ...]
"""What acts in a context: an adapter for each sample, or these adapters for all samples."""

F = TypeVar("F", bound=Callable[..., Any])

_NUMBERS = itertools.count()
LOCK = threading.RLock()
"""Held while the adapters of any model change, and while a context of a model opens."""


class Group:
    """Layers that every context covers together: usually all adapted layers of a model."""

    def __init__(self, lineage: tuple[Group, ...] = ()) -> None:
        self.name = f"group_{next(_NUMBERS)}"  # compiled code asks for it (`layers.compiled`)
        # Itself, and the groups that its layers came from: a context of those covers them too.
        self.lineage = (self, *lineage)
        self.members: WeakSet[Any] = WeakSet()  # the adapters of its layers
        self.factors: dict[tuple[str, bool], torch.Tensor] = {}  # kept by `layers.compiled`
        GROUPS_BY_NAME[self.name] = self

    def split_off(self, members: Iterable[Any], parent: Group | None = None) -> None:
        """Move members to a new group; what covers this group, or the parent, covers it too."""
        lineage = self.lineage if parent is None else (*parent.lineage, *self.lineage)
        part = Group(lineage)
        for adapters in members:
            part.take(adapters)

    def is_only_one(self) -> bool:
        """Whether all adapted layers of the process are of this group or of parts of it."""
        groups = list(GROUPS_BY_NAME.values())
        return all(self in group.lineage or not group.members for group in groups)

    def take(self, adapters: Any) -> None:
        """Add the adapters of a layer as a member, and remove them from their former group."""
        with LOCK:
            former = vars(adapters).get("group", self)
            former.members.discard(adapters)
            self.members.add(adapters)
            vars(adapters)["group"] = self

    def __reduce__(self) -> str | tuple[Any, ...]:
        if self is SINGLE_LAYERS:
            return "SINGLE_LAYERS"  # unpickled as the group of that name in this module
        return Group, ()


GROUPS_BY_NAME: WeakValueDictionary[str, Group] = WeakValueDictionary()

SINGLE_LAYERS = Group()
"""The group of layers that were made one by one, such as `BoneLinear(8, 16, r=4)`."""


@dataclass(eq=False)
class Context:
    """An open context: what acts on the layers of some groups."""

    groups: frozenset[Group]
    override: Override
    disables: bool = False  # then no context inside it has an effect
    finite: dict[Group, bool] = field(default_factory=dict)  # kept by `layers.compiled`
    generator: FrameType | None = None  # the frame that opened it, if that can yield inside
    around: frozenset[FrameType] = frozenset()  # such frames that ran when it was opened

    @property
    def function(self) -> str:
        """The public function that opens such a context."""
        if self.disables:
            return "adapters_disabled"
        return "route_adapters" if isinstance(self.override, Route) else "adapters_active"

    @property
    def names(self) -> frozenset[str]:
        """The adapters that it names."""
        if isinstance(self.override, Route):
            return frozenset(self.override.adapters)
        return frozenset(self.override)

    def covers(self, group: Group) -> bool:
        """Whether it decides what acts on the layers of a group."""
        return not self.groups.isdisjoint(group.lineage)


_CONTEXTS: ContextVar[tuple[Context, ...]] = ContextVar("disha_contexts", default=())
"""The contexts of a thread or task, from the outermost inwards, also some that have ended.

A task inherits the contexts that are open where it starts, and they may end before the task does.
"""

OPEN_CONTEXTS: set[Context] = set()
"""The contexts that are open in any thread. While there are none, layers do not look for theirs."""


@contextmanager
def open_context(
    groups: frozenset[Group], override: Override, disables: bool = False
) -> Iterator[None]:
    """Run the body with other adapters acting, in this thread or task and in tasks it starts."""
    with _open(Context(groups, override, disables, around=_find_generators())):
        yield


@contextmanager
def _open(context: Context) -> Iterator[None]:
    OPEN_CONTEXTS.add(context)
    try:
        _CONTEXTS.set((*_CONTEXTS.get(), context))
        yield
    finally:
        OPEN_CONTEXTS.discard(context)
        # `reset` would raise if another task ends the context than the one that opened it.
        _CONTEXTS.set(_open_here())


class NamedContext(AbstractContextManager[None]):
    """A context that warns if it ends unused: it then had no effect."""

    def __init__(self, name: str, open_anew: Callable[[], Any]) -> None:
        self._name = name
        self._open_anew = open_anew
        self._context = open_anew()
        self._is_used = False

    def __enter__(self) -> None:
        self._is_used = True
        caller = sys._getframe(1)
        self._context.__enter__()
        context = _CONTEXTS.get()[-1]
        if caller.f_code.co_flags & CO_GENERATOR:
            context.generator = caller

    def __exit__(self, *error: Any) -> Any:
        return self._context.__exit__(*error)

    def __call__(self, function: F) -> F:
        """Return a function that runs in the context, which opens anew for each call.

        For a generator function, it opens for each step: it is closed while the generator waits.
        """
        self._is_used = True
        if not isgeneratorfunction(function):
            return self._open_anew()(function)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            steps = function(*args, **kwargs)
            sent = None
            try:
                while True:
                    with self._open_anew():
                        try:
                            value = steps.send(sent)
                        except StopIteration as end:
                            return end.value
                    sent = yield value
            finally:
                steps.close()

        return run  # type: ignore[return-value]

    def __del__(self) -> None:
        if not self._is_used:
            call = f"disha.{self._name}(...)"
            warnings.warn(f"{call} has no effect alone; write `with {call}:`", stacklevel=2)


def _open_here() -> tuple[Context, ...]:
    """Return the open contexts of this thread or task, from the outermost inwards."""
    return tuple([context for context in _CONTEXTS.get() if context in OPEN_CONTEXTS])


def bind_contexts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs in the contexts that are open here, wherever it is called.

    Activation checkpointing computes layers again in backward. By then a context may have ended,
    and a thread of autograd has none.
    """
    contexts = _open_here()

    def run(*args: Any, **kwargs: Any) -> Any:
        before = _CONTEXTS.set(())
        try:
            with ExitStack() as stack:
                for context in contexts:
                    # A new one for each call, because several threads may run it at once.
                    stack.enter_context(_open(replace(context)))
                return function(*args, **kwargs)
        finally:
            _CONTEXTS.reset(before)

    return run


def split_off_groups(members: Iterable[Any]) -> frozenset[Group]:
    """Return groups that have these members and no others.

    If a group has others too, these members leave it for a new one.
    """
    with LOCK:
        chosen = set(members)
        for group in {adapters.group for adapters in chosen}:
            chosen_here = chosen.intersection(group.members)
            if len(chosen_here) < len(group.members):
                group.split_off(chosen_here)
        return frozenset(adapters.group for adapters in chosen)


def current_context(group: Group) -> Context | None:
    """Return the context that decides what acts on a group here, or None.

    One that disables all adapters decides, whatever is inside it; otherwise the innermost does.
    """
    if _CONTEXTS.get(None) is None and _is_autograd_thread():
        _refuse_in_autograd_thread(group)
    here = _open_here()
    _refuse_resumed(here, group)
    innermost = None
    for context in here:
        if context.covers(group):
            if context.disables:
                return context
            innermost = context
    return innermost


def _find_generators() -> frozenset[FrameType]:
    """Return the frames of running generators that have opened a context and not closed it."""
    generators = [context.generator for context in list(OPEN_CONTEXTS)]
    opened = {generator for generator in generators if generator is not None}
    if not opened:  # as almost always
        return frozenset()
    running = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    return frozenset(opened & running)


def _refuse_resumed(here: tuple[Context, ...], group: Group) -> None:
    """Raise if a running generator left a context open over a `yield`, and does not get it back.

    The caller of a generator may take each step in a copy of its context, as servers do, or take
    steps of another generator meanwhile, whose context is then the innermost one.
    """
    opened = list(OPEN_CONTEXTS)
    if all(context.generator is None or not context.covers(group) for context in opened):
        return  # as almost always: the stack is not read
    for generator in _find_generators():
        left_open = [context for context in opened if context.generator is generator]
        positions = [here.index(context) for context in left_open if context in here]
        opened_since = [
            context
            for context in here[min(positions, default=0) :]
            if context.covers(group) and context not in left_open
            if generator not in context.around
        ]
        is_covered = any(context.covers(group) for context in left_open)
        if is_covered and (opened_since or not positions):
            raise ModeError(
                f"a generator goes on after a `yield` inside `with {left_open[0].function}(...):` "
                "where another context is open, or none, so other adapters would act; let the "
                f"context open for each step: {left_open[0].function}(...)(generator_function)(...)"
            )


def _is_autograd_thread() -> bool:
    """Whether a thread in which the variable was never set is one of autograd.

    `get(None)` overrides the variable's default. Python did not start a thread of autograd, so it
    is a `_DummyThread`. Any other thread in backward has called `backward` itself.
    """
    return in_backward() and isinstance(threading.current_thread(), threading._DummyThread)


def _refuse_in_autograd_thread(group: Group) -> None:
    """Raise if any context is open for these layers.

    A thread of autograd has no contexts, so it can't know which adapters acted in forward.
    """
    for context in list(OPEN_CONTEXTS):
        if context.covers(group):
            raise ModeError(
                "a layer is computed again in backward (activation checkpointing), where a thread "
                "of autograd can't know which adapters acted in forward, because "
                f"{context.function} is open; call backward after it, and choose the adapters to "
                "train with set_active_adapters"
            )
