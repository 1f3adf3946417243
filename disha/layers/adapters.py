"""The adapters of a layer: its child module `disha`, and their state as a value.

`Adapters` holds the blocks of a layer, and stores what acts, because each forward asks for it.
`LayerState` is all of that as one immutable value. To change a layer is to set another state
(`layers.adapted.set_state`), and to take the change back is to set the former one.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from disha.checks import check_type
from disha.effective.contexts import OPEN_CONTEXTS, Group, Override, current_context
from disha.effective.torch_patches import install
from disha.errors import ArgumentError
from disha.functional import Update
from disha.functional.new_rows import NewRows
from disha.functional.routed import Route, Routed
from disha.functional.weight_updates import Updates, WithNewRows
from disha.layers import compiled
from disha.layers.blocks import AdapterBlock
from disha.layers.containers import CHILD_NAME
from disha.layers.memory import ModelMemory
from disha.layers.spec import BlockSpec
from disha.layers.value import Value
from disha.text import join

MERGED = f"{CHILD_NAME}.merged"
"""Key in the state dict of a layer whose weights were merged when it was taken."""


@dataclass(frozen=True)
class Original:
    """What unmerging needs of a merged parameter."""

    weight: Tensor  # the former parameter, if another one stands in for it, or else its data
    was_quantized: bool  # whether a dense weight stands in for a quantised one
    written: Mapping[torch.dtype, int]  # the checksums of what merging wrote (layers/fingerprints)


@dataclass(frozen=True)
class Merged:
    """The adapters that are merged into a layer, if any, and the originals of its parameters."""

    adapters: tuple[str, ...]
    originals: Mapping[str, Original]


Borrowed = tuple[tuple[str, AdapterBlock], ...]
"""Parameters of a layer that are tied to those of another one, each with the block there."""


@dataclass(frozen=True)
class LayerState(Value):
    """The adapters of a layer as a value: its class, its blocks, what acts, and its model.

    Attributes:
        cls: the class of the layer.
        adapters: its child `disha`.
        children: adapter -> its child there, which has its blocks.
        borrowed: adapter -> the tied parameters of the layer whose blocks another layer holds.
        active: the adapters that act. Those that the layer lacks are ignored.
        merged: what is merged into the layer; while it is merged, no block acts.
        memory: what the adapters of the model remember of it.
        names: the names of the layer there.
    """

    cls: type[nn.Module]
    adapters: Adapters
    children: Mapping[str, nn.Module]
    borrowed: Mapping[str, Borrowed]
    active: tuple[str, ...]
    merged: Merged | None
    memory: ModelMemory
    names: tuple[str, ...]

    def with_adapter(
        self,
        adapter: str,
        blocks: Sequence[AdapterBlock],
        borrowed: Borrowed,
        active: tuple[str, ...],
    ) -> LayerState:
        """Return the state with one adapter more, and these acting."""
        by_name = {block.spec.own_name or "weight": block for block in blocks}
        child: nn.Module
        if list(by_name) == ["weight"]:
            child = by_name["weight"]
        else:
            child = nn.ModuleDict()
            # A ModuleDict refuses the names of its methods as keys, such as "keys".
            child._modules.update(by_name)
        child.train(self.adapters.training)
        return self.but(
            children={**self.children, adapter: child},
            borrowed={**self.borrowed, adapter: borrowed},
            active=active,
        )

    def without(self, removed: Iterable[str]) -> LayerState:
        """Return the state without some adapters."""
        return self.but(
            children={name: child for name, child in self.children.items() if name not in removed},
            borrowed={name: tied for name, tied in self.borrowed.items() if name not in removed},
            active=tuple(name for name in self.active if name not in removed),
        )


class Adapters(nn.Module):
    """The adapters of one layer, by name, and which of them act.

    If an adapter has one block here, and that is for the module's `weight`, `adapters[name]` is the
    block. Otherwise it is a dict of blocks by the names of their weights. `blocks_by_name(name)`
    returns the blocks in both cases.

    If layers share a parameter, one of them has its block, and the others borrow it.
    """

    merged: Merged | None
    _active: tuple[str, ...]
    borrowed: Mapping[str, Borrowed]
    all_blocks: dict[str, dict[str, tuple[AdapterBlock, ...]]]
    """Parameter -> adapter -> its blocks for the parameter, each for other outputs."""
    active_blocks: dict[str, tuple[AdapterBlock, ...]]
    """Parameter -> the blocks that act on it outside of contexts; none while merged."""
    only_linear_block: AdapterBlock | None
    """The block that acts on `weight`, if it is the only one, and `weight` a whole matrix."""
    group: Group
    """The layers that the same contexts cover."""
    memory: ModelMemory
    """What the adapters of the model remember of it."""
    names: tuple[str, ...]
    """The names of the layer there."""

    def __init__(self, memory: ModelMemory, names: tuple[str, ...], training: bool) -> None:
        super().__init__()
        install()
        vars(self).update(
            training=training,
            _active=(),
            merged=None,
            borrowed={},
            all_blocks={},
            active_blocks={},
            only_linear_block=None,
            memory=memory,
            names=names,
        )
        memory.group.take(self)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that act. New ones act at once; those that this layer lacks are ignored."""
        return self._active

    @active.setter
    def active(self, adapters: tuple[str, ...]) -> None:
        self.take(self.state().but(active=adapters))

    def state(self, cls: type[nn.Module] = nn.Module) -> LayerState:
        """Return the state of the layer, whose class this is; what is not set needs none."""
        return LayerState(
            cls,
            self,
            dict(self._modules),  # type: ignore[arg-type]
            self.borrowed,
            self.active,
            self.merged,
            self.memory,
            self.names,
        )

    def take(self, state: LayerState) -> None:
        """Take the blocks of a state, and store what acts."""
        if self._modules != state.children:
            self._modules.clear()
            self._modules.update(state.children)
        self.memory.members.discard(self)
        state.memory.members.add(self)
        # Assigned as attributes, blocks would become children.
        vars(self).update(
            borrowed=state.borrowed,
            _active=state.active,
            merged=state.merged,
            memory=state.memory,
            names=state.names,
        )
        self._sort_blocks()

    def __setattr__(self, name: str, value: Any) -> None:
        # `nn.Module` would refuse `self.training = True` if an adapter is called "training".
        if isinstance(value, nn.Module):
            self._modules[name] = value
        else:
            object.__setattr__(self, name, value)

    def forward(self, input: Any) -> Any:
        """Return the input, for code that runs each child of a layer in turn."""
        return input

    def train(self, mode: bool = True) -> Adapters:
        """Set the mode of the blocks, and warn if none trains, as after PEFT has frozen all."""
        if mode and "peft" in sys.modules:
            blocks = [block.block for blocks in self.active_blocks.values() for block in blocks]
            if blocks and not any(block is None or block.requires_grad for block in blocks):
                warnings.warn(
                    f"adapter {self.active[0]!r} is frozen, so it will not train; if a peft_config "
                    "has frozen it, leave that out, because it adds an adapter of PEFT instead",
                    stacklevel=2,
                )
        return super().train(mode)

    @property
    def is_dense(self) -> bool:
        """Whether a dense merged weight stands in for a quantised one."""
        if self.merged is None:
            return False
        return any(original.was_quantized for original in self.merged.originals.values())

    def __iter__(self) -> Iterator[str]:
        yield from list(self._modules)  # a copy: another thread may add one

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, adapter: str) -> AdapterBlock:
        """Return the block of an adapter, or the dict of its blocks."""
        return self._modules[adapter]  # type: ignore[return-value]

    def blocks_by_name(self, adapter: str | None = None) -> dict[tuple[str, str], AdapterBlock]:
        """Return (adapter, name of the weight) -> block, of one adapter or of all."""
        names = list(self) if adapter is None else [adapter]
        blocks = {}
        for name in names:
            child: Any = self._modules.get(name, {})
            if isinstance(child, AdapterBlock):
                blocks[name, child.spec.own_name] = child
                continue
            for block in child.values():
                blocks[name, block.spec.own_name] = block
        return blocks

    def _sort_blocks(self) -> None:
        """Store the blocks of each parameter, and those that act: every forward asks for them."""
        all_blocks: dict[str, dict[str, tuple[AdapterBlock, ...]]] = {}
        children = dict(self._modules)  # a copy: another thread may add one
        for adapter in children:
            own_blocks = self.blocks_by_name(adapter).values()
            placed = [(block.spec.parameter, block) for block in own_blocks]
            for parameter, block in (*placed, *self.borrowed.get(adapter, ())):
                of_adapters = all_blocks.setdefault(parameter, {})
                of_adapters[adapter] = (*of_adapters.get(adapter, ()), block)
        vars(self)["all_blocks"] = all_blocks
        names = self.active if self.merged is None else ()
        acting = {parameter: self.blocks_for(parameter, names) for parameter in all_blocks}
        only = None
        on_weight = acting.get("weight", ())
        if len(on_weight) == 1:
            (block,) = on_weight
            is_whole_matrix = block.split is None and block.spec.layout.pattern == "out in"
            if is_whole_matrix and not block.is_new_rows:
                only = block
        vars(self).update(active_blocks=acting, only_linear_block=only)

    def blocks_for(self, parameter: str, adapters: Iterable[str]) -> tuple[AdapterBlock, ...]:
        """Return the blocks for a parameter that these adapters have, whether they act or not.

        New rows come last, because they replace what the others give.
        """
        by_adapter = self.all_blocks.get(parameter, {})
        blocks: list[AdapterBlock] = []
        for adapter in adapters:
            blocks += by_adapter.get(adapter, ())
        if len(blocks) > 1:
            blocks.sort(key=lambda block: block.is_new_rows)
        return tuple(blocks)

    def find_override(self, compiling: bool = False) -> Override | None:
        """Return what acts in place of the active adapters, or None if no context covers the layer.

        Where a context disables adapters, this is (): nothing acts. Compiled code (`compiling`)
        gets None there, and multiplies scales by 0 (`layers.compiled`).
        """
        if compiling:
            return getattr(compiled, self.group.name)
        context = current_context(self.group) if OPEN_CONTEXTS else None
        return None if context is None else context.override

    def acting_blocks(self, parameter: str, override: Override | None) -> tuple[AdapterBlock, ...]:
        """Return the blocks that act on a parameter; for a route, those of its adapters."""
        if override is None or self.merged is not None:  # while merged, the active ones are none
            return self.active_blocks.get(parameter, ())
        if isinstance(override, Route):
            # One without adapters still checks the number of samples, so it gets any blocks.
            override = override.adapters or tuple(self)
        return self.blocks_for(parameter, override)

    def updates(
        self, parameter: str, override: Override | None, compiling: bool, on_meta: bool = False
    ) -> Updates:
        """Return the updates of the blocks that act on a parameter.

        `compiling` and `on_meta` are as in `AdapterBlock.make_update`.
        """
        group = self.group if compiling else None
        chosen: dict[Any, Override | None] = {None: override}
        if isinstance(override, Route):
            chosen = {name: (name,) for name in override.adapters}
        updates_of: dict[Any, tuple[Update, ...]] = {}
        rows_of: dict[Any, list[NewRows]] = {}
        for adapter, names in chosen.items():
            made: list[Any] = []
            rows: list[Any] = []
            for block in self.acting_blocks(parameter, names):
                kind = rows if block.is_new_rows else made
                kind.append(block.make_update(on_meta, group))
            updates_of[adapter] = tuple(made)
            rows_of[adapter] = rows
        if isinstance(override, Route):
            updates: Updates = Routed(override, updates_of)
        else:
            updates = Updates(updates_of[None])
        return WithNewRows(updates, rows_of) if any(rows_of.values()) else updates

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        install()
        self.group.take(self)
        self.memory.members.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapters:
        """Return a copy. One of a tied layer alone holds the blocks that the layer borrows."""
        alone = [
            adapter
            for adapter, tied in self.borrowed.items()
            if any(id(block) not in memo for _, block in tied)
        ]
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(vars(self), memo))
        # In a copy of the whole model, the layer that holds a block may come later: then the copy
        # borrows it again. The memo lives as long as the copying; its other keys are ids.
        held: dict[int, _Held] = memo.setdefault("held by disha", {})  # type: ignore[call-overload]
        for block in copied.blocks_by_name().values():
            if id(block) in held:
                held.pop(id(block)).give_back()
        for adapter in alone:
            for parameter, block in copied.borrowed[adapter]:
                held[id(block)] = _Held(
                    copied, adapter, copied._modules[adapter], copied.borrowed[adapter], block.spec
                )
                own_name = "" if parameter == "weight" else parameter
                name = join(block.spec.module, own_name)
                vars(block)["spec"] = block.spec.but(name=name, parameter=parameter)
            blocks = [*copied.blocks_by_name(adapter).values()]
            blocks += [block for _, block in copied.borrowed[adapter]]
            state = copied.state()
            copied.take(state.with_adapter(adapter, blocks, (), state.active))
        return copied


class _Held(NamedTuple):
    """What a copied layer was before it held a block that it had borrowed."""

    adapters: Adapters
    adapter: str
    child: Any
    borrowed: Borrowed
    spec: BlockSpec

    def give_back(self) -> None:
        """Let the layer borrow the block again."""
        for _, block in self.borrowed:
            vars(block)["spec"] = self.spec
        state = self.adapters.state()
        self.adapters.take(
            state.but(
                children={**state.children, self.adapter: self.child},
                borrowed={**state.borrowed, self.adapter: self.borrowed},
            )
        )


def find_members(model: nn.Module) -> list[Adapters]:
    """Return the adapters of all layers of a model, by the shortest possible walk."""
    found = []
    seen = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        children = module._modules
        if not children or id(module) in seen:
            continue
        seen.add(id(module))
        adapters = children.get(CHILD_NAME)
        if type(adapters) is Adapters:
            found.append(adapters)
            if len(children) == 1:
                continue
        waiting += [child for child in children.values() if child is not None]
    return found


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has, or had before it was adapted."""
    cls = type(module)
    if hasattr(cls, "_original_class") and isinstance(module._modules.get(CHILD_NAME), Adapters):
        cls = cls._original_class
    return cls


def check_adapter_name(adapter: str) -> str:
    """Return an adapter's name, or raise if it can't be a part of a state-dict key."""
    check_type("an adapter's name", adapter, str, "a str")
    if not adapter or "." in adapter:
        raise ArgumentError(
            f"{adapter!r} can't name an adapter: the name must not be empty or contain a dot"
        )
    return adapter
