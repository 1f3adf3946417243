"""Adapters: the blocks of one layer by adapter, and which of them act now.

An adapted layer has one as its child `disha`.
"""

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
    """The former state of one parameter, for unmerging.

    `data` is the former data of the parameter. If the parameter itself was replaced, `parameter` is
    the former one: the module was untied from it, or a dense weight replaces a quantised one
    (`dense`).
    """

    data: Tensor | None = None
    parameter: nn.Parameter | None = None
    dense: bool = False


@dataclass(frozen=True)
class Merged:
    """The adapters that are merged into a layer, and its former parameters.

    Both are empty if the layer has none of the merged adapters. Its own adapters are then inactive
    while other layers are merged.
    """

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
        if adapter is None:
            children = list(self._modules.items())  # another thread may add one
        else:
            children = [(adapter, self._modules.get(adapter))]
        for own, child in children:
            if isinstance(child, Block):
                found[own, child.slot.name] = child
            elif child is not None:
                for block in child.children():
                    assert isinstance(block, Block)
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
            for block in self.blocks(adapter).values() if adapter in self else ():
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


def check_adapter_name(adapter: object) -> str:
    """Return `adapter` if it can name an adapter.

    The name becomes part of state-dict keys, and an attribute of `Adapters`. So it must be a str
    that is not empty, has no dot and is not the name of another attribute, such as "train".
    """
    if not isinstance(adapter, str):
        raise ArgumentTypeError(
            f"an adapter's name must be a str, got {adapter!r} of type {type(adapter).__name__}"
        )
    if not adapter or "." in adapter or hasattr(Adapters(), adapter):
        raise ArgumentError(
            f"{adapter!r} can't name an adapter: a name must not be empty, have a dot, or be an "
            "attribute of modules"
        )
    return adapter
