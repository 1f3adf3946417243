"""Adapters: the blocks of one layer by adapter, and which act now; the layer's child `disha`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from disha.contexts import LOOSE, OPEN, Acts, Group, deciding
from disha.errors import ArgumentError, ArgumentTypeError
from disha.functional import Update
from disha.layers import compiled
from disha.layers.blocks import Block
from disha.routing import Route, Routed
from disha.torch_patches import install

CHILD_NAME = "disha"
"""Name of the one sub-module that adapting adds to a module."""


@dataclass(frozen=True)
class Original:
    """The former state of one parameter, for unmerging."""

    data: Tensor | None = None
    parameter: nn.Parameter | None = None  # if the parameter itself was replaced
    dense: bool = False  # whether a dense weight replaces a quantised one


@dataclass(frozen=True)
class Merged:
    """The adapters that are merged into a layer, perhaps none, and its former parameters."""

    adapters: tuple[str, ...] = ()
    originals: Mapping[str, Original] = field(default_factory=dict)


class Adapters(nn.Module):
    """The adapters of one layer, by name, and which of them act.

    If an adapter has only a block for the module's `weight`, `adapters[name]` is that block.
    Otherwise it is a dict of blocks by the names of their weights.
    """

    active: tuple[str, ...]
    live: dict[str, tuple[Block, ...]]
    """Parameter -> the blocks of the active adapters."""
    merged: Merged | None
    group: Group
    """The layers that contexts cover together with this one."""

    def __init__(self) -> None:
        super().__init__()
        install()
        # Here and below, this writes to __dict__, because assigning through nn.Module is slow.
        vars(self).update(active=(), live={}, merged=None)
        LOOSE.take(self)

    @property
    def is_dense(self) -> bool:
        """Whether a dense weight that replaces a quantised one is merged in."""
        return self.merged is not None and any(one.dense for one in self.merged.originals.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._modules

    def __getitem__(self, adapter: str) -> Any:
        return self._modules[adapter]

    def blocks(self, adapter: str | None = None) -> dict[tuple[str, str], Block]:
        """Return (adapter, name of the weight) -> block, of one adapter or of all."""
        found: dict[tuple[str, str], Block] = {}
        # A list, because another thread may add one.
        for own in list(self._modules) if adapter is None else [adapter]:
            child: Any = self._modules.get(own, {})
            for block in (child,) if isinstance(child, Block) else child.values():
                found[own, block.slot.name] = block
        return found

    def some(self, parameter: str) -> tuple[Block, ...]:
        """The blocks on a parameter, of the first adapter that has any."""
        for adapter in list(self._modules):  # another thread may add one
            found = self._live((adapter,)).get(parameter)
            if found:
                return found
        return ()

    def add(self, adapter: str, blocks: Iterable[Block]) -> None:
        """Add blocks under a name that `check_adapter_name` allows. They are not active yet."""
        blocks = list(blocks)
        for block in blocks:
            vars(block)["training"] = self.training
        child: nn.Module = blocks[0]
        if len(blocks) > 1 or blocks[0].slot.name:
            child = nn.ModuleDict()
            # Not by the dict's own functions: they refuse names of its methods, such as "keys".
            child._modules.update({block.slot.name or "weight": block for block in blocks})
            child.train(self.training)
        self._modules[adapter] = child
        self.activate(self.active)

    def discard(self, adapter: str) -> None:
        """Remove the blocks of an adapter, and deactivate it."""
        self._modules.pop(adapter, None)
        self.activate(tuple(name for name in self.active if name != adapter))

    def activate(self, adapters: tuple[str, ...]) -> None:
        """Make exactly these adapters act; names that this layer lacks are ignored."""
        vars(self).update(active=adapters, live=self._live(adapters))

    def _live(self, adapters: tuple[str, ...]) -> dict[str, tuple[Block, ...]]:
        live: dict[str, tuple[Block, ...]] = {}
        for adapter in adapters:
            for block in self.blocks(adapter).values():
                name = block.slot.parameter
                live[name] = (*live.get(name, ()), block)
        return live

    def acts(self, compiling: bool = False) -> Acts | None:
        """What acts on the layer here, or None for the active adapters."""
        if compiling:
            acts: Acts | None = getattr(compiled, self.group.name)
            return acts
        context = deciding(self.group) if OPEN else None
        if context is None:
            return None
        return () if context.acts is None else context.acts

    def acting(self, parameter: str, names: tuple[str, ...] | None) -> tuple[Block, ...]:
        """The blocks that act on a parameter for all samples."""
        live = self.live if names is None else self._live(names)
        return live.get(parameter, ())

    def routed(self, parameter: str, route: Route, compiling: bool) -> Routed:
        """The updates of single samples; `compiling` as for `acts`."""
        updates = {
            adapter: self.updates(self._live((adapter,)).get(parameter, ()), compiling)
            for adapter in route.adapters
        }
        return Routed(route, updates)

    def updates(
        self, blocks: Iterable[Block], compiling: bool, on_meta: bool = False
    ) -> tuple[Update, ...]:
        """The updates of blocks of this layer; `compiling` as for `acts`."""
        group = self.group if compiling else None
        return tuple([block.update(on_meta, group) for block in blocks])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        install()
        self.group.take(self)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or the one that it had before it was adapted."""
    cls: type[nn.Module] = type(module)
    if hasattr(cls, "original_class") and isinstance(module._modules.get(CHILD_NAME), Adapters):
        cls = cls.original_class
    return cls


def check_adapter_name(adapter: object) -> str:
    """Return a name if it can become part of state-dict keys, and an attribute of `Adapters`."""
    if not isinstance(adapter, str):
        raise ArgumentTypeError(
            f"an adapter's name must be a str, got {adapter!r} of type {type(adapter).__name__}"
        )
    taken = {*dir(nn.Module()), *vars(Adapters), *Adapters.__annotations__}
    if not adapter or "." in adapter or adapter in taken:
        raise ArgumentError(
            f"{adapter!r} can't name an adapter: a name must not be empty, have a dot, or be an "
            "attribute of modules"
        )
    return adapter
